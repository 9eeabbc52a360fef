"""bfloat16 products in float32: what they give, which of them, and that calibration and scores use them."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from megatron_export.calibration.subject import evaluating
from megatron_export.common import cpu_products
from megatron_export.common.cpu_products import fast_products

MODES = {"gradients": nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every processor is one without instructions for bfloat16."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


def made(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("mode", MODES)
def test_each_sum_is_added_in_float32_and_rounded_once(mode: str) -> None:
    inputs, weight, bias, stack = made(2, 5, 64), made(32, 64), made(32), made(3, 64, 7)
    with MODES[mode](), fast_products("cpu"):
        found = (
            nn.functional.linear(inputs, weight, bias),
            torch.matmul(inputs, weight.t()),
            torch.bmm(made(3, 5, 64), stack),
            torch.baddbmm(made(3, 5, 7), made(3, 5, 64), stack, beta=0.5, alpha=0.3),
        )
    wanted = (
        nn.functional.linear(inputs.float(), weight.float(), bias.float()),
        torch.matmul(inputs.float(), weight.float().t()),
        torch.bmm(made(3, 5, 64).float(), stack.float()),
        torch.baddbmm(made(3, 5, 7).float(), made(3, 5, 64).float(), stack.float(), beta=0.5, alpha=0.3),
    )
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.bfloat16
        assert torch.equal(one, other.to(torch.bfloat16))


@pytest.mark.parametrize("elements", [1, 100, 1000])
def test_large_products_are_made_in_parts(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of small whole numbers, whose sums are exact in any order."""
    monkeypatch.setattr(cpu_products, "ELEMENTS", elements)
    left, right, stack, bias = ((made(*shape) * 2).round() for shape in ((5, 16), (16, 33), (7, 16, 3), (33,)))
    many = (made(7, 5, 16) * 2).round()
    with fast_products("cpu"):
        found = torch.addmm(bias, left, right), torch.mm(left, right), torch.bmm(many, stack)
    wanted = bias.float() + left.float() @ right.float(), left.float() @ right.float(), many.float() @ stack.float()
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other.to(torch.bfloat16))


def test_gradients_are_such_products_too() -> None:
    linear, inputs = nn.Linear(64, 32, dtype=torch.bfloat16), made(5, 64).requires_grad_()
    told = made(5, 32)
    with fast_products("cpu"):
        linear(inputs).backward(told)
    assert torch.equal(inputs.grad, (told.float() @ linear.weight.float()).to(torch.bfloat16))
    assert torch.equal(linear.weight.grad, (told.float().t() @ inputs.float()).to(torch.bfloat16))


def test_other_numbers_are_left_alone() -> None:
    with fast_products("cpu"):
        assert torch.equal(made(5, 64).double() @ made(64, 7).double(), made(5, 64).double() @ made(64, 7).double())
        assert (made(5, 64, dtype=torch.float16) @ made(64, 7, dtype=torch.float16)).dtype == torch.float16
        assert torch.equal(made(5, 64) + made(5, 64), 2 * made(5, 64))


def test_a_model_that_is_calibrated_multiplies_so(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, linear = [], nn.Linear(64, 32, dtype=torch.bfloat16)
    monkeypatch.setattr(cpu_products, "_is_slow", lambda one: seen.append(one) or False)
    with evaluating([linear], torch.device("cpu")):
        linear(made(5, 64))
    assert seen
    seen.clear()
    linear(made(5, 64))
    assert not seen


def test_a_processor_with_bfloat16_keeps_its_own_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert isinstance(fast_products("cpu"), nullcontext)


def test_a_gpu_keeps_its_own_products() -> None:
    assert isinstance(fast_products("cuda"), nullcontext)
