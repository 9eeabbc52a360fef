"""MXFP8: e4m3 weights in blocks of 32 along the input, whose scales are powers of two; activations likewise, as they come.

On disk, for a linear `[out, in]`, `in` a multiple of 32:

    weight        float8_e4m3fn [out, in]
    weight_scale  uint8 [out, in/32]      e8m0: the block's scale is 2^(byte - 127), not swizzled

A block's scale is the least power of two, from 2^-127, times which 448 is no less than the block's amax; byte 0 for zeros.
The byte of an element is e4m3(float32(w) / scale), one rounding to nearest even. Value: weight * scale.
Source: ModelOpt 0.47 unified checkpoint, quant_algo MXFP8; OCP Microscaling specification 1.0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..common.piece import Amax, Piece
from .e8m0 import MX_BLOCK, pieces, scales_of, spread
from .form import Arithmetic, Form, Options, Stored
from .fp8 import E4M3_MAX, rounded

if TYPE_CHECKING:
    from torch import Tensor

NAME = "mxfp8"
OPTIONS = ()


def encode(weight: Tensor, amax: Amax | None = None) -> dict[str, Piece]:
    """Quantize one linear: `weight` bfloat16 [out, in] -> the tensors above, by suffix. Of `amax`, `scales` are used."""
    blocks = weight.float().unflatten(1, (-1, MX_BLOCK))  # [out, in/32, 32]
    given = amax.scales if amax else None
    scale = scales_of(blocks.abs().amax(2), E4M3_MAX) if given is None else given
    return pieces((blocks / spread(scale)).to(torch.float8_e4m3fn).flatten(1), scale)


def decode(pieces: dict[str, Piece]) -> Tensor:
    """The float32 [out, in] weight that an engine multiplies with."""
    blocks = pieces["weight"].data.float().unflatten(1, (-1, MX_BLOCK))
    return (blocks * spread(pieces["weight_scale"].data)).flatten(1)


def requantize(weight: Tensor, pieces: dict[str, Piece]) -> Tensor:
    """A float32 [out, in] weight rounded once more with the scales on disk."""
    return rounded(weight.unflatten(1, (-1, MX_BLOCK)), spread(pieces["weight_scale"].data)).flatten(1)


def round_inputs(values: Tensor, scale: None = None) -> Tensor:
    """Values as MXFP8 holds them in blocks of 32 of the last dim, in float32."""
    return decode(encode(values.flatten(0, -2))).view(values.shape)


FORM = Form(
    name=NAME,
    tile=(1, MX_BLOCK),
    ragged=False,
    stored={"weight": Stored("F8_E4M3", 1, 1), "weight_scale": Stored("U8", 1, MX_BLOCK)},
    encode=encode,
    decode=decode,
    requantize=requantize,
    quantization={"quant_algo": "MXFP8", "group_size": MX_BLOCK},
    numbers=None,
    native=None,
    arithmetic=Arithmetic(round_inputs, "F32"),
    least_snr=20.0,
    latent=False,
    stack=None,
    no_experts="",
    smoothing=None,
)


def form(options: Options) -> Form:
    """The format; it has no options."""
    return FORM
