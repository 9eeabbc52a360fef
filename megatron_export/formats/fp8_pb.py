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

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING

import torch

from ..common.piece import Amax, Axis, Piece
from .form import Arithmetic, Form, Native, Options, Stored
from .fp8 import E4M3_MAX, rounded, scale_of

if TYPE_CHECKING:
    from torch import Tensor

NAME = "fp8_pb"
BLOCK = 128
OPTIONS = ("fp8_pb_spelling",)
DIALECT = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
NATIVE = Native(DIALECT, sign="weight_block_size")


def encode(weight: Tensor, amax: Amax | None = None, native: bool = True) -> dict[str, Piece]:
    """Quantize one linear: `weight` bfloat16 [out, in] -> the tensors above, by suffix. Of `amax`, `scales` are used."""
    out, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % BLOCK, 0, -out % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [out/128, 128, in/128, 128]
    given = amax.scales if amax else None
    scale = scale_of(blocks.abs().amax(dim=(1, 3), keepdim=True)) if given is None else given[:, None, :, None]
    scaled = (blocks / scale).clamp_(-E4M3_MAX, E4M3_MAX).flatten(2).flatten(0, 1)[:out, :columns]
    return pieces(scaled.to(torch.float8_e4m3fn), scale, native)


def pieces(codes: Tensor, scale: Tensor, native: bool) -> dict[str, Piece]:
    """The tensors above, by suffix; `scale` as in ModelOpt's spelling."""
    made = {"weight": Piece(codes, (Axis.OUT, Axis.IN))}
    if native:
        return made | {"weight_scale_inv": Piece(scale[:, 0, :, 0], (Axis.OUT, Axis.IN))}
    return made | {"weight_scale": Piece(scale, (Axis.OUT, None, Axis.IN, None))}


def decode(pieces: dict[str, Piece]) -> Tensor:
    """The float32 [out, in] weight that an engine multiplies with, from either spelling."""
    weight = pieces["weight"].data.float()
    return weight * _spread(pieces, weight.shape)


def requantize(weight: Tensor, pieces: dict[str, Piece]) -> Tensor:
    """A float32 [out, in] weight rounded once more with the scales on disk, of either spelling."""
    return rounded(weight, _spread(pieces, weight.shape))


def _spread(pieces: dict[str, Piece], shape: torch.Size) -> Tensor:
    """The scale of each element of a weight of that shape, float32 [out, in]."""
    scale = (pieces.get("weight_scale_inv") or pieces["weight_scale"]).data
    scale = scale.reshape(-(-shape[0] // BLOCK), -(-shape[1] // BLOCK))
    return scale.repeat_interleave(BLOCK, dim=0).repeat_interleave(BLOCK, dim=1)[: shape[0], : shape[1]]


def round_inputs(values: Tensor, scale: None = None) -> Tensor:
    """Values as e4m3 holds them under a scale of their own for every 128 of the last dim, in float32."""
    size = values.shape[-1]
    groups = torch.nn.functional.pad(values.float(), (0, -size % BLOCK)).unflatten(-1, (-1, BLOCK))
    return rounded(groups, scale_of(groups.abs().amax(dim=-1, keepdim=True))).flatten(-2)[..., :size]


@cache
def form(options: Options) -> Form:
    """The format in the spelling `options.fp8_pb_spelling`: "native" or "modelopt"."""
    native = options.fp8_pb_spelling == "native"
    algorithm = {"quant_algo": "FP8_BLOCK_SCALES", "group_size": BLOCK} if native else {"quant_algo": "FP8_PB_WO"}
    scale = {f"weight_scale{'_inv' * native}": Stored("F32", BLOCK, BLOCK, spaced=not native)}
    return Form(
        name=NAME,
        tile=(BLOCK, BLOCK),
        ragged=True,
        stored={"weight": Stored("F8_E4M3", 1, 1)} | scale,
        encode=partial(encode, native=native),
        decode=decode,
        requantize=requantize,
        quantization=algorithm,
        numbers=None,
        native=NATIVE if native else None,
        arithmetic=Arithmetic(round_inputs, "F32"),
        least_snr=20.0,
        latent=True,
        stack=None,
        no_experts="" if native else "--fp8-pb-spelling modelopt: no engine loads experts in that spelling. Use native",
        smoothing=None,
    )
