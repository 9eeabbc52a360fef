"""Parameters whose codes and scales are written as they are, since the format has the same blocks: they are not rounded twice.

A part of a fused parameter has its own blocks. They can have the parameter's scales where no block of a part holds rows of two of
the parameter's blocks; this is decided from shapes alone. A code is then found again: under its scale, its value is nearest to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

import torch

from ..common.blocks import Blocks
from ..formats import Form
from ..models.layouts import Layout
from .parameter import Item

if TYPE_CHECKING:
    from torch import Tensor


def keeps(item: Item, blocks: Blocks | None) -> bool:
    """Whether an item takes the scales of a parameter whose codes share them so."""
    if blocks is None or item.form is None or blocks_of(item.form) != blocks or item.gather_first or not item.splits:
        return False
    rows, count = item.shard_shape[0], len(item.ranks)
    aligned = all(_aligned(item.source.layout, rows, index, count, blocks.tile[0]) for index in range(count))
    return aligned and not item.smoothed.vectors


@cache
def blocks_of(form: Form) -> Blocks | None:
    """How the codes of a format share scales, if e4m3 codes and one scale for each block are all that it makes of a weight."""
    if form.stored["weight"].dtype != "F8_E4M3" or len(form.stored) != 2:
        return None
    scale = form.stored[form.scale]
    return Blocks(form.tile, scale.dtype) if (scale.rows, scale.columns) == form.tile else None


def kept_remarks(kinds: dict[str, str], items: Iterable[Item]) -> tuple[str, ...]:
    """What the user should know of parameters that are no plain tensors, from the classes of those, by canonical name."""
    kept = Counter(kinds[item.source.canonical] for item in items if item.kept)
    counts = Counter(kinds.values())
    return tuple(f"{counts[kind]} parameters are {kind}: {_how(counts[kind], kept[kind])}" for kind in sorted(counts))


def _how(count: int, kept: int) -> str:
    again = "the checkpoint is made of what their own dequantize() gives, which is rounded already"
    if not kept:
        return again
    same = "codes and scales are written as they are"
    return f"their {same}" if kept == count else f"of {kept} the {same}; of the others {again}"


@cache
def _aligned(layout: Layout, rows: int, index: int, count: int, tile: int) -> bool:
    """Whether no block of rows of a part holds rows of two blocks of the shard."""
    blocks = (torch.arange(rows) // tile).unsqueeze(1)
    parts = layout.split(blocks, index, count).values()
    return all(bool((block == block[0]).all()) for part in parts for block in part.split(tile))


def scales_of_parts(item: Item, scales: Tensor, index: int) -> dict[str, Tensor]:
    """Layout part -> the scales of its blocks, from those of shard `index` of an item that keeps them."""
    tile, count = item.form.tile[0], len(item.ranks)
    return {part: found[::tile] for part, found in item.source.layout.split(by_row(item, scales), index, count).items()}


def by_row(item: Item, scales: Tensor) -> Tensor:
    """The scales of the blocks of each row of a shard, [out, in/tile]."""
    return scales.repeat_interleave(item.form.tile[0], dim=0)[: item.shard_shape[0]]
