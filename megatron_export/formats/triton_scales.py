"""The kernels of cuda_kernels.py that search scales of NVFP4.
A thread has whole blocks, so that sums have the order of nvfp4.py. Of its two scales four_over_six needs to know only which
errs less, and `nearly` tells: its quotients are off by at most 2^-22, which changes an error by at most 17 * 2^-24 of the number,
and those of a block of numbers up to 6.4 * s by a vector of length 2^-15.2 * s. Two sums of squares L and M change by at most
2^-15.2 * (L + M + 2 * s^2) then. If they differ by 2^-15 of that, as in all but one block of 5,000, the answer is that of sums to
the bit. Otherwise, and where e4m3 has fewer bits or ends, these are added up.
"""

import triton
import triton.language as tl

from .nvfp4 import LARGEST_SCALE
from .triton_kernels import (
    AMAXES,
    E2M1,
    E2M1_UNIT,
    E4M3,
    E4M3_LEAST,
    ROUNDING,
    e2m1_size,
    inverted,
    lowest_line,
    scalars,
)

E4M3_OF_FOUR_OVER_SIX = tl.constexpr(LARGEST_SCALE["four_over_six"])
E4M3_NORMAL = tl.constexpr(2.0**-6)  # below it e4m3 has fewer bits
PACKED_ROUNDING = tl.constexpr(-(5 << 24))  # what eight such numbers leave above their low bits, each 16 times the next


@triton.jit
def block_elements(weight, block, inside, EVEN: tl.constexpr):
    """The numbers of each block, of four 64-bit words, one tensor for each of the 16 places, so that a thread has a block and adds
    in a known order.

    EVEN  all blocks are inside
    """
    first = weight + block * 4
    if EVEN:
        words = [tl.load(first + place) for place in (0, 1, 2, 3)]
    else:
        words = [tl.load(first + place, mask=inside, other=0) for place in (0, 1, 2, 3)]
    even = [word.to(tl.int32) for word in words]
    odd = [(word >> 32).to(tl.int32) for word in words]
    low = [(word << 16).to(tl.float32, bitcast=True) for word in even]
    high = [(word & -65536).to(tl.float32, bitcast=True) for word in even]
    lower = [(word << 16).to(tl.float32, bitcast=True) for word in odd]
    higher = [(word & -65536).to(tl.float32, bitcast=True) for word in odd]
    return (low[0], high[0], lower[0], higher[0], low[1], high[1], lower[1], higher[1],
            low[2], high[2], lower[2], higher[2], low[3], high[3], lower[3], higher[3])  # fmt: skip


@triton.jit
def largest_of(size):
    """The largest magnitude of each block."""
    largest = size[0]
    for place in tl.static_range(1, 16):
        largest = tl.maximum(largest, size[place])
    return largest


@triton.jit
def search_units(weight_amax, largest):
    """As nvfp4.search_units."""
    amax = tl.load(weight_amax)
    amax = tl.where(amax == 0, E2M1 * largest, amax)
    factor = tl.div_rn(1.0, tl.div_rn(amax * (E4M3 / largest / 2), 3.0)) * E4M3
    return factor, tl.div_rn(1.0, factor)


@triton.jit
def e4m3_up_to_448(size):
    """The nearest e4m3 number, as float32."""
    return tl.minimum(size, E4M3).to(tl.float8e4nv).to(tl.float32)


@triton.jit
def e4m3_of_code(code):
    """The e4m3 number of a code, of the least for 0, as float32."""
    return tl.maximum(code, 1).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)


@triton.jit
def square(size, scale, divisor):
    """The squared error of a magnitude; no product is fused with a sum."""
    value = (e2m1_size(tl.div_rn(size, divisor)) << 22).to(tl.float32, bitcast=True) * E2M1_UNIT
    error = size - value * scale
    return error * error


@triton.jit
def loss_of(size, scale):
    """As nvfp4._loss: to the bit, and slow."""
    divisor = tl.where(scale == 0, 1.0, scale)
    squares = [square(one, scale, divisor) for one in size]
    total = squares[0] + squares[8]
    for place in tl.static_range(1, 8):
        total += squares[place] + squares[place + 8]
    return total


@triton.jit
def written(scale, tensor):
    """The e4m3 scale of each block, as float32, of amax / 6 or / 4."""
    return e4m3_up_to_448(tl.maximum(tl.div_rn(tl.where(scale == 0, 1.0, scale), tensor), E4M3_LEAST))


@triton.jit
def store(codes, scale, block, inside, e4m3, signed, code):
    """Store the scale of each block and its codes, which have ROUNDING on them and the signs of `signed`, none of which is -0.0:
    eight in a word.
    """
    tl.store(scale + block, e4m3.to(tl.float8e4nv), mask=inside)
    for half in tl.static_range(2):
        word, signs = code[half * 8 + 7].to(tl.int32, bitcast=True), tl.zeros(block.shape, tl.uint32)
        for place in tl.static_range(1, 8):
            word = word * 16 + code[half * 8 + 7 - place].to(tl.int32, bitcast=True)
        for place in tl.static_range(8):
            sign = signed[half * 8 + place].to(tl.uint32, bitcast=True)
            signs = (signs >> 4) | (sign & 0x80000000)
        tl.store(codes + block * 2 + half, (word - PACKED_ROUNDING) | signs.to(tl.int32, bitcast=True), mask=inside)


@triton.jit
def store_by_the_book(codes, scale, block, inside, values, e4m3, tensor):
    """Store the scale of each block and its codes, whatever the numbers."""
    scaled = [tl.div_rn(value, e4m3 * tensor) + 0.0 for value in values]  # which makes 0.0 of -0.0
    code = [tl.minimum(lowest_line(tl.abs(one)), ROUNDING + 7) for one in scaled]
    store(codes, scale, block, inside, e4m3, scaled, code)


@triton.jit
def nearly(size, scale, LINES: tl.constexpr):
    """About the sum of squared errors of each block."""
    inverse, unit, loss = 1.0 / scale, -scale * E2M1_UNIT, tl.zeros_like(scale)
    twice, half = inverse * 2.0, inverse * 0.5
    for place in tl.static_range(16):  # the lines of lowest_two and lowest_line, with the division in their slopes
        code = tl.minimum(tl.fma(size[place], twice, ROUNDING), tl.fma(size[place], inverse, ROUNDING + 2))
        if LINES == 3:
            code = tl.minimum(code, tl.fma(size[place], half, ROUNDING + 4))
        error = tl.fma((code.to(tl.int32, bitcast=True) << 22).to(tl.float32, bitcast=True), unit, size[place])
        loss = tl.fma(error, error, loss)
    return loss


@triton.jit(do_not_specialize_on_alignment=AMAXES)
def four_over_six(
    weight, weight_amax, input_amax, codes, scale, tensor_scale, input_scale, blocks, low, high,
    BLOCKS: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Some blocks at a time: in few instructions where `nearly` decides for all of them, else to the bit."""
    tensor = scalars(weight_amax, input_amax, tensor_scale, input_scale, E2M1 * E4M3_OF_FOUR_OVER_SIX, E2M1 * E4M3)
    factor, inverse = search_units(weight_amax, E4M3_OF_FOUR_OVER_SIX)
    usual = (tensor >= low) & (tensor <= high)
    for step in range(STEPS):
        block = (tl.program_id(0).to(tl.int64) * STEPS + step) * BLOCKS + tl.arange(0, BLOCKS)
        inside = (block < blocks) | EVEN
        values = block_elements(weight, block, inside, EVEN)
        size = [tl.abs(value) for value in values]
        largest = largest_of(size)
        six, four = tl.div_rn(largest, E2M1), largest * 0.25
        of_six = e4m3_up_to_448(six * factor)
        of_four = e4m3_up_to_448(four * factor)
        by_six, by_four = of_six * inverse, of_four * inverse
        six_loss, four_loss = nearly(size, by_six, 3), nearly(size, by_four, 2)
        doubt = tl.fma(by_six * by_six, 2.0, six_loss + four_loss) * 2.0**-15
        rounded = (of_six >= E4M3_NORMAL) & (of_four < E4M3)  # so that no number is beyond 6.4 or 4.3
        sure = (tl.abs(four_loss - six_loss) > doubt) & rounded | (largest == 0)
        if usual & (tl.min(sure.to(tl.int32), axis=0) > 0):
            e4m3 = written(tl.where(four_loss < six_loss, four, six), tensor)
            rough, rest = inverted(e4m3 * tensor)
            scaled = [
                tl.fma(value, rough, tl.fma(value, rest, 0.0)) for value in values
            ]  # never -0.0, as 0.0 was added
            code = [lowest_line(tl.abs(one)) for one in scaled]
            store(codes, scale, block, inside, e4m3, scaled, code)
        else:
            e4m3 = written(tl.where(loss_of(size, by_four) < loss_of(size, by_six), four, six), tensor)
            store_by_the_book(codes, scale, block, inside, values, e4m3, tensor)


@triton.jit(do_not_specialize_on_alignment=AMAXES)
def least_squares(
    weight, weight_amax, input_amax, codes, scale, tensor_scale, input_scale, blocks, BLOCKS: tl.constexpr
):
    """As nvfp4.least_squares, all to the bit."""
    tensor = scalars(weight_amax, input_amax, tensor_scale, input_scale, E2M1 * E4M3, E2M1 * E4M3)
    factor, inverse = search_units(weight_amax, E4M3)
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < blocks
    values = block_elements(weight, block, inside, False)
    size = [tl.abs(value) for value in values]
    largest = largest_of(size)
    guess = e4m3_up_to_448(tl.div_rn(largest, E2M1) * factor)
    code = guess.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)
    code += (guess * inverse * E2M1 < largest).to(tl.int32)
    first = tl.minimum(tl.maximum(code, 8), 119) - 8
    chosen = e4m3_of_code(first)
    best = tl.zeros_like(largest) + float("inf")
    for step in range(16):
        e4m3 = e4m3_of_code(first + step)
        loss = loss_of(size, e4m3 * inverse)
        chosen = tl.where(loss < best, e4m3, chosen)
        best = tl.minimum(loss, best)
    store_by_the_book(codes, scale, block, inside, values, chosen, tensor)
