"""Encoding, and what AWQ's search does most, on CUDA in one pass: the same bytes as plain torch, at the speed of memory.

The plain path reads and writes a weight a dozen times. A kernel reads each element once and keeps it in registers; what
is left is arithmetic, and most of that is the division of every element by its scale, which must be IEEE's to the bit.
So it is taken apart. Once for each scale s:

    r = the float32 below 1 / s,  e = (1 - r * s) / s           r + e is 1 / s but for 2^-44 of it
    q = fma(x, r, x * e)                                        for each element x, in two instructions

x is a bfloat16, of 8 bits, and what follows asks no more of the quotient than on which side of which numbers of 9 bits
it is, or whether it is one. q answers as the rounded x / s does. Let m = M * 2^k be such a number, M odd, and let x = X * 2^t
and s = S in units that make D = S * M - X * 2^t a whole number. If D = 0, then q = m. Otherwise the answers differ only if
x / s is within 2^-44 of where float32 starts to round to m: | |D| * 2^j - S | <= 32, where M * 2^j has 25 bits. Comparing
the low bits of both sides of D's equation leaves |D| = M, S = M * 2^j - 1, hence M = 1 and S = 2^24 - 1, where q is right.
tests/gpu goes through all X and S. That r is below 1 / s makes e positive, and q keep the sign of a zero. nvfp4 has another e.

This holds while nothing over- or underflows; LIMITS has the scales for which nothing does. Others, of weights that
nobody trains, are divided by the book. Triton and a C compiler are needed, and a GPU that rounds to e4m3 (Ada, Hopper,
or newer); without them, and for weights that are clipped, have scales already, or are not contiguous and aligned, the plain
path runs. Its results for NaN and Inf are not reproduced: a survey refuses these before anything is encoded.

A search rounds a weight times its factors as `int4.rounded` and `nvfp4.rounded` do. The first divides codes, which have less
than 8 bits, by a scale, and rounds the quotient to bfloat16; between two of those the limit is a number of 9 bits. A weight that
overflows when it is smoothed gives numbers that are not finite either way, and so does its loss, for which the search ends.
Squares are added up in float64 as in plain torch, in another order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from ..common.errors import ExportError
from ..common.piece import Amax, Piece
from ..common.storage import kind_of, shortage
from . import fp8, fp8_pb, fp8_pc_pt, int4, mxfp4, mxfp8, nvfp4, w4a8_awq, w4a8_nvfp4_fp8, w4a16_nvfp4
from .e8m0 import MX_BLOCK
from .form import Form

if TYPE_CHECKING:
    from torch import Tensor

CAPABILITY = (8, 9)
TILE = 4096  # elements of a program, but for fp8_pb's whole blocks
OWN = (2.0**-100, 2.0**60)  # bounds of scales that are made of their own elements' amax
LIMITS = {
    "fp8": (2.0**-22, 2.0**15),  # of weight_scale, whatever the elements
    "fp8_pb": OWN,
    "fp8_pc_pt": OWN,
    "nvfp4": (2.0**-30, 2.0**6),  # of weight_scale_2, whatever the elements
    "four_over_six": (2.0**-30, 2.0**-8),  # of weight_scale_2, so that 2^126 times the scale of a block is a number
    **dict.fromkeys(("int4", "int4_rounded"), OWN),  # the latter of 7 / amax
}
SMOOTHED_ROWS, SMOOTHED_COLUMNS = 32, 128  # of a program that smooths a weight
LANES, STEPS = 32, 4  # of a program of nvfp4: a block for each thread of a warp, in turn
SEARCHED_REGISTERS = 64  # of a thread that searches scales, for as many warps on a multiprocessor as it takes


def kernel_of(form: Form, weight: Tensor, amax: Amax) -> Callable[[Tensor, Amax], dict[str, Piece]] | None:
    """What stands for `form.encode` for this weight; None where nothing does."""
    if amax.clip is not None or amax.scales is not None or not readable(weight):
        return None
    if not form.ragged and any(size % tile for size, tile in zip(weight.shape, form.tile, strict=True)):
        return None  # the plain path has the words for it
    made = made_for(form)
    return made if made and works(weight.device) else None


def readable(weight: Tensor) -> bool:
    """Whether it is a weight on CUDA that kernels could read, without a look at what there is to run them."""
    if kind_of(weight) or weight.device.type != "cuda" or weight.dtype != torch.bfloat16:
        return False
    if weight.dim() != 2 or weight.numel() == 0:
        return False
    return weight.is_contiguous() and weight.data_ptr() % 16 == 0


def made_for(form: Form) -> Callable[[Tensor, Amax], dict[str, Piece]] | None:
    """The kernel of a format, without a look at what there is to run it."""
    of_options = isinstance(form.encode, partial)
    plain, settings = (form.encode.func, form.encode.keywords) if of_options else (form.encode, {})
    return partial(KERNELS[plain], **settings) if plain in KERNELS else None


@cache
def works(device: torch.device) -> bool:
    """Whether kernels can be compiled and run there; a warning says why not, where that can be helped."""
    if torch.cuda.get_device_capability(device) < CAPABILITY or find_spec("triton") is None:
        return False
    try:
        encode_fp8(torch.ones(1, 1, dtype=torch.bfloat16, device=device), Amax(*torch.ones(2, device=device)))
    except Exception as error:  # of Triton, of the compilers it calls, of a cache that cannot be written
        said = f"{device}: Triton cannot compile kernels, so encoding and AWQ's search take longer. It says: {error}"
        warnings.warn(said, stacklevel=2)
        return False
    return True


def kernels(file: str = "triton_kernels") -> ModuleType:
    """A file of kernels, which needs Triton."""
    return import_module(f".{file}", __package__)


def _scalars(weight: Tensor, amax: Amax) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The maxima where the weight is, and room for their scales."""
    amaxes = amax.weight.to(weight.device, torch.float32), amax.input.to(weight.device, torch.float32)
    return amaxes, (torch.empty_like(amaxes[0]), torch.empty_like(amaxes[1]))


def _check(*tensors: Tensor) -> None:
    """`ExportError` unless the memory of every tensor holds what the tensor says, in order and on one device.

    A kernel is given an address alone. Beyond the end of a tensor it reads what is not there, and CUDA ends the whole process.
    """
    for tensor in tensors:
        why = f"it is a {kind}" if (kind := kind_of(tensor)) else shortage(tensor)
        if not why and not tensor.is_contiguous():
            why = "it is not contiguous"
        if not why and tensor.device != tensors[0].device:
            why = f"it is on {tensor.device}, and others on {tensors[0].device}"
        if why:
            said = f"no kernel can read a tensor: {why}"
            raise ExportError(f"{said}. This is a mistake of megatron_export: please report it")


def launch(kernel: Any, programs: int, *arguments: Any, **settings: Any) -> None:
    """Run so many programs of a kernel: the one place where kernels start."""
    tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
    _check(*tensors)
    with torch.cuda.device_of(tensors[0]):
        kernel[programs,](*arguments, **settings)


def encode_fp8(weight: Tensor, amax: Amax) -> dict[str, Piece]:
    """fp8.encode."""
    codes = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    amaxes, scales = _scalars(weight, amax)
    size = weight.numel()
    launch(kernels().fp8, -(-size // TILE), weight, *amaxes, codes, *scales, size, *LIMITS["fp8"], TILE=TILE)
    return fp8.pieces(codes, *scales)


def encode_fp8_pb(weight: Tensor, amax: Amax | None = None, native: bool = True) -> dict[str, Piece]:
    """fp8_pb.encode."""
    block = fp8_pb.BLOCK
    down, across = (-(-size // block) for size in weight.shape)
    codes = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    scale = torch.empty(down, 1, across, 1, device=weight.device)
    sizes = *weight.shape, *LIMITS["fp8_pb"]
    launch(kernels().fp8_pb, down * across, weight, codes, scale, *sizes, BLOCK=block, num_warps=8)
    return fp8_pb.pieces(codes, scale, native)


def encode_nvfp4(weight: Tensor, amax: Amax, scales: str = "max") -> dict[str, Piece]:
    """nvfp4.encode."""
    _check(weight)  # of which the kernel is given another view
    rows, columns = weight.shape
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(rows, columns // nvfp4.BLOCK, dtype=torch.float8_e4m3fn, device=weight.device)
    amaxes, both = _scalars(weight, amax)
    words, blocks, made = weight.view(torch.int64), scale.numel(), (codes, scale, *both)
    size, settings = LANES, {"BLOCKS": LANES, "num_warps": 1, "enable_fp_fusion": False}
    if scales != "mse":
        size, settings = size * STEPS, settings | {"STEPS": STEPS, "EVEN": blocks % (size * STEPS) == 0}
    if scales == "max":
        kernel, limits, into = kernels("triton_nvfp4").nvfp4, LIMITS["nvfp4"], torch.int64
    elif scales == "mse":
        kernel, limits, into = kernels("triton_scales").least_squares, (), torch.int32
    else:
        kernel, limits, into = kernels("triton_scales").four_over_six, LIMITS[scales], torch.int32
        settings["maxnreg"] = SEARCHED_REGISTERS
    arguments = words, *amaxes, codes.view(into), *made[1:], blocks, *limits
    launch(kernel, -(-blocks // size), *arguments, **settings)
    return nvfp4.pieces(*made)


def encode_w4a8_nvfp4_fp8(weight: Tensor, amax: Amax) -> dict[str, Piece]:
    """w4a8_nvfp4_fp8.encode."""
    words, made, programs, blocks = _in_blocks(weight, torch.float8_e4m3fn)
    amaxes, scales = _scalars(weight, amax)
    sizes = made[1].numel(), *LIMITS["nvfp4"]  # which hold of any weight_scale_2
    tensors = words, *amaxes, *made, *scales
    launch(kernels("triton_blocks").w4a8_nvfp4, programs, *tensors, *sizes, BLOCKS=blocks)
    return nvfp4.pieces(*made, *scales)


def encode_mxfp4(weight: Tensor, amax: Amax | None = None) -> dict[str, Piece]:
    """mxfp4.encode."""
    words, made, programs, blocks = _in_blocks(weight, torch.uint8)
    launch(kernels("triton_blocks").mxfp4, programs, words, *made, made[1].numel(), BLOCKS=blocks)
    return mxfp4.pieces(*made)


def _in_blocks(weight: Tensor, scale: torch.dtype) -> tuple[Tensor, tuple[Tensor, Tensor], int, int]:
    """A weight in words of two elements, room for its codes of four bits and its scales of 32; programs, and blocks of each."""
    _check(weight)  # of which the kernel is given another view
    rows, columns = weight.shape
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(rows, columns // MX_BLOCK, dtype=scale, device=weight.device)
    return weight.view(torch.int32), (codes, scales), -(-weight.numel() // TILE), TILE // MX_BLOCK


def encode_mxfp8(weight: Tensor, amax: Amax | None = None) -> dict[str, Piece]:
    """mxfp8.encode."""
    codes = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    scale = torch.empty(weight.shape[0], weight.shape[1] // MX_BLOCK, dtype=torch.uint8, device=weight.device)
    programs, blocks = -(-weight.numel() // TILE), TILE // MX_BLOCK
    launch(kernels("triton_blocks").mxfp8, programs, weight, codes, scale, scale.numel(), BLOCKS=blocks)
    return mxfp8.pieces(codes, scale)


def encode_fp8_pc_pt(weight: Tensor, amax: Amax | None = None) -> dict[str, Piece]:
    """fp8_pc_pt.encode."""
    codes, scale = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty(len(weight), device=weight.device)
    sizes = weight.shape[1], *LIMITS["fp8_pc_pt"]
    launch(kernels("triton_blocks").fp8_pc_pt, len(scale), weight, codes, scale, *sizes, TILE=TILE)
    return fp8_pc_pt.pieces(codes, scale)


def encode_w4a16_nvfp4(weight: Tensor, amax: Amax, scales: str = "max") -> dict[str, Piece]:
    """w4a16_nvfp4.encode."""
    return w4a16_nvfp4.weights_of(encode_nvfp4(weight, amax, scales))


def encode_int4(weight: Tensor, amax: Amax, group: int) -> dict[str, Piece]:
    """int4.encode."""
    return int4.pieces(*_in_pairs(kernels().int4, weight, group))


def encode_w4a8(weight: Tensor, amax: Amax, group: int) -> dict[str, Piece]:
    """w4a8_awq.encode."""
    amaxes, scales = _scalars(weight, amax)
    return int4.pieces(*_in_pairs(kernels().w4a8, weight, group, *amaxes, *scales)) | w4a8_awq.scalar_pieces(*scales)


def _in_pairs(kernel: Any, weight: Tensor, group: int, *scalars: Tensor) -> tuple[Tensor, Tensor]:
    """int4's codes and scales of a weight by a kernel that makes them of pairs of rows."""
    rows, columns = weight.shape
    codes = torch.empty(rows // 2, columns, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(rows, columns // group, device=weight.device)
    programs, tile = -(-weight.numel() // TILE), {"GROUP": group, "GROUPS": TILE // 2 // group}
    launch(kernel, programs, weight, codes, scale, *scalars, rows // 2, columns, *LIMITS["int4"], **tile)
    return codes, scale


def rounded_int4(weight: Tensor, factors: Tensor, amax: None, group: int) -> Tensor:
    """int4.rounded of weight * factors, [out, in] and [in], both bfloat16."""
    return _smoothed(kernels().int4_rounded, weight, factors, (), LIMITS["int4_rounded"], group)


def rounded_nvfp4(weight: Tensor, factors: Tensor, amax: Tensor) -> Tensor:
    """nvfp4.rounded of weight * factors, [out, in] and [in], both bfloat16."""
    return _smoothed(kernels().nvfp4_rounded, weight, factors, (amax,), LIMITS["nvfp4"], nvfp4.BLOCK)


def scaled(inputs: Tensor, factors: Tensor, group: int) -> Tensor:
    """inputs * factors, [tokens, in] and [in], both bfloat16, whose groups are whole."""
    return _smoothed(kernels().scaled, inputs, factors, (), (), group)


def _smoothed(
    kernel: Any, weight: Tensor, factors: Tensor, amax: tuple[Tensor, ...], limits: tuple[float, ...], group: int
) -> Tensor:
    rows, columns = weight.shape
    made = torch.empty_like(weight)
    programs = -(-rows // SMOOTHED_ROWS) * -(-columns // SMOOTHED_COLUMNS)
    tile = {"ROWS": SMOOTHED_ROWS, "ACROSS": SMOOTHED_COLUMNS // group, "GROUP": group}
    tensors = weight, factors.expand(columns), *amax, made  # which raises unless there are as many
    launch(kernel, programs, *tensors, rows, columns, *limits, **tile, enable_fp_fusion=False)
    return made


def squares(product: Tensor, expected: Tensor) -> Tensor:
    """awq.squares."""
    size = product.numel()
    sums = torch.empty(-(-size // TILE), dtype=torch.float64, device=product.device)
    tensors = product, expected.expand_as(product), sums  # which raises unless it is as large
    launch(kernels().squares, len(sums), *tensors, size, TILE=TILE, enable_fp_fusion=False)
    return sums.sum()


KERNELS = {
    fp8.encode: encode_fp8,
    fp8_pb.encode: encode_fp8_pb,
    nvfp4.encode: encode_nvfp4,
    w4a16_nvfp4.encode: encode_w4a16_nvfp4,
    w4a8_nvfp4_fp8.encode: encode_w4a8_nvfp4_fp8,
    mxfp4.encode: encode_mxfp4,
    mxfp8.encode: encode_mxfp8,
    fp8_pc_pt.encode: encode_fp8_pc_pt,
    int4.encode: encode_int4,
    w4a8_awq.encode: encode_w4a8,
}
