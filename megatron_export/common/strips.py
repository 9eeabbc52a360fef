"""Strips of rows: how many weights are worked on at a time, so that float32 copies stay small."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING

from .threads import working

if TYPE_CHECKING:
    from torch import Tensor

STRIP_ELEMENTS = 1 << 20
CUDA_STRIP_ELEMENTS = 1 << 22
SHARED_ELEMENTS = 1 << 22  # of all strips that are encoded side by side on the CPU


def row_strips(weight: Tensor, rows: int) -> Iterator[slice]:
    """Slices of a `[out, in]` weight, in whole tiles of `rows` rows, of at most `strip_elements` elements.

    On the CPU a strip's float32 copies stay in its cache, and glibc reuses their memory; a GPU wants more work at a time.
    """
    return strips_of(weight.shape, rows, strip_elements(weight.device.type))


def shared_strips(weight: Tensor, rows: int) -> Iterator[slice]:
    """The same, of those that `each` works on side by side: smaller ones where it has many threads."""
    elements = strip_elements(weight.device.type)
    return strips_of(weight.shape, rows, min(elements, SHARED_ELEMENTS // working()))


def survey_strips(tensor: Tensor) -> Iterator[slice]:
    """Those that a CPU reads more than once before the next; on a GPU, which is not to be waited for, all at once."""
    if tensor.is_cuda and tensor.dim():
        return iter([slice(0, tensor.shape[0])])
    return strips_of(tensor.shape)


def strips_of(shape: Sequence[int], rows: int = 1, elements: int = STRIP_ELEMENTS) -> Iterator[slice]:
    """Slices of the first dim of a tensor of this shape, each a multiple of `rows`, of at most `elements` elements (or one tile,
    if that is larger). A tensor without dims has one slice.
    """
    if not shape:
        yield slice(0, 1)
        return
    step = max(elements // max(prod(shape[1:]), 1) // rows, 1) * rows
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def strip_elements(device: str) -> int:
    """How many weights are encoded at a time on a "cpu" or a "cuda" device."""
    return CUDA_STRIP_ELEMENTS if device == "cuda" else STRIP_ELEMENTS


def at_once(elements: int) -> int:
    """How many strips of so many weights may be worked on side by side: those of tall tiles are larger than others."""
    return max(SHARED_ELEMENTS // max(elements, 1), 1)
