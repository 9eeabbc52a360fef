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
"""

import torch
from torch import Tensor

from ..common.piece import Amax, Axis, Piece
from .form import Arithmetic, Form, Options
from .fp8 import E4M3_MAX, scale_of
from .packing import pack, unpack

NAME = "nvfp4"
BLOCK = 16
OPTIONS = ()

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = 6.0
E4M3_TINY = 2.0**-9


def e2m1_codes(scaled: Tensor) -> Tensor:
    """Round float32 values to e2m1 codes, uint8 of the same shape: the code is the number of midpoints below."""
    size = scaled.abs()
    code = (size > 0.25).to(torch.uint8)
    code += size >= 0.75
    code += size > 1.25
    code += size >= 1.75
    code += size > 2.5
    code += size >= 3.5
    code += size > 5.0
    return code + (scaled < 0).to(torch.uint8) * 8


def block_scales(blocks: Tensor, tensor_scale: Tensor) -> Tensor:
    """The e4m3 scale of each block of a float32 [out, in/16, 16] weight: [out, in/16]."""
    scale = blocks.abs().amax(2) / (E2M1_MAX * tensor_scale)
    return torch.where(scale == 0, 1.0, scale).clamp_(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn)


def rounded(weight: Tensor, amax: Tensor) -> Tensor:
    """`decode(encode(weight))` in bfloat16, without making codes: what a search runs many times."""
    blocks = weight.float().unflatten(1, (-1, BLOCK))
    tensor_scale = scale_of(amax, E2M1_MAX * E4M3_MAX)
    scale = (block_scales(blocks, tensor_scale).float() * tensor_scale).unsqueeze(2)
    scaled = blocks.div_(scale)
    size = scaled.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))  # between neighbours; halves go to the even one
    return scaled.div_(step).round_().mul_(step).clamp_(-E2M1_MAX, E2M1_MAX).mul_(scale).flatten(1).to(torch.bfloat16)


def encode(weight: Tensor, amax: Amax) -> dict[str, Piece]:
    """Quantize one linear: `weight` bfloat16 [out, in] -> the tensors above, by suffix."""
    blocks = weight.float().unflatten(1, (-1, BLOCK))  # [out, in/16, 16]
    tensor_scale = scale_of(amax.weight, E2M1_MAX * E4M3_MAX)
    block_scale = block_scales(blocks, tensor_scale)
    codes = e2m1_codes(blocks / (block_scale.float() * tensor_scale).unsqueeze(2)).flatten(1)
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
    return values_of(unpack(pieces["weight"].data, dim=1).unflatten(1, (-1, BLOCK)), _scales(pieces))


def requantize(weight: Tensor, pieces: dict[str, Piece]) -> Tensor:
    """A float32 [out, in] weight rounded once more with the scales on disk."""
    scales = _scales(pieces)
    return values_of(e2m1_codes(weight.unflatten(1, (-1, BLOCK)) / scales), scales)


def _scales(pieces: dict[str, Piece]) -> Tensor:
    """What the codes of each block are multiplied with, float32 [out, in/16, 1]."""
    return (pieces["weight_scale"].data.float() * pieces["weight_scale_2"].data).unsqueeze(2)


def values_of(codes: Tensor, scales: Tensor) -> Tensor:
    """uint8 codes [out, blocks, block] -> what they stand for under scales [out, blocks, 1], float32 [out, in]."""
    codes = codes.int()
    values = torch.tensor(E2M1, device=codes.device)[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
    return (values * scales).flatten(1)


def round_inputs(values: Tensor, scale: Tensor) -> Tensor:
    """Values as NVFP4 holds them in blocks of 16 of the last dim, in float32.

    The scale of a block is made as it comes: e4m3(block amax / (6 * scale)), 1 for zeros.
    """
    amax = scale * (E2M1_MAX * E4M3_MAX)
    return decode(encode(values.flatten(0, -2), Amax(amax, amax))).view(values.shape)


FORM = Form(
    name=NAME,
    tile=(1, BLOCK),
    ragged=False,
    encode=encode,
    decode=decode,
    requantize=requantize,
    quantization={"quant_algo": "NVFP4", "group_size": BLOCK},
    numbers={"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK},
    native=None,
    arithmetic=Arithmetic(round_inputs, torch.float32),
    least_snr=10.0,
    latent=False,
    stackable=True,
    no_experts="",
    smoothing=None,
)


def form(options: Options) -> Form:
    """The format; it has no options."""
    return FORM
