"""Sums of the blocks of a weight: on every device the same numbers are added in the same order, so that figures are equal.

A CPU adds as many numbers in one operation as lie beside one another and are added to others that do. In blocks of 16 these are
8, then 4, 2 and 1. So small blocks are turned first: what stands at one place of each block then lies side by side.
"""

import numpy as np
import torch
from torch import Tensor

FOURS = {torch.float32: np.complex128, torch.bool: np.int32}  # numbers as large as four


def block_sums(values: Tensor, high: int, wide: int) -> Tensor:
    """The sum of every block of `high` rows and `wide` columns of a float32 [out, in]; the last ones may be partial.

    Halves are added to halves, so that every device adds in the same order; `values` are overwritten.
    """
    rows, columns = values.shape
    if columns % wide or rows % high:
        values = torch.nn.functional.pad(values, (0, -columns % wide, 0, -rows % high))
    return _folded(_folded(values.unflatten(1, (-1, wide)), 2).unflatten(0, (-1, high)), 1)


def turns(values: Tensor, wide: int) -> bool:
    """Whether blocks of so many columns are added faster once they are `turned`."""
    return values.device.type == "cpu" and wide in (8, 16, 32) and not values.shape[1] % wide


def turned(values: Tensor, wide: int) -> Tensor:
    """float32 or bool [out, in] on the CPU -> [wide / 4, out * in / wide, 4]: each block in fours, of which all first ones come
    first.
    """
    fours = values.contiguous().numpy().view(FOURS[values.dtype]).reshape(-1, wide // 4)
    return torch.from_numpy(np.ascontiguousarray(fours.T)).view(values.dtype).view(wide // 4, -1, 4)


def turned_sums(values: Tensor, rows: int) -> Tensor:
    """`block_sums` [rows, blocks] of what was turned, in the same order; `values` are overwritten."""
    halves = _folded(_folded(values, 0).view(torch.complex64), 1)  # two float32 are added at a time
    return _folded(torch.view_as_real(halves), 1).reshape(rows, -1)


def totals(*values: Tensor, strips: int = 1) -> Tensor:
    """The sums of so many equal runs of the numbers of each tensor, float64 [tensors, strips], in the same order on every
    device; all tensors have one size.
    """
    return _folded(torch.stack([one.double().reshape(strips, -1) for one in values]), 2)


def _folded(values: Tensor, dim: int) -> Tensor:
    """The sums along a dim, which is left out; `values` are overwritten."""
    while (size := values.shape[dim]) > 1:
        half = (size + 1) // 2
        first, rest = values.narrow(dim, 0, half), values.narrow(dim, half, size - half)
        first.narrow(dim, 0, size - half).add_(rest)
        values = first
    return values.squeeze(dim)
