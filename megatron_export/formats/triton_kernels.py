"""The kernels of cuda_kernels.py, which tells how they divide. Files named triton_* need Triton, and are imported where used."""

import triton
import triton.language as tl

from .fp8 import E4M3_MAX
from .int4 import INT4_MAX, INT4_MIN
from .nvfp4 import E2M1_MAX, E4M3_TINY

E4M3 = tl.constexpr(E4M3_MAX)
E4M3_LEAST = tl.constexpr(E4M3_TINY)
E2M1 = tl.constexpr(E2M1_MAX)
E2M1_UNIT = tl.constexpr(2.0**126)  # times the float32 that a code shifted by 22 bits is: the code's magnitude
INT4 = tl.constexpr(INT4_MAX)
INT4_LEAST = tl.constexpr(INT4_MIN)
SIGN = tl.constexpr(-(1 << 31))
AMAXES = ["weight_amax", "input_amax"]  # numbers in the midst of others
# A float32 of 2^23 or more has no digits after the point: what is added to it is rounded, half to even, into its low bits.
ROUNDING = tl.constexpr(float(1 << 23))
ROUNDING_SIGNED = tl.constexpr(float(3 << 22))


@triton.jit
def inverted(scale):
    """r and e of cuda_kernels.py."""
    inverse = tl.div_rn(1.0, scale)
    inverse = (inverse.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)
    return inverse, tl.div_rn(tl.fma(-inverse, scale, 1.0), scale)


@triton.jit
def quotients(values, scale, usual):
    """values / scale: as far as 9 bits tell where `usual`, to the last bit otherwise."""
    if usual:
        inverse, rest = inverted(scale)
        result = tl.fma(values, inverse, values * rest)
    else:
        result = tl.div_rn(values, scale)
    return result


@triton.jit
def scale_of(amax, largest):
    """As fp8.scale_of."""
    return tl.div_rn(tl.where(amax == 0, largest, amax), largest)


@triton.jit
def scalars(weight_amax, input_amax, weight_scale, input_scale, largest, of_inputs):
    """The scale of the whole weight; the first program stores it, and the input's."""
    of_weight, of_input = tl.load(weight_amax), tl.load(input_amax)
    scale = scale_of(of_weight, largest)
    if tl.program_id(0) == 0:
        tl.store(weight_scale, scale)
        tl.store(input_scale, scale_of(of_input, of_inputs))
    return scale


@triton.jit(do_not_specialize_on_alignment=AMAXES)
def fp8(weight, weight_amax, input_amax, codes, weight_scale, input_scale, size, low, high, TILE: tl.constexpr):
    """A flat part of the weight."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    values = tl.load(weight + place, mask=place < size, other=0.0).to(tl.float32)
    divisor = scalars(weight_amax, input_amax, weight_scale, input_scale, E4M3, E4M3)
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
def e2m1_size(scaled):
    """The code of each magnitude: the lowest of three lines, one for each distance between neighbours, and the last code."""
    return tl.minimum(lowest_line(tl.abs(scaled)), ROUNDING + 7).to(tl.int32, bitcast=True) & 7


@triton.jit
def lowest_line(size):
    """ROUNDING and the code of each magnitude below 7. Up to 5 the first two lines are enough."""
    two = tl.minimum(tl.fma(size, 2.0, ROUNDING), size + (ROUNDING + 2))
    return tl.minimum(two, tl.fma(size, 0.5, ROUNDING + 4))


@triton.jit
def e2m1(scaled):
    """The code of each."""
    return e2m1_size(scaled) | tl.where(scaled < 0, 8, 0)


@triton.jit
def block_scale(amax, tensor_scale):
    """As nvfp4.block_scales, of the blocks' amax."""
    size = tl.div_rn(amax, tensor_scale * E2M1)  # in this order: Triton 3.7's interpreter has none for the other
    return tl.minimum(tl.maximum(tl.where(size == 0, 1.0, size), E4M3_LEAST), E4M3).to(tl.float8e4nv)


@triton.jit(do_not_specialize_on_alignment=AMAXES)
def w4a8(
    weight, codes, scale, weight_amax, input_amax, weight_scale, input_scale, pairs, columns, low, high,
    GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """As int4; the first program stores the scales of the whole weight and of the input too."""
    if tl.program_id(0) == 0:
        tl.store(weight_scale, scale_of(tl.load(weight_amax), E4M3))
        tl.store(input_scale, scale_of(tl.load(input_amax), E4M3))
    int4(weight, codes, scale, pairs, columns, low, high, GROUP, GROUPS)


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


@triton.jit
def smoothed(weight, factors, rows, columns, ROWS: tl.constexpr, ACROSS: tl.constexpr, GROUP: tl.constexpr):
    """`ACROSS` neighbouring groups of `ROWS` rows: their places, which of them exist, and weights times factors.

    All are [ROWS * ACROSS, GROUP]; the products are bfloat16 numbers in float32. The rows share the factors that they read.
    """
    programs = tl.cdiv(columns, ACROSS * GROUP)
    group = tl.arange(0, ROWS * ACROSS)
    row = (tl.program_id(0) // programs).to(tl.int64) * ROWS + group // ACROSS
    first = (tl.program_id(0) % programs * ACROSS + group % ACROSS) * GROUP
    column = first[:, None] + tl.arange(0, GROUP)[None, :]
    inside = ((row < rows) & (first < columns))[:, None]
    place = row[:, None] * columns + column
    values = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    values *= tl.load(factors + column, mask=inside, other=0.0).to(tl.float32)
    return place, inside, values.to(tl.bfloat16).to(tl.float32)


@triton.jit
def scaled(weight, factors, made, rows, columns, ROWS: tl.constexpr, ACROSS: tl.constexpr, GROUP: tl.constexpr):
    """The products that `smoothed` gives."""
    place, inside, values = smoothed(weight, factors, rows, columns, ROWS, ACROSS, GROUP)
    tl.store(made + place, values.to(tl.bfloat16), mask=inside)


@triton.jit
def int4_rounded(
    weight, factors, made, rows, columns, low, high, ROWS: tl.constexpr, ACROSS: tl.constexpr, GROUP: tl.constexpr
):
    """Groups as `smoothed` gives them. No product may be fused with a sum. NaN stays NaN: its bits are a larger number."""
    place, inside, values = smoothed(weight, factors, rows, columns, ROWS, ACROSS, GROUP)
    amax = tl.max(tl.abs(values).to(tl.int32, bitcast=True), axis=1).to(tl.float32, bitcast=True)
    scale = tl.div_rn(INT4, tl.where(amax == 0, INT4, amax))
    usual = (tl.min(scale) >= low) & (tl.max(scale) <= high)
    scaled = values * scale[:, None]
    size = (tl.abs(scaled) + ROUNDING) - ROUNDING
    sign = scaled.to(tl.int32, bitcast=True) & SIGN
    code = (size.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    code = tl.clamp(code, INT4_LEAST, INT4, propagate_nan=tl.PropagateNan.ALL)
    tl.store(made + place, quotients(code, scale[:, None], usual).to(tl.bfloat16), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["amax"])
def nvfp4_rounded(
    weight, factors, amax, made, rows, columns, low, high, ROWS: tl.constexpr, ACROSS: tl.constexpr, GROUP: tl.constexpr
):
    """Blocks as `smoothed` gives them."""
    place, inside, values = smoothed(weight, factors, rows, columns, ROWS, ACROSS, GROUP)
    tensor = scale_of(tl.load(amax), E2M1 * E4M3)
    size = block_scale(tl.max(tl.abs(values), axis=1), tensor)
    divisor = (size.to(tl.float32) * tensor)[:, None]
    scaled = quotients(values, divisor, (tensor >= low) & (tensor <= high))
    sign = scaled.to(tl.int32, bitcast=True) & SIGN
    value = (e2m1_size(scaled) << 22 | sign).to(tl.float32, bitcast=True) * E2M1_UNIT
    tl.store(made + place, (value * divisor).to(tl.bfloat16), mask=inside)


@triton.jit
def squares(product, expected, sums, size, TILE: tl.constexpr):
    """A flat part of the outputs: its sum of squares."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    output = tl.load(product + place, mask=place < size, other=0.0).to(tl.bfloat16).to(tl.float32)
    difference = output - tl.load(expected + place, mask=place < size, other=0.0).to(tl.float32)
    difference = difference.to(tl.bfloat16).to(tl.float32)
    tl.store(sums + tl.program_id(0), tl.sum((difference * difference).to(tl.float64)))
