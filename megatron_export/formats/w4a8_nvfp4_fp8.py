"""W4A8_NVFP4_FP8: e2m1 weights in blocks of 32 along the input, which the kernel decodes to e4m3; e4m3 activations.

On disk, for a linear `[out, in]`, `in` a multiple of 32:

    weight          uint8 [out, in/2]           as nvfp4.py
    weight_scale    float8_e4m3fn [out, in/32]  per block, not swizzled
    weight_scale_2  float32 []                  weight amax / 448: that of the e4m3 numbers that the codes become
    input_scale     float32 []                  input amax / 448

Block scales and codes are made as those of nvfp4.py, with this weight_scale_2: the largest block scale is 448 / 6, and e2m1 *
weight_scale fits e4m3, to which it is rounded. Value: e4m3(e2m1 * weight_scale) * weight_scale_2.
Source: ModelOpt 0.47 unified checkpoint, quant_algo W4A8_NVFP4_FP8; TensorRT-LLM's W4A8NVFP4FP8LinearMethod.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..common.piece import Amax, Piece
from . import nvfp4
from .form import ONE_NUMBER, Arithmetic, Form, Options, Stored
from .fp8 import rounded, scale_of
from .packing import pack, unpack

if TYPE_CHECKING:
    from torch import Tensor

NAME = "w4a8_nvfp4_fp8"
BLOCK = 32
OPTIONS = ()


def encode(weight: Tensor, amax: Amax) -> dict[str, Piece]:
    """Quantize one linear: `weight` bfloat16 [out, in] -> the tensors above, by suffix."""
    blocks = weight.float().unflatten(1, (-1, BLOCK))  # [out, in/32, 32]
    tensor_scale = scale_of(amax.weight)
    block_scale = nvfp4.block_scales(blocks, tensor_scale)
    codes = nvfp4.e2m1_codes(blocks / (block_scale.float() * tensor_scale).unsqueeze(2)).flatten(1)
    return nvfp4.pieces(pack(codes, dim=1), block_scale, tensor_scale, scale_of(amax.input))


def decode(pieces: dict[str, Piece]) -> Tensor:
    """The float32 [out, in] weight that an engine multiplies with."""
    return _values(unpack(pieces["weight"].data, dim=1).unflatten(1, (-1, BLOCK)), pieces)


def requantize(weight: Tensor, pieces: dict[str, Piece]) -> Tensor:
    """A float32 [out, in] weight rounded once more, twice, with the scales on disk."""
    return _values(nvfp4.e2m1_codes(weight.unflatten(1, (-1, BLOCK)) / nvfp4.scales_in(pieces)), pieces)


def _values(codes: Tensor, pieces: dict[str, Piece]) -> Tensor:
    """uint8 codes [out, in/32, 32] -> what they stand for, float32 [out, in]."""
    decoded = nvfp4.values_of(codes, pieces["weight_scale"].data.float().unsqueeze(2))
    return rounded(decoded, torch.ones_like(decoded[:1, :1])) * pieces["weight_scale_2"].data


FORM = Form(
    name=NAME,
    tile=(1, BLOCK),
    ragged=False,
    stored={
        "weight": Stored("U8", 1, 2),
        "weight_scale": Stored("F8_E4M3", 1, BLOCK),
        "weight_scale_2": ONE_NUMBER,
        "input_scale": ONE_NUMBER,
    },
    encode=encode,
    decode=decode,
    requantize=requantize,
    quantization={"quant_algo": "W4A8_NVFP4_FP8", "group_size": BLOCK},
    numbers=None,
    native=None,
    arithmetic=Arithmetic(rounded, "F32"),
    least_snr=10.0,
    latent=False,
    stack=None,
    no_experts="",
    smoothing=None,
)


def form(options: Options) -> Form:
    """The format; it has no options."""
    return FORM
