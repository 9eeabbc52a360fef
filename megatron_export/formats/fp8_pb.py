"""FP8_PB: e4m3 weights with one scale per block of 128x128; activations are quantized by the engine as they come.

On disk, for a linear `[out, in]` of any size, the last block of a row or column being as wide as what is left:

    weight            float8_e4m3fn [out, in]
    weight_scale_inv  float32 [ceil(out/128), ceil(in/128)]         block amax / 448: what a value is multiplied with

The byte of an element is e4m3(float32(w) / scale), one rounding to nearest even. A block of zeros gets scale 1.
Value: weight * scale of its block. This is the spelling of DeepSeek's own checkpoints, which vLLM, SGLang and
TensorRT-LLM all read, dense and MoE. ModelOpt's spelling, on request, has the same numbers as

    weight_scale      float32 [ceil(out/128), 1, ceil(in/128), 1]   also for a single block, where ModelOpt drops the dims

under quant_algo FP8_PB_WO. Source: ModelOpt 0.47 unified checkpoint, fp8_pb_wo; DeepSeek-V3's inference code.
"""

from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..common.piece import Amax, Axis, Piece
from .form import Form, Options
from .fp8 import E4M3_MAX, scale_of

NAME = "fp8_pb"
BLOCK = 128
OPTIONS = ("fp8_pb_spelling",)
NATIVE_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}


def encode(weight: Tensor, amax: Amax | None = None, native: bool = True) -> dict[str, Piece]:
    """Quantize one linear: `weight` bfloat16 [out, in] -> the tensors above, by suffix. `amax` is not needed."""
    out, columns = weight.shape
    padded = pad(weight.float(), (0, -columns % BLOCK, 0, -out % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [out/128, 128, in/128, 128]
    scale = scale_of(blocks.abs().amax(dim=(1, 3), keepdim=True))
    scaled = (blocks / scale).clamp_(-E4M3_MAX, E4M3_MAX).flatten(2).flatten(0, 1)[:out, :columns]
    return pieces(scaled.to(torch.float8_e4m3fn), scale, native)


def pieces(codes: Tensor, scale: Tensor, native: bool) -> dict[str, Piece]:
    """The tensors above, by suffix; `scale` as in ModelOpt's spelling."""
    suffix, axes = (
        ("weight_scale_inv", (Axis.OUT, Axis.IN)) if native else ("weight_scale", (Axis.OUT, None, Axis.IN, None))
    )
    return {
        "weight": Piece(codes, (Axis.OUT, Axis.IN)),
        suffix: Piece(scale[:, 0, :, 0] if native else scale, axes),
    }


def decode(pieces: dict[str, Piece]) -> Tensor:
    """The float32 [out, in] weight that an engine multiplies with, from either spelling."""
    weight = pieces["weight"].data.float()
    scale = (pieces.get("weight_scale_inv") or pieces["weight_scale"]).data
    scale = scale.reshape(-(-weight.shape[0] // BLOCK), -(-weight.shape[1] // BLOCK))
    whole = scale.repeat_interleave(BLOCK, dim=0).repeat_interleave(BLOCK, dim=1)
    return weight * whole[: weight.shape[0], : weight.shape[1]]


@cache
def form(options: Options) -> Form:
    """The format in the spelling `options.fp8_pb_spelling`: "native" or "modelopt"."""
    native = options.fp8_pb_spelling == "native"
    algorithm = {"quant_algo": "FP8_BLOCK_SCALES", "group_size": BLOCK} if native else {"quant_algo": "FP8_PB_WO"}
    return Form(
        name=NAME,
        tile=(BLOCK, BLOCK),
        encode=partial(encode, native=native),
        decode=decode,
        quantization=algorithm,
        stackable=False,
        activations=False,
        ragged=True,
        native=NATIVE_CONFIG if native else None,
    )
