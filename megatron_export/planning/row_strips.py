"""Strips of rows of one large parameter: items that are encoded and sent one by one, so that no rank holds all of it encoded.

A strip has the same rows of every part of every shard. Its first rows are at different places of the HF tensors on ranks that hold
different rows. The bytes are those of the whole, as a strip has whole tiles of its format.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from ..common.piece import Axis, Piece, join
from .parameter import Item
from .part_specs import split_specs
from .smoothed import UNSMOOTHED
from .tensor_spec import Output

if TYPE_CHECKING:
    from torch import Tensor


def strips_of(item: Item, limit: int, known: dict[int, tuple[Item, ...]]) -> tuple[Item, ...]:
    """An item in strips of at most `limit` encoded bytes, or of one tile of rows each; itself if it is small or cannot be cut.

    known  by the id of the first item of each kind, its strips
    """
    if item.first:
        if id(item.first) not in known:
            known[id(item.first)] = strips_of(item.first, limit, known)
        firsts = known[id(item.first)]
        return tuple(replace(item, rows=one.rows, first=one) for one in firsts) if len(firsts) > 1 else (item,)
    if item.nbytes <= limit or not _can_be_cut(item):
        return (item,)
    rows, tile = _part_rows(item), item.form.tile[0] if item.form else 1
    step = max(limit * sum(rows) // (item.nbytes * len(rows)) // tile, 1) * tile
    return tuple(replace(item, rows=(start, min(start + step, rows[0]))) for start in range(0, rows[0], step))


def _can_be_cut(item: Item) -> bool:
    """Whether its rows are quantized one tile of them after the other, from a shard of which some can be read alone."""
    plain = item.smoothed == UNSMOOTHED and item.kv is None and not (item.kept or item.stacked or item.gather_first)
    if not (plain and item.splits and item.source.layout.views) or len(item.shard_shape) != 2:
        return False
    alike = len({part.shape[0] for part in item.raw_message(0)}) == 1
    return alike and all(output.axes[0] is Axis.OUT for output in item.pieces if Axis.OUT in output.axes)


def _part_rows(item: Item) -> list[int]:
    """The rows of each part that each shard has."""
    layout, count = item.source.layout, len(item.ranks)
    return [split_specs(layout, item.shard_shape, index, count)[0][1][0] for index in range(count)]


def placed(item: Item, shards: list[dict[str, Piece]]) -> Iterator[tuple[Output, Tensor]]:
    """The tensors of the checkpoint that an item becomes, or slices or strips of them, from what the ranks sent, in shard order."""
    if item.rows is None:
        yield from item.assembled(item.join(shards))
        return
    wholes = {output.name: output for output in item.outputs}
    for name, piece in shards[0].items():
        found = [shard[name] for shard in shards if name in shard]
        if Axis.OUT not in piece.axes:
            yield wholes[name], piece.data
        elif item.source.cut is Axis.OUT:
            yield from (_strip(item, wholes[name], n, one.data) for n, one in enumerate(found))
        else:
            yield _strip(item, wholes[name], 0, join(found, item.source.cut).data)


def _strip(item: Item, whole: Output, index: int, data: Tensor) -> tuple[Output, Tensor]:
    """What shard `index` sent of a tensor, and where it belongs in it."""
    each = (
        item.form.stored[whole.name.rpartition(".")[2]].rows if item.form else 1
    )  # rows of the weight that an entry is about
    entry = (sum(_part_rows(item)[:index]) + item.rows[0]) // each
    first = entry * (whole.nbytes // whole.shape[0])
    return whole._replace(shape=tuple(data.shape), first=first, rows=whole.shape[0]), data
