"""FP8: e4m3 weights with one scale per tensor, e4m3 activations with one scale per tensor.

On disk, for a linear `[out, in]`:

    weight        float8_e4m3fn [out, in]
    weight_scale  float32 []     weight amax / 448
    input_scale   float32 []     input amax / 448

The byte of an element is e4m3(bfloat16(float32(w) / weight_scale)): two roundings, each to nearest even, as ModelOpt
does on the CPU; the quotient saturates at +-448. An amax of zero is replaced by 448, so that its scale is 1.
`weight_scale` is shared by the linears that engines fuse (q, k, v; gate, up). Value: weight * weight_scale.
Source: ModelOpt 0.47 unified checkpoint, quant_algo FP8.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from ..common.piece import Amax, Axis, Piece
from .form import AS_HF, ONE_NUMBER, Arithmetic, Form, Options, Stored

if TYPE_CHECKING:
    from torch import Tensor

NAME = "fp8"
OPTIONS = ()

E4M3_MAX = 448.0


def scale_of(amax: Tensor, largest: float = E4M3_MAX) -> Tensor:
    """amax / largest in float32, of any shape; 1 where amax is zero."""
    # By a tensor: CUDA divides by a number through its reciprocal, and the last bit differs from the CPU's.
    divisor = torch.full_like(amax, largest, dtype=torch.float32)
    return torch.where(amax == 0, divisor, amax.float()) / divisor


def encode(weight: Tensor, amax: Amax) -> dict[str, Piece]:
    """Quantize one linear: `weight` bfloat16 [out, in] -> the tensors above, by suffix."""
    scale = scale_of(amax.weight)
    return pieces(codes_of(weight, scale), scale, scale_of(amax.input))


def codes_of(weight: Tensor, scale: Tensor) -> Tensor:
    """The e4m3 codes of a weight of any float dtype under a float32 scale []."""
    return (weight.float() / scale).to(torch.bfloat16).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def pieces(codes: Tensor, scale: Tensor, input_scale: Tensor) -> dict[str, Piece]:
    """The tensors above, by suffix."""
    return {
        "weight": Piece(codes, (Axis.OUT, Axis.IN)),
        "weight_scale": Piece(scale, ()),
        "input_scale": Piece(input_scale, ()),
    }


def decode(pieces: dict[str, Piece]) -> Tensor:
    """The float32 [out, in] weight that an engine multiplies with."""
    return e4m3_values(pieces["weight"].data).mul_(pieces["weight_scale"].data)


def requantize(weight: Tensor, pieces: dict[str, Piece]) -> Tensor:
    """A float32 [out, in] weight rounded once more with the scale on disk."""
    scale = pieces["weight_scale"].data
    return e4m3_values(codes_of(weight, scale)).mul_(scale)


def rounded(values: Tensor, scale: Tensor) -> Tensor:
    """Values as e4m3 holds them under scales that broadcast to them, in float32."""
    return e4m3_values((values.float() / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)).mul_(scale)


def e4m3_values(codes: Tensor) -> Tensor:
    """What float8_e4m3fn numbers are in float32, in memory of their own; on a CPU from a table, which takes a fifth of the time."""
    if codes.device.type != "cpu":
        return codes.float()
    return _e4m3().index_select(0, codes.view(torch.uint8).flatten().int()).view(codes.shape)


@cache
def _e4m3() -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


FORM = Form(
    name=NAME,
    tile=(1, 1),
    ragged=False,
    stored={"weight": Stored("F8_E4M3", 1, 1), "weight_scale": ONE_NUMBER, "input_scale": ONE_NUMBER},
    encode=encode,
    decode=decode,
    requantize=requantize,
    quantization={"quant_algo": "FP8"},
    numbers={"dynamic": False, "num_bits": 8, "type": "float"},
    native=None,
    arithmetic=Arithmetic(rounded, "F32"),
    least_snr=20.0,
    latent=False,
    stack=AS_HF,
    no_experts="",
    smoothing=None,
)


def form(options: Options) -> Form:
    """The format; it has no options."""
    return FORM
