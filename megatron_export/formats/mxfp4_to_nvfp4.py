"""NVFP4 of weights that come from MXFP4: the same values, to the bit.

Such a weight is e2m1 codes times a power of two for every 32 inputs. NVFP4's own scales would round it again: amax / (6 * 448) is
no power of two. With powers of two in both places it is only written otherwise:

    weight_scale_2  2^m, m = floor(log2(weight amax)) - 10     so that the largest block has the scale 2^8
    weight_scale    2^k of every 16 inputs, k = floor(log2(block amax)) - 2 - m: its largest value is code 4 or 6; 1 for zeros

A block is exact if k is at least -9, the least power of two in e4m3: if log2 of its amax, rounded down, is at most 17 below that
of the weight's amax. In a block below that, k is -9, and its values are rounded to the nearest codes, of which the least is
2^(m - 10): what is at most half of that becomes zero. Linears that share weight_scale_2 share m, and so this bound.

`decode` and `requantize` are those of the format; its option nvfp4_scales has no error left to make less. The codes are the
original's where a block's largest one is 4 or 6; in others the scale is smaller and the codes are larger. ModelOpt's cast (0.47,
utils/numeric_utils.py) keeps the original's codes and scales: other bytes, and the same values.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING

import torch

from ..common.piece import Amax, Piece
from . import nvfp4
from .form import Form
from .fp8 import E4M3_MAX, scale_of
from .packing import pack

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 8  # power of two of the largest block's scale
LEAST = -116  # power of two of weight_scale_2: the least value, 2^-10 times that, is a normal float32


@cache
def cast_of(form: Form) -> Form | None:
    """The format with these scales in place of its own; None for one that is not NVFP4, or whose weights are smoothed first."""
    if form.decode is not nvfp4.decode or form.smoothing:
        return None
    return replace(form, encode=partial(encode, suffixes=tuple(form.stored)))


def encode(weight: Tensor, amax: Amax, suffixes: tuple[str, ...]) -> dict[str, Piece]:
    """Quantize one linear: `weight` bfloat16 [out, in] -> the tensors of these suffixes."""
    blocks = weight.float().unflatten(1, (-1, nvfp4.BLOCK))  # [out, in/16, 16]
    tensor_scale = _power(amax.weight.float(), 2 + LARGEST, LEAST)
    block_scale = _power(blocks.abs().amax(2) / tensor_scale, 2, -9).clamp_(max=2.0**LARGEST)
    codes = nvfp4.e2m1_codes(blocks / (block_scale * tensor_scale).unsqueeze(2)).flatten(1)
    input_scale = scale_of(amax.input, nvfp4.E2M1_MAX * E4M3_MAX)
    made = nvfp4.pieces(pack(codes, dim=1), block_scale.to(torch.float8_e4m3fn), tensor_scale, input_scale)
    return {suffix: made[suffix] for suffix in suffixes}


def _power(sizes: Tensor, less: int, least: int) -> Tensor:
    """2^(floor(log2(size)) - less), not below 2^least; 1 for zero. float32 of the same shape."""
    mantissa, power = torch.frexp(sizes)  # size = mantissa * 2^power, with the mantissa from a half to 1
    bits = (power - 1 - less).clamp(
        min=least
    ) + 127 << 23  # of float32: exact on every device, as a power function may not be
    return torch.where(mantissa == 0, 1.0, bits.view(torch.float32))
