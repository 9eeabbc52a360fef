"""What items of one kind have in common, and is found out once: a large model has 50,000 items of a few dozen kinds."""

from dataclasses import replace

from ..common.piece import Axis
from ..formats import Form, KvForm, groups_of
from ..models import Source
from .parameter import Item
from .smoothed import Smoothed


def item_of(
    firsts: dict[tuple, Item],
    source: Source,
    ranks: tuple[int, ...],
    shard_shape: tuple[int, ...],
    form: Form | None,
    kv: KvForm | None,
    smoothed: Smoothed,
    stacked: bool,
    cast: bool,
) -> Item:
    """An item with all that follows from its kind, which is found out once; `firsts`: kind -> the first item of it.

    The kind is all but names: what decides its sizes, and how it is cut and encoded.
    """
    how = (smoothed.columns is None, tuple(part for part, _ in smoothed.rows), smoothed.kept)
    stack = source.stack.index == 0 if stacked else None  # the first has the numbers that all share
    shape = (id(source.rule), source.shape, id(source.layout), source.cut, source.dtype, shard_shape, len(ranks))
    kind = (*shape, form, kv, how, stack)
    if first := firsts.get(kind):
        return Item(source, ranks, shard_shape, form, kv, first.gather_first, smoothed, stacked, cast, first=first)
    item = Item(source, ranks, shard_shape, form, kv, False, smoothed, stacked, cast)
    firsts[kind] = item = replace(item, gather_first=_straddles(item))
    return item


def _straddles(item: Item) -> bool:
    """Whether a tile of the format, or rows that the layout cannot part, lie on two shards."""
    if not item.splits:
        return True
    if item.form is None or len(item.ranks) == 1:
        return False
    tile = item.form.tile[0 if item.source.cut is Axis.OUT else 1]
    cut_sizes = [output.shape[output.axes.index(item.source.cut)] for output in item.raw_message(0)]
    return any(size % tile for size in cut_sizes)


def tile_problems(item: Item) -> list[str]:
    """Why a format cannot cut the parts of an item into its tiles; [] if it can."""
    if item.form is None or item.form.ragged:
        return []
    problems = []
    for part in item.parts:
        for size, block, axis in zip(part.shape, item.form.tile, ("outputs", "inputs"), strict=True):
            if size % block:
                fitting = [group for group in groups_of(item.form.name) if axis == "inputs" and size % group == 0]
                smaller = f"Give --group-size {fitting[0]}, or leave" if fitting else "Leave"
                problems.append(
                    f"{part.name} has {size} {axis}, which blocks of {block} ({item.form.name}) do not divide. "
                    f"{smaller} it in bfloat16 with --exclude {part.name.removesuffix('.weight')!r}"
                )
    return problems
