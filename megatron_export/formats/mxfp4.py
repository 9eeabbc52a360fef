"""MXFP4: e2m1 weights in blocks of 32 along the input, whose scales are powers of two; inputs stay in bfloat16.

On disk, for a linear `[out, in]`, `in` a multiple of 32:

    weight        uint8 [out, in/2]   element 2c in the low nibble, 2c+1 in the high nibble
    weight_scale  uint8 [out, in/32]  e8m0: the block's scale is 2^(byte - 127), not swizzled

A block's scale is the least power of two, from 2^-127, times which 6 is no less than the block's amax; byte 0 for zeros.
The code of an element is e2m1(float32(w) / scale), with magnitudes as in nvfp4.py; but ties go towards zero, and codes of all that
is not above zero have bit 8 set: 0 is code 8. Value: e2m1 * scale.
OpenAI's GPT-OSS has the same numbers, 16 bytes and a scale for a block, in tensors that it names *_blocks and *_scales.
Source: ModelOpt 0.47 unified checkpoint, quant_algo mxfp4; OCP Microscaling specification 1.0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..common.piece import Amax, Piece
from . import nvfp4
from .e8m0 import MX_BLOCK, pieces, scales_of, spread
from .form import Arithmetic, Form, Options, Stored, not_rounded
from .packing import pack

if TYPE_CHECKING:
    from torch import Tensor

NAME = "mxfp4"
OPTIONS = ()
_MIDPOINTS = (0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # but the first, 0.25


def codes_of(scaled: Tensor) -> Tensor:
    """Round float32 values to e2m1 codes, uint8 of the same shape: the code is the number of midpoints below."""
    size = scaled.abs()
    code = (size > 0.25).to(torch.uint8)
    for midpoint in _MIDPOINTS:
        code += size > midpoint
    return code + (scaled <= 0).to(torch.uint8) * 8


def encode(weight: Tensor, amax: Amax | None = None) -> dict[str, Piece]:
    """Quantize one linear: `weight` bfloat16 [out, in] -> the tensors above, by suffix. `amax` is not needed."""
    blocks = weight.float().unflatten(1, (-1, MX_BLOCK))  # [out, in/32, 32]
    scale = scales_of(blocks.abs().amax(2), nvfp4.E2M1_MAX)
    return pieces(pack(codes_of(blocks / spread(scale)).flatten(1), dim=1), scale)


def decode(pieces: dict[str, Piece]) -> Tensor:
    """The float32 [out, in] weight that an engine multiplies with."""
    values = nvfp4.unpacked(pieces["weight"].data).unflatten(1, (-1, MX_BLOCK))
    return (values * spread(pieces["weight_scale"].data)).flatten(1)


def requantize(weight: Tensor, pieces: dict[str, Piece]) -> Tensor:
    """A float32 [out, in] weight rounded once more with the scales on disk."""
    scale = spread(pieces["weight_scale"].data)
    return nvfp4.values_of(codes_of(weight.unflatten(1, (-1, MX_BLOCK)) / scale), scale)


FORM = Form(
    name=NAME,
    tile=(1, MX_BLOCK),
    ragged=False,
    stored={"weight": Stored("U8", 1, 2), "weight_scale": Stored("U8", 1, MX_BLOCK)},
    encode=encode,
    decode=decode,
    requantize=requantize,
    quantization={"quant_algo": "MXFP4", "group_size": MX_BLOCK},
    numbers=None,
    native=None,
    arithmetic=Arithmetic(not_rounded, "BF16"),
    least_snr=10.0,
    latent=False,
    stack=None,
    no_experts="",
    smoothing=None,
)


def form(options: Options) -> Form:
    """The format; it has no options."""
    return FORM
