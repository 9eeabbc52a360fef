"""The kernels on a GPU write the bytes that plain torch writes on the CPU, and are what encodes there."""

from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_export import formats
from megatron_export.common.piece import Amax
from megatron_export.formats import Form, cuda_kernels, triton_kernels, triton_nvfp4
from megatron_export.formats.mxfp4_to_nvfp4 import cast_of

from ..support.kernel_cases import FORMS, SEARCHED, amaxes, cases, of, searched_cases, wrong
from ..support.models import same
from ..support.quantized_sources import random_blocks


@pytest.mark.parametrize("seed", range(5))
def test_every_number_and_awkward_shapes_have_the_bytes_of_the_cpu(seed: int) -> None:
    tried = list(cases(seed, count=12))
    assert [said for case in tried if (said := wrong(case, partial(formats.encode, case[1]), "cuda"))] == []
    assert all(cuda_kernels.kernel_of(form, weight.cuda(), amax) for _, form, weight, amax in tried)


@pytest.mark.parametrize("seed", range(3))
def test_searched_scales_have_the_bytes_of_the_cpu_on_every_number_and_on_ties(seed: int) -> None:
    tried = [*amaxes(torch.Generator().manual_seed(seed), 12)]
    found = [wrong(case, partial(formats.encode, case[1]), "cuda") for case in searched_cases(seed, tried)]
    assert [said for said in found if said] == []


def test_weights_of_mxfp4_have_the_bytes_of_the_cpu_in_nvfp4() -> None:
    """No kernel is for these: they are read once, and plain torch is exact on every device."""
    form, weight = cast_of(formats.chosen("nvfp4")), random_blocks(96, 256, (-30, 5))[2].to(torch.bfloat16)
    case = ("mxfp4", form, weight, of(weight))
    assert wrong(case, partial(formats.encode, form), "cuda") == ""
    assert cuda_kernels.kernel_of(form, weight.cuda(), case[3]) is None


@pytest.mark.parametrize("name", [*FORMS, *SEARCHED])
@pytest.mark.parametrize("bounds", ["division", "product"])
def test_both_ways_to_divide_give_the_bytes_of_the_cpu(name: str, bounds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Division by the book is forced on ordinary weights; both have some that the other would get wrong, were it wrong."""
    if bounds == "division":
        monkeypatch.setattr(cuda_kernels, "LIMITS", dict.fromkeys(cuda_kernels.LIMITS, (1.0, 0.0)))
    generator = torch.Generator().manual_seed(0)
    for columns in (256, 4096, 14336):
        weight = (torch.randn(512, columns, generator=generator) * 0.02).to(torch.bfloat16)
        form = (FORMS | SEARCHED)[name]
        assert wrong((f"{columns} columns", form, weight, of(weight)), partial(formats.encode, form), "cuda") == ""


@pytest.mark.parametrize("name", ["fp8", "fp8_pb", "nvfp4", "int4_awq"])
def test_a_vocabulary_has_the_bytes_of_the_cpu(name: str) -> None:
    weight = (torch.randn(128256, 512, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    assert wrong(("128256 rows", FORMS[name], weight, of(weight)), partial(formats.encode, FORMS[name]), "cuda") == ""


@pytest.mark.parametrize("name", ["fp8", "fp8_pb", "nvfp4", "int4_awq", *SEARCHED])
def test_elements_beyond_two_to_the_31_are_where_they_belong(name: str) -> None:
    form, tail = (FORMS | SEARCHED)[name], 256
    weight = torch.zeros((1 << 31) // 16384 + tail, 16384, dtype=torch.bfloat16, device="cuda")
    weight[-tail:] = torch.randn(tail, 16384, device="cuda")
    amax = of(weight[-tail:].cpu())
    found = formats.encode(form, weight, Amax(amax.weight.cuda(), amax.input.cuda()))
    for suffix, piece in form.encode(weight[-tail:].cpu(), amax).items():
        last = found[suffix].data[-len(piece.data) :] if piece.axes else found[suffix].data
        assert same(last.cpu(), piece.data), suffix


@triton.jit
def differing(found, TILE: tl.constexpr, ABOVE: tl.constexpr):
    """How many quotients of 8-bit numbers by some scales in [1, 2) are on another side of a 9-bit number, or only on one."""
    mantissa = tl.program_id(0) * TILE + tl.arange(0, TILE)
    scale = (mantissa | 0x3F800000).to(tl.float32, bitcast=True)
    count = tl.zeros((TILE,), tl.int32)
    for number in range(128, 256):
        value = tl.zeros((TILE,), tl.float32) + number
        if ABOVE:
            rough, rest = triton_nvfp4.inverted_above(scale)
            quotient = tl.fma(value, rough, tl.fma(value, rest, 0.0))
        else:
            quotient = triton_kernels.quotients(value, scale, True)
        ours = quotient.to(tl.int32, bitcast=True)
        exact = triton_kernels.quotients(value, scale, False).to(tl.int32, bitcast=True)
        same_side = (ours >> 15 == exact >> 15) & ((ours & 0x7FFF == 0) == (exact & 0x7FFF == 0))
        count += tl.where(same_side, 0, 1)
    tl.store(found + tl.program_id(0), tl.sum(count))


@pytest.mark.parametrize("above", [False, True])
def test_quotients_compare_as_divisions_do_for_every_scale_and_every_number(above: bool) -> None:
    tile = 1024
    found = torch.full(((1 << 23) // tile,), -1, dtype=torch.int32, device="cuda")
    differing[len(found),](found, TILE=tile, ABOVE=above)
    assert found.min().item() == found.max().item() == 0


def aside(weight: Tensor) -> Tensor:
    """The same numbers, not contiguous."""
    return torch.cat([weight, weight], dim=1)[:, : weight.shape[1]]


def behind(weight: Tensor) -> Tensor:
    """The same numbers, not aligned."""
    return torch.cat([weight.new_zeros(1), weight.flatten()])[1:].view(weight.shape)


@pytest.mark.parametrize("name", [*FORMS, *SEARCHED])
def test_other_weights_take_the_plain_path_with_the_same_bytes(name: str) -> None:
    form: Form = (FORMS | SEARCHED)[name]
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    amax = of(weight)
    there = Amax(amax.weight.cuda(), amax.input.cuda())
    expected = form.encode(weight, amax)
    for other in (weight.cuda().float(), aside(weight.cuda()), behind(weight.cuda())):
        assert cuda_kernels.kernel_of(form, other, there) is None
        found = formats.encode(form, other, there)
        assert [suffix for suffix in expected if not same(found[suffix].data.cpu(), expected[suffix].data)] == []
    assert cuda_kernels.kernel_of(form, weight.cuda(), Amax(there.weight, there.input, torch.zeros(256, 2))) is None


def test_without_a_compiler_a_warning_says_so_once_and_the_plain_path_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(cuda_kernels, "kernels", fails)
    cuda_kernels.works.cache_clear()
    weight = torch.randn(256, 256, device="cuda").to(torch.bfloat16)
    amax = Amax(torch.ones((), device="cuda"), torch.ones((), device="cuda"))
    with pytest.warns(UserWarning, match="Failed to find C compiler") as said:
        found = [formats.encode(FORMS["fp8"], weight, amax)["weight"].data for _ in range(2)]
    cuda_kernels.works.cache_clear()
    assert len(said) == 1
    assert same(found[0], FORMS["fp8"].encode(weight, amax)["weight"].data)
