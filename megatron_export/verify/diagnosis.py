"""What is wrong with a weight: known mistakes of exporters are tried on a strip of rows, and the first that explains it is told."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..common.piece import Axis, Piece
from ..formats import PRE_QUANT_SCALE
from ..planning.parameter import Item
from .snr import decibels
from .weight_pairs import Sides

ROWS = 512
NEAR = 6.0  # dB that a guess must be better than the weight as it is, and reach


def diagnosis(sides: Sides, item: Item, part: str, row: int) -> str:
    """What explains that a weight is wrong near `row`, without its name; empty where no known mistake does."""
    count = sides.shape(item, part)[0]
    start = min(row // ROWS * ROWS, max(count - 1, 0) // ROWS * ROWS)
    rows = slice(start, min(start + ROWS, count))
    mine, target = sides.decoded(item, part, rows), sides.target(item, part, rows)
    if not mine.isfinite().all():
        return "it decodes to NaN or Inf"
    target = torch.where(target.isnan(), mine, target)
    bar = max(NEAR, _fit(mine, target) + NEAR)
    for text, guess in _guesses(sides, item, part, rows, mine, target):
        if guess is not None and _fit(*guess) >= bar:
            return text
    return ""


Guesses = Iterator[tuple[str, tuple[Tensor, Tensor] | None]]


def _fit(mine: Tensor, target: Tensor) -> float:
    return decibels(float(target.square().sum()), float((mine - target).square().sum()))


def _guesses(sides: Sides, item: Item, part: str, rows: slice, mine: Tensor, target: Tensor) -> Guesses:
    """Each known mistake: what to say of it, and two tensors that are near to each other if it was made; None if it was not."""
    yield from _of_size(item, mine, target)
    if item.form:
        yield from _of_codes(sides, item, part, rows, target)
    yield from _of_others(sides, item, part, rows, mine)
    if mine.dim() == 2:
        yield from _of_axes(sides, item, part, mine, target)


def _of_size(item: Item, mine: Tensor, target: Tensor) -> Guesses:
    length = float(target.square().sum())
    factor = float((mine * target).sum()) / length if length else 1.0
    which = "a scale is wrong" if item.form else "it was scaled"
    yield f"it is {factor:.2g} times what it should be: {which}", (mine, factor * target) if factor > 0 else None


def _of_codes(sides: Sides, item: Item, part: str, rows: slice, target: Tensor) -> Guesses:
    pieces = sides.pieces(item, part, rows)

    def with_(suffix: str, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        data = change(pieces[suffix].data.view(torch.uint8) if suffix == "weight" else pieces[suffix].data)
        return item.form.decode(pieces | {suffix: replace(pieces[suffix], data=data)}), target

    if item.form.bits == 4:
        yield "the two codes in each of its bytes are in the other order", with_("weight", lambda d: d << 4 | d >> 4)
    scales = [(suffix, piece) for suffix, piece in pieces.items() if suffix != "weight" and piece.data.dim() > 1]
    for suffix, piece in scales:
        for dim, axis in enumerate(piece.axes):
            for step in (1, -1) if axis else ():
                there = "outputs" if axis is Axis.OUT else "inputs"
                rolled = with_(suffix, lambda d, s=step, n=dim: _bytes(d).roll(s, n).view(d.dtype))
                yield f"its {suffix} is off by one block along its {there}", rolled
        yield from _transposed(sides, item, part, suffix, piece, rows, with_)


def _transposed(
    sides: Sides, item: Item, part: str, suffix: str, piece: Piece, rows: slice, with_: Callable
) -> Guesses:
    whole = sides.pieces(item, part, slice(0, sides.shape(item, part)[0]))[suffix].data
    high, wide = (size for size, axis in zip(whole.shape, piece.axes, strict=True) if axis)
    turned = _bytes(whole).reshape(wide, high).T.reshape(whole.shape).view(whole.dtype)
    start = rows.start * whole.shape[0] // sides.shape(item, part)[0]
    same = turned[start : start + piece.data.shape[0]]
    yield f"its {suffix} is transposed", with_(suffix, lambda d: same)


def _bytes(scales: Tensor) -> Tensor:
    return scales.view(torch.uint8) if scales.dtype is torch.float8_e4m3fn else scales


def _of_others(sides: Sides, item: Item, part: str, rows: slice, mine: Tensor) -> Guesses:
    """Other weights of the reference of the same shape: of other layers and experts, and of the same layer."""
    shape, source = sides.shape(item, part), item.source
    near = [i for i in sides.plan.items if i.source.layer == source.layer and (i.source.expert == source.expert)]
    alike = [i for i in sides.plan.items if i.source.rule == source.rule and i.source != source]
    alike.sort(key=lambda i: abs((i.source.layer or 0) - (source.layer or 0)) + (i.source.layer == source.layer) / 2)
    columns = sides.columns(item, part)
    seen = {source.names()[part]}
    for other in [*near, *alike[:200]]:
        for its_part, name in other.source.names().items():
            if name in seen or sides.shape(other, its_part) != shape:
                continue
            seen.add(name)
            theirs = sides.plain(other, its_part, rows)
            theirs = theirs if columns is None else (theirs / columns).nan_to_num(0)
            yield f"it holds what the reference has in {name}", (mine, theirs)


def _of_axes(sides: Sides, item: Item, part: str, mine: Tensor, target: Tensor) -> Guesses:
    """Columns or rows that were scaled, or are in another order."""
    for dim, what in ((0, "columns"), (1, "rows")):
        length = target.square().sum(dim, keepdim=True)
        factors = torch.where(length == 0, 1, (mine * target).sum(dim, keepdim=True) / length)
        low, high = float(factors.min()), float(factors.max())
        before = _taker(sides, item, part) if what == "columns" else ""
        yield f"its {what} are scaled by {low:.3g} to {high:.3g}{before}", (mine, factors * target) if low > 0 else None
    for dim, what in ((0, "inputs"), (1, "outputs")):
        ours, theirs = (torch.nn.functional.normalize(values, dim=dim) for values in (mine, target))
        alike = theirs.T @ ours if dim == 0 else theirs @ ours.T  # [of the target, of ours]
        order = alike.argmax(dim=0)
        moved = (order != torch.arange(len(order), device=order.device)).nonzero().flatten()
        if moved.numel():
            first = int(moved[0])
            text = f"its {what} are in another order: number {first} is the reference's {int(order[first])}"
            yield text, (mine, target.index_select(1 - dim, order))


def _taker(sides: Sides, item: Item, part: str) -> str:
    """What should have taken over the vector that the columns were divided by."""
    if item.smoothed.columns is None:
        return ", as by a smoothing that this format does not have"
    kept = f"{item.source.names()[part].removesuffix('weight')}{PRE_QUANT_SCALE}"
    if kept in sides.found:
        return f", which {kept} does not undo"
    names = [feeder.source.names()[its_part] for feeder, its_part in sides.feeders.get(item.smoothed.columns, ())]
    return f", which {names[0]} does not undo" if names else ""
