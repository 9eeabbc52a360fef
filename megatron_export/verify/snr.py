"""How near the decoded tensors of a checkpoint are to their originals, and whether rounding alone explains the difference.

For that, the reference is rounded once more with the scales on disk (the format's `requantize`). A block whose codes and scales
belong to it then has about as much noise as on disk; one that belongs elsewhere has many times more. Almost no code differs, unless
the weights were others, or codes were not rounded to the nearest value.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..formats import PRE_QUANT_SCALE, Form, chosen
from ..models import is_linear_weight
from ..planning.parameter import Item
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


def decibels(signal: float, noise: float) -> float:
    """10 log10 of the quotient; inf where there is no noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def finite(decibels: float) -> float | None:
    """Decibels as JSON has them: infinite ones are null."""
    return round(decibels, 3) if math.isfinite(decibels) else None


def likeness(sides: Sides, item: Item, part: str) -> Likeness:
    """Compare one part of an item, strip by strip."""
    name = item.source.names()[part]
    smoothed = bool(item.smoothed.columns or part in dict(item.smoothed.rows))
    form = item.form or chosen("bf16")
    found = Likeness(name, form, smoothed, sides.shape(item, part))
    for rows in sides.strips(item, part):
        pieces = sides.pieces(item, part, rows)
        mine = item.form.decode(pieces) if item.form else next(iter(pieces.values())).data.float()
        target = sides.target(item, part, rows)
        target = torch.where(target.isnan(), mine, target)
        again = form.requantize(target, pieces)
        if mine.dim() != 2:
            mine, target, again = (values.reshape(len(values), -1) for values in (mine, target, again))
        _add(found, item, (mine, target, again), rows.start, tolerance(sides, item, part))
        if item.form:
            _add_scales(found, pieces[form.scale].data)
    return found


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


def _add(found: Likeness, item: Item, three: tuple[Tensor, Tensor, Tensor], start: int, tolerance: float) -> None:
    mine, target, again = three
    high, wide = 1, mine.shape[1]  # of a block: what shares a scale, or a row
    if item.form:
        scale = item.form.stored[item.form.scale]
        high, wide = scale.rows or high, scale.columns or wide
    noise, rest, signal = (
        _sums(values, high, wide) for values in ((mine - target).square(), (again - target).square(), target.square())
    )
    found.signal += float(signal.sum(dtype=torch.float64))
    found.noise += float(noise.sum(dtype=torch.float64))
    found.dot += float((mine * target).sum(dtype=torch.float64))
    found.size += float(mine.square().sum(dtype=torch.float64))
    found.codes += int((mine != again).sum())
    found.blocks += noise.numel()
    floor = signal.mean() * 1e-3  # what is less than this in a block counts as this
    wrong = ~(noise <= EXPLAINED * rest + tolerance**2 * signal)  # NaN is wrong too
    if item.form:
        codes = _sums((mine != again).float(), high, wide) / _sums(torch.ones_like(mine), high, wide)
        wrong |= (noise > HALF * signal.clamp(min=floor)) | ((codes > MOST) & (signal > floor))
    if wrong.any() and found.first is None:
        row, column = divmod(int(wrong.flatten().int().argmax()), wrong.shape[1])
        found.first = (start + row * high, column * wide)
    found.wrong += int(wrong.sum())
    quotient = torch.where(noise == 0, torch.inf, signal.clamp(min=floor) / noise)
    worst = float(quotient.min())
    if (low := decibels(worst, 1.0)) < found.worst:
        row, column = divmod(int(quotient.flatten().argmin()), quotient.shape[1])
        found.worst, found.at = low, (start + row * high, column * wide)


def _sums(values: Tensor, high: int, wide: int) -> Tensor:
    """The sum of every block of `high` rows and `wide` columns; the last ones may be partial."""
    rows, columns = values.shape
    if columns % wide or rows % high:
        values = torch.nn.functional.pad(values, (0, -columns % wide, 0, -rows % high))
    return values.unflatten(1, (-1, wide)).unflatten(0, (-1, high)).sum(dim=(1, 3))


def _add_scales(found: Likeness, scales: Tensor) -> None:
    powers = scales.float().flatten().log2().nan_to_num(BINS[0], BINS[-1], BINS[0])
    counts = torch.bincount((powers.floor() - BINS[0]).clamp(0, len(BINS) - 1).long(), minlength=len(BINS))
    found.scales = [have + more for have, more in zip(found.scales, counts.tolist(), strict=True)]
