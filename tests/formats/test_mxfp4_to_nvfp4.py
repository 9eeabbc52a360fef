"""Weights of MXFP4 in NVFP4: equal to the bit, wherever e4m3 has a block's power of two beside that of the largest block."""

import math

import pytest
import torch

from megatron_export.common.dtypes import dtype_names
from megatron_export.common.piece import Amax, Axis, join
from megatron_export.formats import Options, chosen, encode, nvfp4
from megatron_export.formats.mxfp4_to_nvfp4 import cast_of

from ..support.models import same
from ..support.quantized_sources import E2M1, random_blocks

ONE = torch.ones(())


def by_hand(block: list[float], largest: float) -> list[float]:
    """What 16 values become beside a weight whose largest is that, one number at a time."""
    second = math.frexp(largest)[1] - 1 - 10
    amax = max(map(abs, block))
    power = max(math.frexp(amax)[1] - 1 - 2 - second, -9) if amax else 0
    unit = 2.0 ** (power + second)
    codes = [min(range(8), key=lambda code: (abs(abs(value) / unit - E2M1[code]), code % 2)) for value in block]
    return [math.copysign(E2M1[code] * unit, value) for code, value in zip(codes, block, strict=True)]


@pytest.mark.parametrize(
    ("powers", "exact"),
    [  # of the scales of 32 inputs; whether all blocks are within reach
        ((-9, 0), True),
        ((-17, -3), True),
        ((40, 55), True),
        ((-30, 5), False),
    ],
)
@pytest.mark.parametrize("name", ["nvfp4", "w4a16_nvfp4"])
def test_values_are_the_same_to_the_bit_where_the_scale_is_one_of_e4m3(
    name: str, powers: tuple[int, int], exact: bool
) -> None:
    torch.manual_seed(sum(powers))
    form, (_, _, values) = chosen(name), random_blocks(48, 96, powers)
    values[:3, :32] = 0
    values[3, :32] = values[3, :32].sign() * 2.0 ** powers[1]  # code 2 alone, in its own block's unit
    amax = values.abs().max()
    pieces = encode(cast_of(form), values.bfloat16(), Amax(amax, ONE))
    assert {suffix: dtype_names()[piece.data.dtype] for suffix, piece in pieces.items()} == {
        suffix: stored.dtype for suffix, stored in form.stored.items()
    }
    second = pieces["weight_scale_2"].data
    assert math.frexp(float(second))[0] == 0.5
    assert torch.equal(form.requantize(values, pieces), form.decode(pieces))
    found, blocks = form.decode(pieces).unflatten(1, (-1, 16)), values.unflatten(1, (-1, 16))
    reached = blocks.abs().amax(2).log2().floor() - amax.log2().floor() >= -17
    reached |= blocks.abs().amax(2) == 0
    assert torch.equal(found[reached], blocks[reached])
    assert found.flatten(0, 1).tolist() == [by_hand(block, float(amax)) for block in blocks.flatten(0, 1).tolist()]
    assert (torch.equal(found, blocks), bool(reached.all())) == (exact, exact)
    plain = form.decode(encode(form, values.bfloat16(), Amax(amax, ONE)))
    assert not torch.equal(plain, values)  # the reason for all this


def test_blocks_out_of_reach_are_rounded_to_the_least_scale() -> None:
    """Beside a block of scale 2^0, code 6 or 4, the least scale is 2^-17, and the least code is half of that."""
    weight = torch.zeros(6, 16)
    weight[0] = torch.tensor([*E2M1, *(-value for value in E2M1)])
    units = (2.0**-17, 2.0**-18, 2.0**-18, 2.0**-19, 2.0**-30)
    firsts = ((4.0, 0.5), (4.0, 1.0), (4.0, 0.5), (6.0, 1.5), (6.0, 4.0))
    for row, unit, first in zip(weight[1:], units, firsts, strict=True):
        row[:2] = torch.tensor(first) * unit
    form = chosen("nvfp4")
    pieces = encode(cast_of(form), weight.bfloat16(), Amax(torch.tensor(6.0), ONE))
    assert pieces["weight_scale"].data.flatten().float().tolist() == [2.0**8, *[2.0**-9] * 5]
    found = form.decode(pieces)
    assert torch.equal(found[:3], weight[:3])  # 4 and 1 of half the unit are 2 and a half
    unit = 2.0**-17
    assert found[3, :2].tolist() == [2 * unit, 0]  # a quarter is between 0 and a half: to the even code
    assert found[4, :2].tolist() == [1.5 * unit, 0.5 * unit]  # 6/4, exact; 1.5/4 = 0.375 is nearer to a half
    assert found[5, :2].tolist() == [0, 0]


@pytest.mark.modelopt
@pytest.mark.parametrize("powers", [(-9, 0), (-17, 0), (-30, 5)])
def test_values_are_those_of_modelopts_cast(powers: tuple[int, int]) -> None:
    """Its codes and scales are the original's where they are in reach, so that some bytes are others."""
    from modelopt.torch.export.shard_cast_utils import mxfp4_kmax, quantize_mxfp4_to_nvfp4_lossless

    form, (packed, scales, values) = chosen("nvfp4"), random_blocks(64, 256, powers)
    codes, theirs, second, *_ = quantize_mxfp4_to_nvfp4_lossless(packed, scales, mxfp4_kmax(scales), "cpu")
    mine = encode(cast_of(form), values.bfloat16(), Amax(values.abs().max(), ONE))
    assert float(mine["weight_scale_2"].data) == float(second)
    assert torch.equal(
        form.decode(mine), form.decode(nvfp4.pieces(codes.view(torch.uint8), theirs, second.reshape(()), ONE))
    )


def test_shards_become_shards_of_the_whole_under_the_amax_of_all() -> None:
    form = cast_of(chosen("nvfp4"))
    weight = random_blocks(32, 128)[2].bfloat16()
    amax = Amax(weight.abs().max().float(), ONE)
    whole = encode(form, weight, amax)
    for axis, dim in ((Axis.OUT, 0), (Axis.IN, 1)):
        shards = [encode(form, shard, amax) for shard in weight.chunk(2, dim)]
        for suffix, piece in whole.items():
            assert same(join([shard[suffix] for shard in shards], axis).data, piece.data)


@pytest.mark.parametrize("name", ["mxfp4", "w4a8_mxfp4_fp8"])
def test_the_scales_of_mxfp4_itself_are_such_already(name: str) -> None:
    form, (_, _, values) = chosen(name), random_blocks(64, 128, (-40, 20))
    pieces = encode(form, values.bfloat16(), Amax(values.abs().max(), ONE))
    assert torch.equal(form.decode(pieces), values)


@pytest.mark.parametrize("scales", ["mse", "four_over_six"])
def test_a_choice_of_scales_changes_no_byte(scales: str) -> None:
    values = random_blocks(32, 128)[2].bfloat16()
    amax = Amax(values.abs().max().float(), ONE)
    mine, chosen_ones = (
        encode(cast_of(form), values, amax) for form in (chosen("nvfp4"), chosen("nvfp4", Options(nvfp4_scales=scales)))
    )
    assert all(same(piece.data, chosen_ones[suffix].data) for suffix, piece in mine.items())


def test_other_formats_have_no_such_scales() -> None:
    assert [cast_of(chosen(name)) for name in ("fp8", "nvfp4_awq", "int4_awq", "bf16")] == [None] * 4
