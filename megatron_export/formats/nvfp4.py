"""NVFP4: e2m1 weights in blocks of 16 along the input, e4m3 block scales, one float32 scale per tensor.

On disk, for a linear `[out, in]`, `in` a multiple of 16:

    weight          uint8 [out, in/2]           element 2c in the low nibble, 2c+1 in the high nibble
    weight_scale    float8_e4m3fn [out, in/16]  per block, not swizzled
    weight_scale_2  float32 []                  weight amax / (6 * 448)
    input_scale     float32 []                  input amax / (6 * 448)

A block's scale is e4m3(block amax / (6 * weight_scale_2)), 1 for a block of zeros, never below 2^-9 nor above 448.
The code of an element is e2m1(float32(w) / (float32(weight_scale) * weight_scale_2)): magnitudes 0 .5 1 1.5 2 3 4 6
are codes 0 to 7, ties go to the even code, larger values to 6, and codes of negative elements have bit 8 set (a small
negative becomes -0, code 8). An amax of zero is replaced by 6 * 448, so that its scale is 1.
`weight_scale_2` is shared by the linears that engines fuse (q, k, v; gate, up): block scales depend on it, so it is
agreed before they are computed. Value: e2m1 * weight_scale * weight_scale_2.

Source: ModelOpt 0.47 unified checkpoint, quant_algo NVFP4; e2m1 as in the OCP Microscaling specification 1.0.

The option nvfp4_scales puts other numbers in the same tensors. Each block takes the scale of the least sum of squared errors:

    mse            of all e4m3 numbers from 2^-9 to 448; of equal sums, the smallest
    four_over_six  of e4m3(x / weight_scale_2) with x = amax / 6 and x = amax / 4, so that its largest value becomes 6 or 4;
                   of equal sums, the first. weight_scale_2 is weight amax / (6 * 256), as the second is 1.5 times the first

An error is (|w| - e2m1(|w| / s) * s)^2 in float32. Those of elements k and k + 8 are added, then these eight one after another.
s is what ModelOpt rounds with while it searches. Its last bits are not those of weight_scale * weight_scale_2, and decide, for
many sums are equal otherwise. With f = (1 / u) * 448 and u = weight amax / 6, it is e4m3 * (1 / f) for mse. For four_over_six u
is multiplied by 448 / 256, and s is e4m3(x * f) * (1 / f), which may be zero. Blocks of zeros get 2^-9 from mse, and from
four_over_six min(1 / weight_scale_2, 448). For weights below 2^-24 ModelOpt takes another f, and so finds nothing; we do not.
Source: ModelOpt 0.47 on the CPU, presets nvfp4_w4a4_weight_mse_fp8_sweep and nvfp4_four_over_six: quantization/calib/mse.py,
compute_fp4_scales in kernels/quantization/gemm/fp4_kernel.py, quantization/qtensor/nvfp4_tensor.py.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING

import torch

from ..common.piece import Amax, Axis, Piece
from .cpu import above, below_zero, divided, in_float32, largest, magnitudes
from .form import AS_HF, ONE_NUMBER, Arithmetic, Form, Options, Stored
from .fp8 import E4M3_MAX, scale_of
from .packing import pack

if TYPE_CHECKING:
    from torch import Tensor

NAME = "nvfp4"
BLOCK = 16
OPTIONS = ("nvfp4_scales",)

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = 6.0
E4M3_TINY = 2.0**-9
LARGEST_SCALE = {"max": E4M3_MAX, "mse": E4M3_MAX, "four_over_six": 256.0}  # of the block with the largest value


def e2m1_codes(scaled: Tensor) -> Tensor:
    """Round float32 values to e2m1 codes, uint8 of the same shape: the code is the number of midpoints below."""
    code = above(magnitudes(scaled), (0.25, 1.25, 2.5, 5.0), at=(0.75, 1.75, 3.5))
    return code.add_(below_zero(scaled), alpha=8)


def block_scales(blocks: Tensor, tensor_scale: Tensor) -> Tensor:
    """The e4m3 scale of each block of a bfloat16 or float32 [out, in/16, 16] weight: [out, in/16]."""
    scale = largest(blocks) / (E2M1_MAX * tensor_scale)
    return torch.where(scale == 0, 1.0, scale).clamp_(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn)


def search_units(amax: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """f of the docstring, and 1 / f, float32 [], of the weight's amax and the largest scale of its blocks."""
    one, three = torch.ones_like(amax, dtype=torch.float32), torch.full_like(amax, 3.0, dtype=torch.float32)
    amax = torch.where(amax == 0, E2M1_MAX * largest, amax.float())
    factor = one / (amax * (E4M3_MAX / largest / 2) / three) * E4M3_MAX  # halves, so that nothing overflows
    return factor, one / factor


def nearest(scaled: Tensor) -> Tensor:
    """float32 numbers rounded to e2m1 values in place; ties go to the even code."""
    step = scaled.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32).clamp_(1, 4).mul_(0.5)
    return scaled.div_(step).round_().mul_(step).clamp_(-E2M1_MAX, E2M1_MAX)


def _loss(size: Tensor, scale: Tensor) -> Tensor:
    """Sum of squared errors of each block, [out, in/16], of magnitudes [out, in/16, 16] under scales that may be zero."""
    scale = scale.unsqueeze(2)
    error = nearest(size / torch.where(scale == 0, 1.0, scale)).mul_(scale).sub_(size)
    squares = error.mul_(error)
    total, *others = (squares[..., :8] + squares[..., 8:]).unbind(2)
    for other in others:
        total = total + other
    return total


def four_over_six(size: Tensor, amax: Tensor, tensor_scale: Tensor) -> Tensor:
    """The e4m3 scales that make the largest of each block's magnitudes 6, or 4 where that has the lesser error."""
    (factor, inverse), largest = search_units(amax, LARGEST_SCALE["four_over_six"]), size.amax(2)
    made, losses = [], []
    for scale in (largest / torch.full_like(largest, E2M1_MAX), largest * 0.25):
        losses.append(_loss(size, (scale * factor).clamp_(max=E4M3_MAX).to(torch.float8_e4m3fn).float() * inverse))
        made.append((torch.where(scale == 0, 1.0, scale) / tensor_scale).clamp_(E4M3_TINY, E4M3_MAX))
    return torch.where(losses[1] < losses[0], made[1], made[0]).to(torch.float8_e4m3fn)


def least_squares(size: Tensor, amax: Tensor, tensor_scale: Tensor) -> Tensor:
    """The e4m3 scales of least error, of all that there are, for the magnitudes of each block.

    Sixteen are tried. Let s be the smallest scale under which no value of the block is beyond 6. What a scale of 2 * t can hold up
    to 6 * s, t can hold too, so that from 2 * s on none is better. Below 0.54 * s the largest value, which is above 5.33 * s,
    loses more than 15 others can gain. Between are the 8 codes before that of s, and 8 from it on; near 2^-9, the first 15.
    """
    (factor, inverse), largest = search_units(amax, LARGEST_SCALE["mse"]), size.amax(2)

    def scale_of_code(code: Tensor) -> Tensor:
        return code.to(torch.uint8).view(torch.float8_e4m3fn).float() * inverse

    guess = (largest / torch.full_like(largest, E2M1_MAX) * factor).clamp_(max=E4M3_MAX).to(torch.float8_e4m3fn)
    code = guess.view(torch.uint8).int()
    first = (code + (scale_of_code(code) * E2M1_MAX < largest)).clamp_(8, 119) - 8
    best, chosen = torch.full_like(largest, torch.inf), first
    for step in range(16):
        code = (first + step).clamp_(min=1)
        loss = _loss(size, scale_of_code(code))
        better = loss < best
        best, chosen = torch.where(better, loss, best), torch.where(better, code, chosen)
    return chosen.clamp_(min=1).to(torch.uint8).view(torch.float8_e4m3fn)


SEARCHES = {"mse": least_squares, "four_over_six": four_over_six}


def rounded(weight: Tensor, amax: Tensor) -> Tensor:
    """`decode(encode(weight))` in bfloat16, without making codes: what a search runs many times."""
    blocks = weight.float().unflatten(1, (-1, BLOCK))
    tensor_scale = scale_of(amax, E2M1_MAX * E4M3_MAX)
    scale = (block_scales(blocks, tensor_scale).float() * tensor_scale).unsqueeze(2)
    return nearest(blocks.div_(scale)).mul_(scale).flatten(1).to(torch.bfloat16)


def encode(weight: Tensor, amax: Amax, scales: str = "max") -> dict[str, Piece]:
    """Quantize one linear: `weight` bfloat16 [out, in] -> the tensors above, by suffix."""
    tensor_scale = scale_of(amax.weight, E2M1_MAX * LARGEST_SCALE[scales])
    if scales != "max":  # before the blocks of their own take memory
        block_scale = SEARCHES[scales](weight.abs().float().unflatten(1, (-1, BLOCK)), amax.weight, tensor_scale)
    blocks = in_float32(weight).unflatten(1, (-1, BLOCK))  # [out, in/16, 16]
    if scales == "max":
        block_scale = block_scales(weight.unflatten(1, (-1, BLOCK)), tensor_scale)
    codes = e2m1_codes(divided(blocks, (block_scale.float() * tensor_scale).unsqueeze(2))).flatten(1)
    return pieces(pack(codes, dim=1), block_scale, tensor_scale, scale_of(amax.input, E2M1_MAX * E4M3_MAX))


def pieces(packed: Tensor, block_scale: Tensor, tensor_scale: Tensor, input_scale: Tensor) -> dict[str, Piece]:
    """The tensors above, by suffix."""
    return {
        "weight": Piece(packed, (Axis.OUT, Axis.IN)),
        "weight_scale": Piece(block_scale, (Axis.OUT, Axis.IN)),
        "weight_scale_2": Piece(tensor_scale, ()),
        "input_scale": Piece(input_scale, ()),
    }


def decode(pieces: dict[str, Piece]) -> Tensor:
    """The float32 [out, in] weight that an engine multiplies with."""
    return (unpacked(pieces["weight"].data).unflatten(1, (-1, BLOCK)) * scales_in(pieces)).flatten(1)


def requantize(weight: Tensor, pieces: dict[str, Piece]) -> Tensor:
    """A float32 [out, in] weight rounded once more with the scales on disk."""
    scales = scales_in(pieces)
    blocks = weight.unflatten(1, (-1, BLOCK)) / torch.where(scales == 0, 1.0, scales)
    return nearest(blocks).mul_(scales).flatten(1)


def scales_in(pieces: dict[str, Piece]) -> Tensor:
    """What the codes of each block are multiplied with, float32 [out, in/16, 1]."""
    return (pieces["weight_scale"].data.float() * pieces["weight_scale_2"].data).unsqueeze(2)


def unpacked(packed: Tensor) -> Tensor:
    """The e2m1 values of codes, two in each byte of a uint8 [out, n]: float32 [out, 2 * n]."""
    both = _pairs(packed.device).index_select(0, packed.flatten().int())
    return torch.view_as_real(both).view(len(packed), -1)


@cache
def _pairs(device: torch.device) -> Tensor:
    """What each byte holds, as the two halves of a complex number."""
    values = torch.tensor((*E2M1, *(-value for value in E2M1)), device=device)
    byte = torch.arange(256, device=device)
    return torch.complex(values[byte & 15], values[byte >> 4])


def values_of(codes: Tensor, scales: Tensor) -> Tensor:
    """uint8 codes [out, blocks, block] -> what they stand for under scales [out, blocks, 1], float32 [out, in]."""
    codes = codes.int()
    values = torch.tensor(E2M1, device=codes.device)[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
    return (values * scales).flatten(1)


def round_inputs(values: Tensor, scale: Tensor) -> Tensor:
    """Values as NVFP4 holds them in blocks of 16 of the last dim, in float32.

    The scale of a block is made as it comes: e4m3(block amax / (6 * scale)), 1 for zeros.
    """
    tensor_scale = scale_of(scale * (E2M1_MAX * E4M3_MAX), E2M1_MAX * E4M3_MAX)
    blocks = values.flatten(0, -2).float().unflatten(1, (-1, BLOCK))
    scales = (block_scales(blocks, tensor_scale).float() * tensor_scale).unsqueeze(2)
    return nearest(blocks / scales).mul_(scales).view(values.shape)


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
    quantization={"quant_algo": "NVFP4", "group_size": BLOCK},
    numbers={"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK},
    native=None,
    arithmetic=Arithmetic(round_inputs, "F32"),
    least_snr=10.0,
    latent=False,
    stack=AS_HF,
    no_experts="",
    smoothing=None,
)


def form(options: Options) -> Form:
    """The format, with the scales that are asked for."""
    return with_scales(FORM, options.nvfp4_scales)


@cache
def with_scales(form: Form, scales: str) -> Form:
    """A format that is encoded as `encode` does, with scales of another choice; itself for the default."""
    return form if scales == "max" else replace(form, encode=partial(form.encode, scales=scales), scales=scales)
