"""FP8_PC_PT: e4m3 weights with one scale per row (per channel); e4m3 activations with one scale per token, as they come.

On disk, for a linear `[out, in]`:

    weight        float8_e4m3fn [out, in]
    weight_scale  float32 [out]    row amax / 448; 1 for a row of zeros

The byte of an element is e4m3(float32(w) / scale), one rounding to nearest even. Value: weight * scale of its row.
Source: ModelOpt 0.47 unified checkpoint, quant_algo FP8_PER_CHANNEL_PER_TOKEN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..common.piece import Amax, Axis, Piece
from .form import WHOLE_ROW, Arithmetic, Form, Options, Stored
from .fp8 import E4M3_MAX, rounded, scale_of

if TYPE_CHECKING:
    from torch import Tensor

NAME = "fp8_pc_pt"
OPTIONS = ()


def encode(weight: Tensor, amax: Amax | None = None) -> dict[str, Piece]:
    """Quantize one linear: `weight` bfloat16 [out, in] -> the tensors above, by suffix. `amax` is not needed."""
    scale = scale_of(weight.abs().amax(1).float())
    scaled = (weight.float() / scale.unsqueeze(1)).clamp_(-E4M3_MAX, E4M3_MAX)
    return pieces(scaled.to(torch.float8_e4m3fn), scale)


def pieces(codes: Tensor, scale: Tensor) -> dict[str, Piece]:
    """The tensors above, by suffix."""
    return {"weight": Piece(codes, (Axis.OUT, Axis.IN)), "weight_scale": Piece(scale, (Axis.OUT,))}


def decode(pieces: dict[str, Piece]) -> Tensor:
    """The float32 [out, in] weight that an engine multiplies with."""
    return pieces["weight"].data.float() * pieces["weight_scale"].data.unsqueeze(1)


def requantize(weight: Tensor, pieces: dict[str, Piece]) -> Tensor:
    """A float32 [out, in] weight rounded once more with the scales on disk."""
    return rounded(weight, pieces["weight_scale"].data.unsqueeze(1))


def round_inputs(values: Tensor, scale: None = None) -> Tensor:
    """Values as e4m3 holds them under a scale of their own for every token, in float32."""
    return rounded(values, scale_of(values.abs().amax(-1, keepdim=True).float()))


FORM = Form(
    name=NAME,
    tile=(1, WHOLE_ROW),
    ragged=True,
    stored={"weight": Stored("F8_E4M3", 1, 1), "weight_scale": Stored("F32", 1)},
    encode=encode,
    decode=decode,
    requantize=requantize,
    quantization={"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
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
