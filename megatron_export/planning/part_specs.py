"""Shapes, dtypes and axes of what shards and parts become, each found out once."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from ..common.piece import Axis, Piece
from ..formats import Form
from ..models.layouts import Layout
from ..models.sources import split_shapes
from .tensor_spec import Output

if TYPE_CHECKING:
    from torch import Tensor


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
    if not layout.splits(shape[0]):
        return split_specs(layout, _joined([shape] * count, cut), 0, 1)
    shards = [dict(split_shapes(layout, shape, index, count)) for index in range(count)]
    whole = {part: _joined([found[part] for found in shards], cut) for part in shards[0]}
    return tuple((part, found, axes_of(found)) for part, found in whole.items())


def _joined(shapes: list[tuple[int, ...]], cut: Axis | None) -> tuple[int, ...]:
    """The shape of what shards that are cut along `cut` make together, as `common.piece.join` joins them."""
    first, axes = shapes[0], axes_of(shapes[0])
    if cut is None or cut not in axes:
        return first
    dim = axes.index(cut)
    return (*first[:dim], sum(shape[dim] for shape in shapes), *first[dim + 1 :])


@cache
def encode_specs(form: Form, shape: tuple[int, ...]) -> tuple:
    """Suffix, and a tensor without a name, of each that a part of that shape becomes."""
    if not form.ragged and any(size % block for size, block in zip(shape, form.tile, strict=True)):
        return ()  # reported as a problem, or gathered first
    return tuple((suffix, Output("", one.dtype, one.shape(shape), one.axes)) for suffix, one in form.stored.items())
