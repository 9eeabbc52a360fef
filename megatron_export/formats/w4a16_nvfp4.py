"""W4A16_NVFP4: the weights of NVFP4; inputs stay in bfloat16, so nothing is measured.

On disk, for a linear `[out, in]`, `in` a multiple of 16: `weight`, `weight_scale` and `weight_scale_2` of nvfp4.py, to the byte,
and no `input_scale`. Source: ModelOpt 0.47 unified checkpoint, quant_algo W4A16_NVFP4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..common.piece import Amax, Piece
from . import nvfp4
from .form import AS_HF, Arithmetic, Form, Options, not_rounded

if TYPE_CHECKING:
    from torch import Tensor

NAME = "w4a16_nvfp4"
OPTIONS = nvfp4.OPTIONS


def encode(weight: Tensor, amax: Amax, scales: str = "max") -> dict[str, Piece]:
    """Quantize one linear: `weight` bfloat16 [out, in] -> the tensors above, by suffix."""
    return weights_of(nvfp4.encode(weight, amax, scales))


def weights_of(pieces: dict[str, Piece]) -> dict[str, Piece]:
    """The pieces of nvfp4 without that of the inputs."""
    return {suffix: piece for suffix, piece in pieces.items() if suffix != "input_scale"}


FORM = Form(
    name=NAME,
    tile=nvfp4.FORM.tile,
    ragged=False,
    stored={suffix: one for suffix, one in nvfp4.FORM.stored.items() if suffix != "input_scale"},
    encode=encode,
    decode=nvfp4.decode,
    requantize=nvfp4.requantize,
    quantization={"quant_algo": "W4A16_NVFP4", "group_size": nvfp4.BLOCK},
    numbers=nvfp4.FORM.numbers,
    native=None,
    arithmetic=Arithmetic(not_rounded, "BF16"),
    least_snr=nvfp4.FORM.least_snr,
    latent=False,
    stack=AS_HF,
    no_experts="",
    smoothing=None,
)


def form(options: Options) -> Form:
    """The format, with the scales that are asked for."""
    return nvfp4.with_scales(FORM, options.nvfp4_scales)
