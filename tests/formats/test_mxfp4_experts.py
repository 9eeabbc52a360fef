"""MXFP4 as OpenAI has it: written again, blocks and scales are the same, but where several encodings mean one thing."""

import pytest
import torch
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from megatron_export.common.piece import Amax
from megatron_export.formats import PUBLISHED, chosen, encode
from megatron_export.models.layouts import stacked

from ..support.models import same
from ..support.quantized_sources import random_blocks

FORM, AMAX = PUBLISHED["mxfp4"], Amax(torch.ones(()), torch.ones(()))  # which no MXFP4 looks at
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def on_disk(parts: list[Tensor]) -> dict[str, Tensor]:
    """What one expert has of each tensor, from parts whose rows take turns."""
    made = [encode(FORM, part.bfloat16(), AMAX) for part in parts]
    rows = {suffix: stacked([one[suffix].data for one in made], woven=True) for suffix in made[0]}
    return {FORM.stack.name("", suffix): FORM.stack.slice(data, suffix) for suffix, data in rows.items()}


@pytest.mark.parametrize("powers", [(-9, 0), (-40, 20)])
def test_codes_and_scales_are_those_that_the_values_were_made_of(powers: tuple[int, int]) -> None:
    torch.manual_seed(powers[0])
    packed, scales, values = random_blocks(64, 128, powers)
    largest = torch.stack((packed & 7, packed >> 4 & 7)).amax(0).unflatten(1, (-1, 16)).amax(2)
    assert (largest > 5).all()  # code 6 is 4, code 7 is 6
    found = on_disk([values[::2], values[1::2]])
    assert same(found["_blocks"], packed.unflatten(1, (-1, 16)))
    assert same(found["_scales"], scales)


def test_transformers_reads_the_values_in_its_own_order() -> None:
    values = random_blocks(64, 96)[2]
    found = on_disk([values[::2], values[1::2]])
    read = convert_moe_packed_tensors(found["_blocks"][None], found["_scales"][None])
    assert torch.equal(read[0], values.T.bfloat16())


def test_both_zeros_are_kept() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :4] = torch.tensor([4.0, 0.0, -0.0, -4.0])
    assert on_disk([weight])["_blocks"][0, 0, :3].tolist() == [0x06, 0xE8, 0x00]
    assert encode(chosen("mxfp4"), weight.bfloat16(), AMAX)["weight"].data[0, :3].tolist() == [
        0x86,
        0xE8,
        0x88,
    ]  # ModelOpt's


@pytest.mark.parametrize(
    ("codes", "power", "instead", "lower"),
    [  # of one block, the first codes: what means the same with the least scale
        ([5, 3, 1], 0, [7, 5, 2], -1),  # 3, 1.5, 0.5 are half of 6, 3, 1
        ([4, 2], 3, [6, 4], 2),
        ([1], -3, [6], -6),  # 0.5 is 4 times 2^-3
        ([0, 0], 5, [0, 0], -127),  # zeros have no scale
    ],
)
def test_of_several_encodings_the_one_with_the_least_scale_is_written(
    codes: list[int], power: int, instead: list[int], lower: int
) -> None:
    values = torch.zeros(1, 32)
    values[0, : len(codes)] = torch.tensor([VALUES[code] * 2.0**power for code in codes])
    found = on_disk([values])
    held = [code for byte in found["_blocks"].flatten().tolist() for code in (byte & 15, byte >> 4)]
    assert held[: len(codes)] == instead
    assert found["_scales"].tolist() == [[lower + 127]]
    assert torch.equal(FORM.decode(encode(FORM, values.bfloat16(), AMAX)), values)


def test_other_weights_are_rounded_as_mxfp4_rounds() -> None:
    weight = torch.randn(32, 128).bfloat16()
    mine, theirs = (encode(form, weight, AMAX) for form in (FORM, chosen("mxfp4")))
    assert same(mine["weight_scale"].data, theirs["weight_scale"].data)
    assert torch.equal(FORM.decode(mine), chosen("mxfp4").decode(theirs))
    assert torch.equal(FORM.requantize(weight.float(), mine), FORM.decode(mine))
