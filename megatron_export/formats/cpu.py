"""What torch does slowly on a CPU: the same numbers by numpy, which uses its vector units, in memory that a thread keeps.

Memory of a strip's size comes from the system anew each time, page by page, which takes longer than what is done in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from threading import local
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor

KEPT = 1 << 20  # elements of the largest tensor whose memory is kept

_mine = local()


def scratch(use: str, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU with any numbers in it; the next call of this thread for the same use may return its memory."""
    shape = tuple(shape)
    nbytes = prod(shape) * dtype.itemsize
    if prod(shape) > KEPT:
        return torch.empty(shape, dtype=dtype)
    held: dict[str, np.ndarray] = _mine.__dict__  # no tensors, which could not leave an inference mode
    if use not in held or held[use].size < nbytes:
        held[use] = np.empty(nbytes, np.uint8)
    return torch.from_numpy(held[use][:nbytes]).view(dtype).view(shape)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`; on the CPU in memory that numpy asks for, which the system gives in pages of 2 MB. Small ones, as torch gets
    them, each take as long as copying some thousand bytes.
    """
    if device.type != "cpu" or not prod(shape) or not shape:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def above(values: Tensor, bounds: Iterable[float], at: Iterable[float] = ()) -> Tensor:
    """How many of `bounds` each float32 value is above, and how many of `at` it is not below: uint8 of the same shape.

    On a CPU numpy compares, eight times as fast as torch.
    """
    code = torch.zeros_like(values, dtype=torch.uint8)
    if values.device.type != "cpu":
        for bound in bounds:
            code += values > bound
        for bound in at:
            code += values >= bound
        return code
    numbers, total = values.detach().numpy(), code.numpy()
    found = scratch("found", values.shape, torch.bool).numpy()
    for bound in bounds:
        total += np.greater(numbers, np.float32(bound), out=found).view(np.uint8)
    for bound in at:
        total += np.greater_equal(numbers, np.float32(bound), out=found).view(np.uint8)
    return code


def below_zero(values: Tensor) -> Tensor:
    """1 for each float32 value below zero, 0 for others, uint8 of the same shape."""
    if values.device.type != "cpu":
        return (values < 0).to(torch.uint8)
    found = scratch("found", values.shape, torch.bool)
    np.less(values.detach().numpy(), np.float32(0), out=found.numpy())
    return found.view(torch.uint8)


def unequal(one: Tensor, other: Tensor) -> Tensor:
    """Where float32 values of one shape differ, bool; NaN differs from all."""
    if one.device.type != "cpu":
        return one != other
    return torch.from_numpy(np.not_equal(one.detach().numpy(), other.detach().numpy()))


def count(found: Tensor) -> Tensor:
    """How many of a bool tensor are true, int64 []."""
    if found.device.type != "cpu":
        return found.count_nonzero()
    return torch.tensor(np.count_nonzero(found.numpy()))


def magnitudes(values: Tensor) -> Tensor:
    """Those of float32 values; on a CPU in memory that the next call takes again."""
    if values.device.type != "cpu":
        return values.abs()
    return torch.abs(values.detach(), out=scratch("magnitudes", values.shape, torch.float32))


def in_float32(weight: Tensor) -> Tensor:
    """A weight, in float32; on a CPU in memory that the next call takes again."""
    if weight.device.type != "cpu" or weight.dtype == torch.float32:
        return weight.float()
    return scratch("in_float32", weight.shape, torch.float32).copy_(weight.detach())


def divided(values: Tensor, scales: Tensor) -> Tensor:
    """The quotients of float32 values; on a CPU in memory that the next call takes again."""
    if values.device.type != "cpu":
        return values / scales
    return torch.div(values.detach(), scales, out=scratch("divided", values.shape, torch.float32))


def largest(blocks: Tensor) -> Tensor:
    """The amax of each block of bfloat16 or float32 numbers [..., block], in float32."""
    if blocks.device.type != "cpu" or blocks.dtype != torch.bfloat16:
        return blocks.abs().amax(-1).float()
    bits = blocks.detach().view(torch.int16)  # those of magnitudes are in their order
    sizes = torch.bitwise_and(bits, 0x7FFF, out=scratch("sizes", bits.shape, torch.int16))
    return sizes.amax(-1).view(torch.bfloat16).float()


class Largest:
    """The largest magnitude of numbers of any float dtype as bfloat16 holds it; NaN or Inf stay visible.

    On a CPU bfloat16 numbers are compared by numpy, for several threads that work on strips of rows: after every operation of torch
    a thread waits for its turn of Python, and a few more of them take half of the speed.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values.detach()
        self.signed: np.ndarray | None = None
        if values.device.type == "cpu" and values.dtype == torch.bfloat16:
            self.signed = self.values.view(torch.int16).numpy()
            self.unsigned = self.signed.view(np.uint16)

    def of_strip(self, rows: slice) -> Tensor | int:
        """Of some rows: float32 [], or the bits of a bfloat16 number."""
        if self.signed is None:
            low, high = torch.aminmax(self.values[rows])
            return torch.maximum(-low, high).to(torch.bfloat16).float()
        negative = int(self.unsigned[rows].max()) & 0x7FFF  # or the largest there is, if none is
        return max(int(self.signed[rows].max()), negative)

    def total(self, strips: Sequence[Tensor | int]) -> Tensor:
        """Of all rows, from what `of_strip` says of strips of them, float32 []."""
        if self.signed is None:
            return torch.stack(strips).amax()
        return torch.tensor(max(strips), dtype=torch.int16).view(torch.bfloat16).float()
