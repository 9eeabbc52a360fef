"""The kernels of kernels.py, which tells how they divide. This file alone needs Triton, and is imported where it is used."""

import triton
import triton.language as tl

from .fp8 import E4M3_MAX
from .int4 import INT4_MAX
from .nvfp4 import E2M1_MAX, E4M3_TINY

E4M3 = tl.constexpr(E4M3_MAX)
E4M3_LEAST = tl.constexpr(E4M3_TINY)
E2M1 = tl.constexpr(E2M1_MAX)
INT4 = tl.constexpr(INT4_MAX)
AMAXES = ["weight_amax", "input_amax"]  # numbers in the midst of others
# A float32 of 2^23 or more has no digits after the point: what is added to it is rounded, half to even, into its low bits.
ROUNDING = tl.constexpr(float(1 << 23))
ROUNDING_SIGNED = tl.constexpr(float(3 << 22))


@triton.jit
def quotients(values, scale, usual):
    """values / scale: as far as 9 bits tell where `usual`, to the last bit otherwise."""
    if usual:
        inverse = tl.div_rn(1.0, scale)
        inverse = (inverse.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)
        rest = tl.div_rn(tl.fma(-inverse, scale, 1.0), scale)
        result = tl.fma(values, inverse, values * rest)
    else:
        result = tl.div_rn(values, scale)
    return result


@triton.jit
def scale_of(amax, largest):
    """As fp8.scale_of."""
    return tl.div_rn(tl.where(amax == 0, largest, amax), largest)


@triton.jit
def scalars(weight_amax, input_amax, weight_scale, input_scale, largest):
    """The scale of the whole weight; the first program stores it, and the input's."""
    of_weight, of_input = tl.load(weight_amax), tl.load(input_amax)
    scale = scale_of(of_weight, largest)
    if tl.program_id(0) == 0:
        tl.store(weight_scale, scale)
        tl.store(input_scale, scale_of(of_input, largest))
    return scale


@triton.jit(do_not_specialize_on_alignment=AMAXES)
def fp8(weight, weight_amax, input_amax, codes, weight_scale, input_scale, size, low, high, TILE: tl.constexpr):
    """A flat part of the weight."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    values = tl.load(weight + place, mask=place < size, other=0.0).to(tl.float32)
    divisor = scalars(weight_amax, input_amax, weight_scale, input_scale, E4M3)
    scaled = quotients(values, divisor, (divisor >= low) & (divisor <= high))
    tl.store(codes + place, scaled.to(tl.bfloat16).to(tl.float32).to(tl.float8e4nv), mask=place < size)


@triton.jit
def fp8_pb(weight, codes, scale, rows, columns, low, high, BLOCK: tl.constexpr):
    """One block of the weight."""
    across = tl.cdiv(columns, BLOCK)
    block = tl.program_id(0)
    row = (block // across).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    column = block % across * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < columns)
    place = row * columns + column
    values = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    divisor = scale_of(tl.max(tl.abs(values)), E4M3)
    tl.store(scale + block, divisor)
    scaled = quotients(values, divisor, (divisor >= low) & (divisor <= high))
    tl.store(codes + place, scaled.to(tl.float8e4nv), mask=inside)


@triton.jit
def e2m1(scaled):
    """The code of each: the lowest of three lines, one for each distance between neighbours, and the last code."""
    size = tl.abs(scaled)
    code = tl.minimum(size * 2 + ROUNDING, size + (ROUNDING + 2))
    code = tl.minimum(tl.minimum(code, size * 0.5 + (ROUNDING + 4)), ROUNDING + 7)
    return code.to(tl.int32, bitcast=True) & 7 | tl.where(scaled < 0, 8, 0)


@triton.jit(do_not_specialize_on_alignment=AMAXES)
def nvfp4(
    weight, weight_amax, input_amax, codes, scale, tensor_scale, input_scale, blocks, low, high, BLOCKS: tl.constexpr
):
    """A flat part of the weight, in 32-bit words of two elements: 8 in a block, each of which becomes a byte."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = (block < blocks)[:, None]
    place = block[:, None] * 8 + tl.arange(0, 8)[None, :]
    words = tl.load(weight + place, mask=inside, other=0)
    first = (words << 16).to(tl.float32, bitcast=True)
    second = (words & -65536).to(tl.float32, bitcast=True)
    tensor = scalars(weight_amax, input_amax, tensor_scale, input_scale, E2M1 * E4M3)
    size = tl.div_rn(tl.max(tl.maximum(tl.abs(first), tl.abs(second)), axis=1), E2M1 * tensor)
    size = tl.minimum(tl.maximum(tl.where(size == 0, 1.0, size), E4M3_LEAST), E4M3).to(tl.float8e4nv)
    tl.store(scale + block, size, mask=block < blocks)
    divisor = (size.to(tl.float32) * tensor)[:, None]
    usual = (tensor >= low) & (tensor <= high)
    code = e2m1(quotients(first, divisor, usual)) | e2m1(quotients(second, divisor, usual)) << 4
    tl.store(codes + place, code.to(tl.uint8), mask=inside)


@triton.jit
def int4(weight, codes, scale, pairs, columns, low, high, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """Groups of two neighbouring rows each, one after another along the rows."""
    groups = columns // GROUP
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    upper = (group + group // groups * groups).to(tl.int64)  # its number in the weight; `groups` more in the next row
    inside = group < pairs * groups
    column = tl.arange(0, GROUP)[None, :]
    place = upper[:, None] * GROUP + column
    first = tl.load(weight + place, mask=inside[:, None], other=0.0).to(tl.float32)
    second = tl.load(weight + place + columns, mask=inside[:, None], other=0.0).to(tl.float32)
    first_scale = scale_of(tl.max(tl.abs(first), axis=1), INT4)
    second_scale = scale_of(tl.max(tl.abs(second), axis=1), INT4)
    tl.store(scale + upper, first_scale, mask=inside)
    tl.store(scale + upper + groups, second_scale, mask=inside)
    usual = (tl.min(tl.minimum(first_scale, second_scale)) >= low) & (
        tl.max(tl.maximum(first_scale, second_scale)) <= high
    )
    first = quotients(first, first_scale[:, None], usual) + ROUNDING_SIGNED
    second = quotients(second, second_scale[:, None], usual) + ROUNDING_SIGNED
    code = first.to(tl.int32, bitcast=True) & 15 | (second.to(tl.int32, bitcast=True) & 15) << 4
    tl.store(codes + group.to(tl.int64)[:, None] * GROUP + column, code.to(tl.uint8), mask=inside[:, None])
