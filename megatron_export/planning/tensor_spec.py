"""Name, dtype and shape of one tensor of a checkpoint, or of a message between ranks."""

from dataclasses import dataclass
from functools import cache
from math import prod

import torch

from ..common.piece import Axis


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the checkpoint or of a message; with a `count`, slice `index` of `count` along a dim before its own; with
    `rows`, a strip of a tensor of so many rows, from its byte `first` on.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    axes: tuple[Axis | None, ...] = ()
    index: int = 0
    count: int = 0
    first: int = 0
    rows: int = 0

    @property
    def nbytes(self) -> int:
        return _nbytes(self.shape, self.dtype)

    @property
    def whole(self) -> "Output":
        """The tensor of the checkpoint that this is, or is a slice or strip of."""
        if self.rows:
            return Output(self.name, self.dtype, (self.rows, *self.shape[1:]), self.axes)
        return Output(self.name, self.dtype, (self.count, *self.shape)) if self.count else self


@cache
def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return prod(shape) * dtype.itemsize
