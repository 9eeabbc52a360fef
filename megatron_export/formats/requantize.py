"""A weight rounded once more, with the scales that a checkpoint has: what codes would be, had they been made from it.

Each function takes a float32 [out, in] weight and the pieces on disk, and gives the float32 weight that `decode` would. For
the scales of `encode`, the result is that of `encode` and `decode` to the bit.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..common.piece import Piece
from . import fp8_pb, int4, nvfp4
from .fp8 import E4M3_MAX

Pieces = dict[str, Piece]


def _fp8(weight: Tensor, pieces: Pieces) -> Tensor:
    scale = pieces["weight_scale"].data
    return (weight / scale).to(torch.bfloat16).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * scale


def _fp8_pb(weight: Tensor, pieces: Pieces) -> Tensor:
    ones = Piece(torch.ones_like(weight), ())
    scale = fp8_pb.decode(pieces | {"weight": ones})
    return (weight / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * scale


def _nvfp4(weight: Tensor, pieces: Pieces) -> Tensor:
    scale = (pieces["weight_scale"].data.float() * pieces["weight_scale_2"].data).unsqueeze(2)
    codes = nvfp4.e2m1_codes(weight.unflatten(1, (-1, nvfp4.BLOCK)) / scale).int()
    values = torch.tensor(nvfp4.E2M1, device=weight.device)[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
    return (values * scale).flatten(1)


def _int4(weight: Tensor, pieces: Pieces) -> Tensor:
    scale = pieces["weight_scale"].data.unsqueeze(2)
    groups = weight.unflatten(1, (scale.shape[1], -1))
    return ((groups / scale).round_().clamp_(int4.INT4_MIN, int4.INT4_MAX) * scale).flatten(1)


def _w4a8(weight: Tensor, pieces: Pieces) -> Tensor:
    second = pieces["weight_scale_2"].data
    scaled = (_int4(weight, pieces) / second).clamp_(-E4M3_MAX, E4M3_MAX)
    return scaled.to(torch.float8_e4m3fn).float() * second


AGAIN: dict[str, Callable[[Tensor, Pieces], Tensor]] = {
    "fp8": _fp8,
    "fp8_pb": _fp8_pb,
    "nvfp4": _nvfp4,
    "nvfp4_awq": _nvfp4,
    "int4_awq": _int4,
    "w4a8_awq": _w4a8,
}
