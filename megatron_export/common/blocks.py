"""Codes and scales of blocks that a quantized parameter of Transformer Engine holds, found by its attributes.

`Float8BlockwiseQTensor` has e4m3 codes with a float32 scale for 128x128 of them, `MXFP8Tensor` with a power of two, a byte, for 32
of a row: what fp8_pb and mxfp8 write. The attributes are those of Transformer Engine 2.20; a tensor that lacks one of them, or
holds its scales in the order that a GEMM takes them in, has no blocks for us, and is read through its own `dequantize`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .dtypes import torch_dtypes

if TYPE_CHECKING:
    from torch import Tensor

_E4M3 = "kFloat8E4M3"  # of its enum of dtypes


@dataclass(frozen=True)
class Blocks:
    """How e4m3 codes share scales.

    tile   (out, in) of a block
    dtype  of its scale: float32, or uint8 for the exponent of a power of two
    """

    tile: tuple[int, int]
    dtype: str


SQUARES, MX = Blocks((128, 128), "F32"), Blocks((1, 32), "U8")


def blocks_in(tensor: Tensor) -> Blocks | None:
    """How the codes of a parameter share scales; None if they are not of these kinds. Reads no number."""
    has = vars(tensor)
    codes, scales, kind = (has.get(name) for name in ("_rowwise_data", "_rowwise_scale_inv", "_fp8_dtype"))
    if not isinstance(codes, torch.Tensor) or not isinstance(scales, torch.Tensor) or tensor.dim() != 2:
        return None
    if kind is None or kind.name != _E4M3 or codes.shape != tensor.shape:
        return None
    found = None
    if has.get("_is_2D_scaled") is True:
        found = SQUARES
    elif has.get("_with_gemm_swizzled_scales") is False:
        found = MX
    if found is None or scales.dtype != torch_dtypes()[found.dtype] or scales.dim() != 2:
        return None
    enough = all(have >= need for have, need in zip(scales.shape, _counts(tensor, found), strict=True))
    return found if enough else None


def scales_in(tensor: Tensor) -> Tensor:
    """The scales of the blocks of a parameter that has them, [out/tile, in/tile], without those that pad them for a GEMM."""
    rows, columns = _counts(tensor, blocks_in(tensor))
    return vars(tensor)["_rowwise_scale_inv"].detach()[:rows, :columns]


def _counts(tensor: Tensor, blocks: Blocks) -> tuple[int, ...]:
    return tuple(-(-size // tile) for size, tile in zip(tensor.shape, blocks.tile, strict=True))
