"""How near the decoded tensors of a checkpoint are to their originals, and whether rounding alone explains the difference.

For that, the reference is rounded once more with the scales on disk (the format's `requantize`). A block whose codes and scales
belong to it then has about as much noise as on disk; one that belongs elsewhere has many times more. Almost no code differs, unless
the weights were others, or codes were not rounded to the nearest value.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..common.piece import Axis
from ..formats import PRE_QUANT_SCALE, Form, chosen
from ..formats.cpu import count, unequal
from ..models import is_linear_weight
from ..planning.parameter import Item
from .block_sums import block_sums, totals, turned, turned_sums, turns
from .weight_pairs import Sides

EXPLAINED = 4.0  # a block's noise, in that of rounding
HALF = 0.5  # of what is in a block may be noise: the worst group of int4 has 0.4, beside an outlier
MOST = 0.75  # of a block's codes may be others: where a scale is too small, rounding saturates as the codes do
# How far a smoothed reference may be off: vectors in bfloat16, vectors fitted to the rows of rounded weights.
EXACT, READ_OFF, FITTED = 2.0**-8, 2.0**-6, 0.06
BINS = range(-40, 21)  # powers of two, of scales


@dataclass
class Likeness:
    """One weight, compared.

    form            the format of its codes; bf16's, if it is not quantized
    signal, noise   sums of squares of the target, and of the difference; `dot`, `size` make the cosine
    codes           how many of its `count` elements are not what rounding gives
    wrong           how many of its `blocks` are not explained by rounding; `first` of them as (row, column)
    worst, at       the lowest signal-to-noise of a block in dB, and where
    scales          how many of its scales lie in each power of two of `BINS`
    """

    name: str
    form: Form
    smoothed: bool
    shape: tuple[int, ...]
    signal: float = 0.0
    noise: float = 0.0
    dot: float = 0.0
    size: float = 0.0
    codes: int = 0
    blocks: int = 0
    wrong: int = 0
    first: tuple[int, int] | None = None
    worst: float = math.inf
    at: tuple[int, int] = (0, 0)
    scales: list[int] = field(default_factory=lambda: [0] * len(BINS))

    @property
    def quantized(self) -> bool:
        return bool(self.form.quantization)

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def snr(self) -> float:
        """Signal to noise in dB; inf for equal ones."""
        return decibels(self.signal, self.noise)

    @property
    def cosine(self) -> float:
        length = math.sqrt(self.signal * self.size)
        return self.dot / length if length else float(self.signal == self.size)

    def add(self, strip: "Likeness") -> None:
        """Take over what a strip adds to the strips before it."""
        for name in ("signal", "noise", "dot", "size", "codes", "blocks", "wrong"):
            setattr(self, name, getattr(self, name) + getattr(strip, name))
        self.first = strip.first if self.first is None else self.first
        if strip.worst < self.worst:
            self.worst, self.at = strip.worst, strip.at
        self.scales = [have + more for have, more in zip(self.scales, strip.scales, strict=True)]


def decibels(signal: float, noise: float) -> float:
    """10 log10 of the quotient; inf where there is no noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def finite(decibels: float) -> float | None:
    """Decibels as JSON has them: infinite ones are null."""
    return round(decibels, 3) if math.isfinite(decibels) else None


def likenesses(sides: Sides, parts: list[tuple[Item, str]]) -> Iterator[Likeness]:
    """Compare parts of items, strip by strip, by `sides.each`; the figures do not depend on how many threads that has."""

    def strips() -> Iterator[tuple[Item, str, slice, int]]:
        for item, part in parts:
            sides.prepare(item, part)
            yield from ((item, part, *several) for several in sides.strips(item, part))

    compared = sides.each(partial(_compared, sides), strips())
    for item, part in parts:
        found = _nothing(sides, item, part)
        for _ in sides.strips(item, part):
            for strip in next(compared):
                found.add(strip)
        yield found


def _nothing(sides: Sides, item: Item, part: str) -> Likeness:
    smoothed = bool(item.smoothed.columns or part in dict(item.smoothed.rows))
    form = item.form or chosen("bf16")
    return Likeness(item.source.names()[part], form, smoothed, sides.shape(item, part))


def _compared(sides: Sides, several: tuple[Item, str, slice, int]) -> list[Likeness]:
    """What each of several strips adds, which have as many rows."""
    item, part, rows, strips = several
    added = [_nothing(sides, item, part) for _ in range(strips)]
    found = added[0]
    pieces = sides.pieces(item, part, rows)
    mine = item.form.decode(pieces) if item.form else next(iter(pieces.values())).data.float()
    target = sides.target(item, part, rows)
    if found.smoothed:
        target = torch.where(target.isnan(), mine, target)
    again = found.form.requantize(target, pieces)
    if mine.dim() != 2:
        mine, target, again = (values.reshape(len(values), -1) for values in (mine, target, again))
    if mine.numel():
        _add(added, item, (mine, target, again), rows.start, tolerance(sides, item, part))
    if item.form and (
        Axis.OUT in pieces[item.form.scale].axes or not rows.start
    ):  # one of the whole tensor counts once
        _add_scales(found, pieces[item.form.scale].data)
    return added


def tolerance(sides: Sides, item: Item, part: str) -> float:
    """How far a target may be from what was encoded, relatively."""
    if not item.smoothed.columns and part not in dict(item.smoothed.rows):
        return EXACT if item.form else 0.0
    if not is_linear_weight(item.source.canonical) and item.smoothed.columns is None:
        return FITTED if item.source.canonical.endswith(".bias") else READ_OFF
    kept = f"{item.source.names()[part].removesuffix('weight')}{PRE_QUANT_SCALE}" in sides.found
    feeders = sides.feeders.get(item.smoothed.columns or "", [])
    fitted = any(is_linear_weight(feeder.source.canonical) for feeder, _ in feeders) and not kept
    return FITTED if fitted or part in dict(item.smoothed.rows) else READ_OFF


def _add(added: list[Likeness], item: Item, three: tuple[Tensor, Tensor, Tensor], start: int, tolerance: float) -> None:
    mine, target, again = three
    high, wide = 1, mine.shape[1]  # of a block: what shares a scale, or a row
    if item.form:
        scale = item.form.stored[item.form.scale]
        high, wide = scale.rows or high, scale.columns or wide
    (rows, columns), strips = mine.shape, len(added)
    odd, across = unequal(mine, again), -(-columns // wide)
    others = torch.stack([count(part) for part in odd.chunk(strips)])
    rounded = others.device.type == "cpu" and not others.any()  # what is on disk errs as rounding does, to the bit
    summed = partial(block_sums, high=high, wide=wide)
    if high == 1 and turns(mine, wide):
        mine, target = turned(mine, wide), turned(target, wide)
        again, odd = (again, odd) if rounded else (turned(again, wide), turned(odd, wide))
        summed = partial(turned_sums, rows=rows)

    def sums(values: Tensor) -> Tensor:
        """Of the blocks of each strip: [strips, blocks]."""
        return summed(values).reshape(strips, -1)

    noise = sums((mine - target).square_())
    rest = noise if rounded else sums((again - target).square_())
    signal, dot, size = map(sums, (target * target, mine * target, mine * mine))
    whole = totals(signal, noise, dot, size, strips=strips)
    floor = (whole[0] / signal.shape[1] * 1e-3).float()[:, None]  # what is less than this in a block counts as this
    wrong = ~(noise <= EXPLAINED * rest + tolerance**2 * signal)  # NaN is wrong too
    if item.form:
        wrong |= noise > HALF * torch.maximum(signal, floor)
        if not rounded:
            codes = sums(odd.float()) / _sizes((rows, columns), high, wide, mine.device).reshape(strips, -1)
            wrong |= (codes > MOST) & (signal > floor)
    quotient = torch.where(noise == 0, torch.inf, torch.maximum(signal, floor) / noise)
    places = wrong.int().argmax(dim=1), quotient.argmin(dim=1)
    told = torch.stack([one.double() for one in (*whole, others, wrong.sum(dim=1), quotient.amin(dim=1), *places)])
    for number, (found, its) in enumerate(zip(added, told.T.tolist(), strict=True)):  # one transfer from a GPU
        found.signal, found.noise, found.dot, found.size = its[:4]
        found.codes, found.wrong, found.blocks = int(its[4]), int(its[5]), noise.shape[1]
        first, at = (divmod(number * found.blocks + int(place), across) for place in its[7:])
        if found.wrong:
            found.first = (start + first[0] * high, first[1] * wide)
        found.worst, found.at = decibels(its[6], 1.0), (start + at[0] * high, at[1] * wide)


def _sizes(shape: tuple[int, int], high: int, wide: int, device: torch.device) -> Tensor:
    """How many elements each block has, but for those at the end as many as any; broadcasts to the blocks."""
    rows, columns = (
        torch.full((-(-size // block),), float(block), device=device)
        for size, block in zip(shape, (high, wide), strict=True)
    )
    rows[-1] -= -shape[0] % high
    columns[-1] -= -shape[1] % wide
    return rows[:, None] * columns


def _add_scales(found: Likeness, scales: Tensor) -> None:
    many = None
    if scales.element_size() == 1:  # each of 256 numbers is looked at once
        many = torch.bincount(scales.view(torch.uint8).flatten(), minlength=256).double()
        scales = torch.arange(256, dtype=torch.uint8, device=scales.device).view(scales.dtype)
    values = scales.float().flatten()
    powers = torch.frexp(values)[1] - 1 - BINS[0]
    powers = torch.where(values > 0, powers, 0).masked_fill_(values == torch.inf, len(BINS) - 1)
    counts = torch.bincount(powers.clamp(0, len(BINS) - 1).long(), many, len(BINS))
    found.scales = counts.long().tolist()
