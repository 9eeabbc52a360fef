"""The kernel of NVFP4; as triton_kernels.py, whose parts it uses.

A thread has a block at a time, and reads its next one meanwhile. It compares and packs numbers by fours, as no step then waits for
fifteen or seven before it: that is 3 % of the speed. Division by a block's scale s is two multiplications, as
cuda_kernels.py tells, with another e, for a division for every 16 elements would take a fifth of the time:

    r = a float32 that is less than 1 / s by 2^-24 to 2^-21.6 of it
    e = (1 + 2^-20) * (1 - r * s) * r                           r + e is above 1 / s by at most 2^-41 of it

Codes and block scales change at numbers M * 2^k of at most 5 bits, and the argument there allows 2^-34 for these. It leaves s of
2^24 - 1 units and M = 1, where x / s is just above m: so is q, as r + e is above 1 / s.
"""

import triton
import triton.language as tl

from .triton_kernels import AMAXES, E2M1, E4M3, E4M3_LEAST, ROUNDING, block_scale, lowest_line, scale_of

RECIPROCAL = tl.constexpr(0x7EF311C7)  # less the bits of a float32: those of about its inverse, to an eighth
PACKED_ROUNDING = tl.constexpr(-(5 << 24))  # what eight such numbers leave above their low bits, each 16 times the next
SAFE = tl.constexpr(6.9)  # below 7, up to which lowest_line is right
ABOVE = tl.constexpr(2.0**-20)


@triton.jit
def inverted_above(scale):
    """r and e of this file, without a division; each round takes the error to its third power."""
    rough = (-scale.to(tl.int32, bitcast=True) + RECIPROCAL).to(tl.float32, bitcast=True)
    for _ in tl.static_range(2):
        off = tl.fma(-rough, scale, 1.0)
        rough = tl.fma(rough, tl.fma(off, off, off), rough)
    rough = (rough.to(tl.int32, bitcast=True) - 2).to(tl.float32, bitcast=True)
    off = tl.fma(-rough, scale, 1.0)
    return rough, tl.fma(off, ABOVE, off) * rough


@triton.jit
def words_of(weight, first, lane, blocks, EVEN: tl.constexpr):
    """Both halves of each block, of two 64-bit words."""
    place = weight + first * 4 + (lane[:, None] * 4 + tl.arange(0, 2)[None, :])
    if EVEN:
        left = tl.load(place)
        right = tl.load(place + 2)
    else:
        inside = (lane < blocks - first)[:, None]
        left = tl.load(place, mask=inside, other=0)
        right = tl.load(place + 2, mask=inside, other=0)
    return left, right


@triton.jit
def four(word):
    """The elements of a 64-bit word."""
    even, odd = word.to(tl.int32), (word >> 32).to(tl.int32)
    return ((even << 16).to(tl.float32, bitcast=True), (even & -65536).to(tl.float32, bitcast=True),
            (odd << 16).to(tl.float32, bitcast=True), (odd & -65536).to(tl.float32, bitcast=True))  # fmt: skip


@triton.jit
def largest_of(some):
    """The largest magnitude of four numbers."""
    return tl.maximum(tl.maximum(tl.abs(some[0]), tl.abs(some[1])), tl.maximum(tl.abs(some[2]), tl.abs(some[3])))


@triton.jit
def two_of(code, first: tl.constexpr):
    """Two codes, the second times 16."""
    return code[first + 1].to(tl.int32, bitcast=True) * 16 + code[first].to(tl.int32, bitcast=True)


@triton.jit
def packed(code, scaled, half: tl.constexpr):
    """Eight codes, which have ROUNDING on them, and the signs of `scaled`, none of which is -0.0, in a word."""
    low = two_of(code, half * 8 + 2) * 256 + two_of(code, half * 8)
    high = two_of(code, half * 8 + 6) * 256 + two_of(code, half * 8 + 4)
    word = high * 65536 + low
    signs = scaled[half * 8 + 7].to(tl.uint32, bitcast=True) >> 28
    for place in tl.static_range(1, 8):
        signs = (signs << 4) | (scaled[half * 8 + 7 - place].to(tl.uint32, bitcast=True) >> 28)
    return (word - PACKED_ROUNDING) | (signs & 0x88888888).to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize_on_alignment=AMAXES)
def nvfp4(
    weight, weight_amax, input_amax, codes, scale, tensor_scale, input_scale, blocks, low, high,
    BLOCKS: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Some blocks at a time, in 64-bit words of codes: by the book where a scale is beyond the limits or a number beyond SAFE.

    EVEN  all blocks are inside
    """
    first, lane = tl.program_id(0).to(tl.int64) * (BLOCKS * STEPS), tl.arange(0, BLOCKS)
    left, right = words_of(weight, first, lane, blocks, EVEN)  # before all else: they take longest
    of_weight, of_input = tl.load(weight_amax), tl.load(input_amax)
    tensor = scale_of(of_weight, E2M1 * E4M3)
    if tl.program_id(0) == 0:
        tl.store(tensor_scale, tensor)
        tl.store(input_scale, scale_of(of_input, E2M1 * E4M3))
    usual = (tensor >= low) & (tensor <= high)
    tensor_rough, tensor_rest = inverted_above(tensor * E2M1)
    for step in tl.range(STEPS, loop_unroll_factor=2):
        after = first + tl.where(step + 1 < STEPS, BLOCKS, 0)  # in the last step these once more
        next_left, next_right = words_of(weight, after, lane, blocks, EVEN)
        zeroth, second = tl.split(left)
        third, fourth = tl.split(right)
        fours = four(zeroth), four(second), four(third), four(fourth)
        values = fours[0] + fours[1] + fours[2] + fours[3]
        largest = largest_of((largest_of(fours[0]), largest_of(fours[1]), largest_of(fours[2]), largest_of(fours[3])))
        size = tl.fma(largest, tensor_rough, largest * tensor_rest)
        e4m3 = tl.minimum(tl.maximum(tl.where(largest == 0, 1.0, size), E4M3_LEAST), E4M3).to(tl.float8e4nv)
        rough, rest = inverted_above(e4m3.to(tl.float32) * tensor)
        if usual & (tl.min((largest * rough < SAFE).to(tl.int32), axis=0) > 0):
            scaled = [tl.fma(value, rough, tl.fma(value, rest, 0.0)) for value in values]  # 0.0 makes none -0.0
            code = [lowest_line(tl.abs(one)) for one in scaled]
            low_word, high_word = packed(code, scaled, 0), packed(code, scaled, 1)
        else:
            e4m3 = block_scale(largest, tensor)
            scaled = [tl.div_rn(value, e4m3.to(tl.float32) * tensor) + 0.0 for value in values]
            code = [tl.minimum(lowest_line(tl.abs(one)), ROUNDING + 7) for one in scaled]
            low_word, high_word = packed(code, scaled, 0), packed(code, scaled, 1)
        both = low_word.to(tl.uint32, bitcast=True).to(tl.int64) | (high_word.to(tl.int64) << 32)
        inside = (lane < blocks - first) | EVEN
        tl.store(codes + first + lane, both, mask=inside)
        tl.store(scale + first + lane, e4m3, mask=inside)
        first, left, right = after, next_left, next_right
