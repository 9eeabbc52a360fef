"""What every format promises: shards encode to the shards of the whole, and decode comes back within the format's step."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from megatron_export import formats
from megatron_export.formats import FORMATS, KV_FORMATS, STRIP_ELEMENTS, nvfp4
from megatron_export.piece import Amax, Axis, join

from ..models import same

ALL = list(FORMATS.values())


def weight_of(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)


def amax_of(weight: Tensor) -> Amax:
    return Amax(weight.abs().amax().float(), torch.tensor(3.0))


@pytest.mark.parametrize("form", ALL, ids=lambda form: form.NAME)
@pytest.mark.parametrize("cut", list(Axis))
def test_encoding_shards_gives_the_shards_of_the_encoded_whole(form: ModuleType, cut: Axis) -> None:
    weight = weight_of(64, 128)
    whole = formats.encode(form, weight, amax_of(weight))
    shards = [formats.encode(form, shard, amax_of(weight)) for shard in weight.chunk(4, dim=list(Axis).index(cut))]
    for suffix, piece in whole.items():
        again = join([shard[suffix] for shard in shards], cut)
        assert again.axes == piece.axes
        assert same(again.data, piece.data)


@pytest.mark.parametrize("form", ALL, ids=lambda form: form.NAME)
def test_strips_change_nothing(form: ModuleType) -> None:
    weight = weight_of(70, STRIP_ELEMENTS // 32)  # 32 rows a strip, and 6 more
    whole, strips = form.encode(weight, amax_of(weight)), formats.encode(form, weight, amax_of(weight))
    for suffix, piece in whole.items():
        assert same(strips[suffix].data, piece.data)


@pytest.mark.parametrize(("name", "step"), [("bf16", 0.0), ("fp8", 2**-4 + 2**-8), ("nvfp4", 1 / 6 + 2**-4)])
def test_decode_is_within_half_a_step_of_the_weight(name: str, step: float) -> None:
    """e4m3 keeps 3 bits of mantissa: half a step is 2^-4 of the value, and bfloat16 rounding before it 2^-9. e2m1's
    widest step is 2 of 6, half of it 1/6 of the block's largest, and e4m3 moves the block's scale by up to 2^-4.
    """
    weight = weight_of(64, 256)
    form = FORMATS[name]
    error = (form.decode(formats.encode(form, weight, amax_of(weight))) - weight.float()).abs()
    blocks = weight.float().abs().unflatten(1, (-1, 16)).amax(2, keepdim=True).expand(-1, -1, 16).flatten(1)
    size = blocks if name == "nvfp4" else weight.float().abs().clamp(min=2**-6 * 4 / 448)  # fp8: subnormals below
    assert (error <= step * size).all()


def test_every_e2m1_tie_goes_to_the_even_code_and_signs_are_kept() -> None:
    values = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 100.0, -0.1, -0.0, -5.1]
    assert nvfp4.e2m1_codes(torch.tensor(values)).tolist() == [0, 2, 2, 4, 4, 6, 6, 7, 7, 8, 0, 15]


def test_kv_scales_are_amax_over_448_and_one_for_a_cache_of_zeros() -> None:
    scales = KV_FORMATS["fp8"].encode(torch.tensor(896.0), torch.tensor(0.0))
    assert {name: scale.item() for name, scale in scales.items()} == {"k_proj.k_scale": 2.0, "v_proj.v_scale": 1.0}
