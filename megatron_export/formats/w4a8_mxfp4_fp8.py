"""W4A8_MXFP4_FP8: the weights of MXFP4; e4m3 activations with one scale for all that come together, which nothing measures before.

On disk, for a linear `[out, in]`, `in` a multiple of 32: `weight` and `weight_scale` of mxfp4.py, to the byte.
Source: ModelOpt 0.47 unified checkpoint, quant_algo W4A8_MXFP4_FP8, which has no input_scale; TensorRT-LLM's
W4A8MXFP4FP8LinearMethod, which takes the amax of its input.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from . import mxfp4
from .form import Arithmetic, Form, Options
from .fp8 import rounded, scale_of

if TYPE_CHECKING:
    from torch import Tensor

NAME = "w4a8_mxfp4_fp8"
OPTIONS = ()


def round_inputs(values: Tensor, scale: None = None) -> Tensor:
    """Values as e4m3 holds them under one scale for all of them, in float32."""
    return rounded(values, scale_of(values.abs().amax()))


FORM = replace(
    mxfp4.FORM,
    name=NAME,
    quantization={"quant_algo": "W4A8_MXFP4_FP8", "group_size": mxfp4.MX_BLOCK},
    arithmetic=Arithmetic(round_inputs, "F32"),
)


def form(options: Options) -> Form:
    """The format; it has no options."""
    return FORM
