"""Two four-bit codes in a byte: the first in the low nibble, the second in the high nibble, along rows or columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def pack(codes: Tensor, dim: int) -> Tensor:
    """uint8 codes 0 to 15 `[out, in]` -> uint8 bytes of half the size along `dim`, which must be even."""
    if dim == codes.dim() - 1 and codes.is_contiguous() and not codes.shape[dim] % 2:
        pairs = codes.view(
            torch.int16
        )  # the second code is in the high byte, from where it is moved to the high nibble
        return (pairs >> 4).bitwise_or_(pairs).to(torch.uint8)
    first, second = codes.unflatten(dim, (-1, 2)).unbind(dim + 1)
    return first | second << 4


def unpack(packed: Tensor, dim: int) -> Tensor:
    """The inverse of `pack`."""
    return torch.stack((packed & 15, packed >> 4), dim=dim + 1).flatten(dim, dim + 1)
