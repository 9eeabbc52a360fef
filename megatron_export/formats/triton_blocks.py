"""Kernels of formats whose blocks of 32 inputs, or rows, have scales of their own; as triton_kernels.py, whose parts they use.

Division by a power of two is multiplication by its inverse, which float32 has for every e8m0 that is made here: both are exact, or
rounded once where they end in subnormals.
"""

import triton
import triton.language as tl

from .e8m0 import MX_BLOCK
from .triton_kernels import AMAXES, E2M1, E4M3, block_scale, e2m1, e2m1_size, quotients, scalars, scale_of

BLOCK = tl.constexpr(MX_BLOCK)
WORDS = tl.constexpr(MX_BLOCK // 2)  # 32-bit words of a block, of two elements each
DOUBLING = tl.constexpr(1 << 23)


@triton.jit
def power_of(amax, largest):
    """As e8m0.scales_of, and the inverse of what the bytes stand for."""
    limit = tl.full(amax.shape, largest, tl.float32).to(tl.int32, bitcast=True)
    power = tl.maximum(((amax.to(tl.int32, bitcast=True) - limit + (DOUBLING - 1)) >> 23) + 127, 0)
    return power, ((254 - power) << 23).to(tl.float32, bitcast=True)


@triton.jit
def blocks_of(weight, blocks, BLOCKS: tl.constexpr):
    """A flat part of the weight: the numbers of its blocks, which of them exist, the places of their words, and both elements."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < blocks
    place = block[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    words = tl.load(weight + place, mask=inside[:, None], other=0)
    first = (words << 16).to(tl.float32, bitcast=True)
    second = (words & -65536).to(tl.float32, bitcast=True)
    return block, inside, place, first, second


@triton.jit
def mxfp8(weight, codes, scale, blocks, BLOCKS: tl.constexpr):
    """A flat part of the weight."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < blocks
    place = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    values = tl.load(weight + place, mask=inside[:, None], other=0.0).to(tl.float32)
    power, inverse = power_of(tl.max(tl.abs(values), axis=1), E4M3)
    tl.store(scale + block, power.to(tl.uint8), mask=inside)
    tl.store(codes + place, (values * inverse[:, None]).to(tl.float8e4nv), mask=inside[:, None])


@triton.jit
def e2m1_down(scaled):
    """As mxfp4.codes_of, of numbers of 8 bits: none but a tie crosses a midpoint when it is made less by one of its 24 bits."""
    lower = tl.maximum(tl.abs(scaled).to(tl.int32, bitcast=True) - 1, 0).to(tl.float32, bitcast=True)
    return e2m1_size(lower) | tl.where(scaled <= 0, 8, 0)


@triton.jit
def mxfp4(weight, codes, scale, blocks, BLOCKS: tl.constexpr):
    """A flat part of the weight, each word of which becomes a byte."""
    block, inside, place, first, second = blocks_of(weight, blocks, BLOCKS)
    power, inverse = power_of(tl.max(tl.maximum(tl.abs(first), tl.abs(second)), axis=1), E2M1)
    tl.store(scale + block, power.to(tl.uint8), mask=inside)
    code = e2m1_down(first * inverse[:, None]) | e2m1_down(second * inverse[:, None]) << 4
    tl.store(codes + place, code.to(tl.uint8), mask=inside[:, None])


@triton.jit(do_not_specialize_on_alignment=AMAXES)
def w4a8_nvfp4(
    weight, weight_amax, input_amax, codes, scale, tensor_scale, input_scale, blocks, low, high, BLOCKS: tl.constexpr
):
    """A flat part of the weight, each word of which becomes a byte."""
    block, inside, place, first, second = blocks_of(weight, blocks, BLOCKS)
    tensor = scalars(weight_amax, input_amax, tensor_scale, input_scale, E4M3, E4M3)
    size = block_scale(tl.max(tl.maximum(tl.abs(first), tl.abs(second)), axis=1), tensor)
    tl.store(scale + block, size, mask=inside)
    divisor, usual = (size.to(tl.float32) * tensor)[:, None], (tensor >= low) & (tensor <= high)
    code = e2m1(quotients(first, divisor, usual)) | e2m1(quotients(second, divisor, usual)) << 4
    tl.store(codes + place, code.to(tl.uint8), mask=inside[:, None])


@triton.jit
def fp8_pc_pt(weight, codes, scale, columns, low, high, TILE: tl.constexpr):
    """One row of the weight, which is read twice."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    size = tl.zeros((TILE,), tl.float32)
    for start in range(0, columns, TILE):
        inside = start + column < columns
        size = tl.maximum(
            size, tl.abs(tl.load(weight + row * columns + start + column, mask=inside, other=0.0).to(tl.float32))
        )
    divisor = scale_of(tl.max(size), E4M3)
    tl.store(scale + row, divisor)
    for start in range(0, columns, TILE):
        inside, place = start + column < columns, row * columns + start + column
        values = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
        scaled = quotients(values, divisor, (divisor >= low) & (divisor <= high))
        tl.store(codes + place, scaled.to(tl.float8e4nv), mask=inside)
