"""E8M0: scales of blocks that are powers of two, a byte each, 2^(byte - 127). Byte 255 is NaN, and never written.

Source: OCP Microscaling specification 1.0, with the rounding of ModelOpt 0.47: up, so that no value of a block is beyond the
largest code. The specification's own conversion rounds down.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import torch

from ..common.piece import Axis, Piece

if TYPE_CHECKING:
    from torch import Tensor

MX_BLOCK = 32
_DOUBLING = 1 << 23  # from the bits of a positive float32 to those of twice as much


def scales_of(amax: Tensor, largest: float) -> Tensor:
    """The least powers of two times which `largest` is no less than float32 amaxes, uint8 of their shape; byte 0 for zeros.

    Read off the bits, which rise with the number: a logarithm is rounded, and on CUDA otherwise than on a CPU.
    """
    limit = struct.unpack("<i", struct.pack("<f", largest))[0]
    doublings = (amax.view(torch.int32) - limit + (_DOUBLING - 1)) >> 23
    return (doublings + 127).clamp_(min=0).to(torch.uint8)


def values_of(scales: Tensor) -> Tensor:
    """What bytes stand for, float32 of their shape."""
    bits = torch.where(scales == 0, _DOUBLING >> 1, scales.int() << 23)  # 2^-127 is subnormal
    return torch.where(scales == 0xFF, torch.nan, bits.view(torch.float32))


def spread(scales: Tensor) -> Tensor:
    """The scale of each block, float32 [out, in/32, 1], of bytes [out, in/32]."""
    return values_of(scales).unsqueeze(2)


def pieces(codes: Tensor, scales: Tensor) -> dict[str, Piece]:
    """What is on disk of a linear: its codes, and the bytes [out, in/32] of its scales, by suffix."""
    return {"weight": Piece(codes, (Axis.OUT, Axis.IN)), "weight_scale": Piece(scales, (Axis.OUT, Axis.IN))}
