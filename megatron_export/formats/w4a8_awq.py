"""W4A8_AWQ: the weights of INT4_AWQ, multiplied in FP8 with e4m3 activations.

On disk, for a linear `[out, in]`, `out` even, `in` a multiple of the group (128, or 64):

    weight           uint8 [out/2, in]         see int4.py
    weight_scale     float32 [out, in/group]   see int4.py
    weight_scale_2   float32 []                amax of the smoothed, unquantized weight / 448
    input_scale      float32 []                amax of the smoothed input / 448
    pre_quant_scale  bfloat16 [in]             as in int4_awq.py

The consumer multiplies with e4m3(code * weight_scale / weight_scale_2), and the product with weight_scale_2 *
input_scale; both scalars are shared by the linears that engines fuse. An amax of zero gives scale 1.
Source: ModelOpt 0.47 unified checkpoint, quant_algo W4A8_AWQ.
"""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING

from ..common.piece import Amax, Piece
from . import int4
from .form import Arithmetic, Form, Options
from .fp8 import rounded, scale_of

if TYPE_CHECKING:
    from torch import Tensor

NAME = "w4a8_awq"
OPTIONS = ("group_size", "awq_clip")


def encode(weight: Tensor, amax: Amax, group: int) -> dict[str, Piece]:
    """Quantize one linear: `weight` bfloat16 [out, in] -> the tensors above but for pre_quant_scale, by suffix."""
    return int4.encode(weight, amax, group) | scalars(amax)


def scalars(amax: Amax) -> dict[str, Piece]:
    """What this format has beside int4's tensors, by suffix."""
    return scalar_pieces(scale_of(amax.weight), scale_of(amax.input))


def scalar_pieces(weight_scale: Tensor, input_scale: Tensor) -> dict[str, Piece]:
    """Both scales, float32 [], by suffix."""
    return {"weight_scale_2": Piece(weight_scale, ()), "input_scale": Piece(input_scale, ())}


def decode(pieces: dict[str, Piece]) -> Tensor:
    """The float32 [out, in] weight that an engine multiplies with: the second stage rounds to e4m3."""
    return rounded(int4.decode(pieces), pieces["weight_scale_2"].data)


def requantize(weight: Tensor, pieces: dict[str, Piece]) -> Tensor:
    """A float32 [out, in] weight rounded once more, twice, with the scales on disk."""
    return rounded(int4.requantize(weight, pieces), pieces["weight_scale_2"].data)


@cache
def form(options: Options) -> Form:
    """The format for groups of `options.group_size`."""
    return int4.awq_form(
        NAME,
        "W4A8_AWQ",
        options,
        ("weight_scale_2", "input_scale"),
        encode=partial(encode, group=options.group_size),
        decode=decode,
        requantize=requantize,
        arithmetic=Arithmetic(rounded, "F32"),
    )
