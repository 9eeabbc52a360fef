"""Shapes, dtypes and axes of what shards and parts become, by the real layouts and formats; each is found out once."""

from functools import cache

import torch
from torch import Tensor

from ..common.piece import Axis, Piece, join
from ..formats import Form
from ..models.layouts import Layout
from ..models.sources import split_shapes


def plain(tensor: Tensor, dtype: torch.dtype) -> Piece:
    """A tensor that is not quantized."""
    return Piece(tensor.to(dtype), axes_of(tensor.shape))


def axes_of(shape: tuple[int, ...]) -> tuple[Axis | None, ...]:
    """The first dim follows OUT, the second of a matrix IN; those of a convolution's kernels follow none."""
    return (Axis.OUT, Axis.IN)[: len(shape)] if len(shape) < 3 else (Axis.OUT, *[None] * (len(shape) - 1))


@cache
def split_specs(layout: Layout, shape: tuple[int, ...], index: int, count: int) -> tuple:
    return tuple((part, found, axes_of(found)) for part, found in split_shapes(layout, shape, index, count))


@cache
def whole_specs(layout: Layout, shape: tuple[int, ...], cut: Axis | None, count: int) -> tuple:
    """What `count` shards of that shape make together, part by part."""
    shards = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for _ in range(count)]
    if not layout.splits(shape[0]):
        fused = join([plain(shard, shard.dtype) for shard in shards], cut).data
        return split_specs(layout, tuple(fused.shape), 0, 1)
    split = [layout.split(shard, index, count) for index, shard in enumerate(shards)]
    whole = {part: join([plain(found[part], found[part].dtype) for found in split], cut) for part in split[0]}
    return tuple((part, tuple(piece.data.shape), piece.axes) for part, piece in whole.items())


@cache
def encode_specs(form: Form, shape: tuple[int, ...]) -> tuple:
    if not form.ragged and any(size % block for size, block in zip(shape, form.tile, strict=True)):
        return ()  # reported as a problem, or gathered first
    return tuple((suffix, (p.data.dtype, tuple(p.data.shape), p.axes)) for suffix, p in form.pieces_of(shape).items())
