"""The kernels of AWQ's search on a GPU: the numbers of plain torch on the CPU, and the losses of plain torch there."""

import dataclasses

import pytest
import torch
from torch import Tensor

from megatron_export.calibration.awq_search import Alphas
from megatron_export.formats import awq, awq_gram, cuda_gram, cuda_kernels
from megatron_export.formats.awq import ALPHAS, SEARCHES, largest

from ..formats.test_golden_vectors import alone
from ..support.kernel_cases import changed, outputs, smoothings, wrongly_rounded
from ..support.models import same
from .test_kernels import aside, behind


def drawn(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight like a trained one, and factors."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    return weight.to(torch.bfloat16), torch.randn(columns, generator=generator).exp2().to(torch.bfloat16)


@pytest.mark.parametrize("seed", range(5))
def test_every_number_is_smoothed_and_rounded_as_on_the_cpu(seed: int) -> None:
    assert [said for case in smoothings(seed) if (said := wrongly_rounded(case, "cuda"))] == []


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("bounds", ["division", "product"])
def test_both_ways_to_divide_round_as_the_cpu_does(name: str, bounds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if bounds == "division":
        monkeypatch.setattr(cuda_kernels, "LIMITS", dict.fromkeys(cuda_kernels.LIMITS, (1.0, 0.0)))
    for columns in (256, 4096, 14336):
        assert wrongly_rounded((f"{columns} columns", name, *drawn(515, columns)), "cuda") == ""


@pytest.mark.parametrize("name", SEARCHES)
def test_a_rounded_weight_takes_room_for_itself_alone(name: str) -> None:
    weight, factors = (made.cuda() for made in drawn(4096, 4096))
    amax = largest(weight, factors.unsqueeze(0))[0]
    before = torch.cuda.memory_allocated()
    awq.rounded(SEARCHES[name], weight, factors, amax)  # compiles, perhaps
    torch.cuda.reset_peak_memory_stats()
    awq.rounded(SEARCHES[name], weight, factors, amax)
    assert torch.cuda.max_memory_allocated() - before == weight.nbytes


@pytest.mark.parametrize("name", SEARCHES)
def test_other_weights_are_rounded_by_plain_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, factors = drawn(64, 256)
    amax = largest(weight, factors.unsqueeze(0))[0]
    expected = SEARCHES[name].rounded(weight * factors, amax)
    monkeypatch.setattr(cuda_kernels, "kernels", None)
    for other in (aside(weight.cuda()), behind(weight.cuda())):
        assert same(awq.rounded(SEARCHES[name], other, factors.cuda(), amax.cuda()).cpu(), expected)


@pytest.mark.parametrize("name", SEARCHES)
def test_weights_beyond_two_to_the_31_are_rounded_where_they_belong(name: str) -> None:
    tail, factors = drawn(256, 16384)
    weight = torch.zeros((1 << 31) // 16384 + 256, 16384, dtype=torch.bfloat16, device="cuda")
    weight[-256:] = tail
    amax = largest(tail, factors.unsqueeze(0))[0]
    found = awq.rounded(SEARCHES[name], weight, factors.cuda(), amax.cuda())
    assert same(found[-256:].cpu(), SEARCHES[name].rounded(tail * factors, amax))
    assert not found[:-256].any()


@pytest.mark.parametrize("seed", range(5))
def test_squares_of_differences_are_added_up_as_on_the_cpu(seed: int) -> None:
    for product, expected in outputs(seed):
        assert same(cuda_kernels.squares(product.cuda(), expected.cuda()).cpu(), awq.squares(product, expected))
    generator = torch.Generator().manual_seed(seed)
    product = torch.randn(1000, 3001, generator=generator)
    expected = (product + torch.randn(product.shape, generator=generator) * 0.01).to(torch.bfloat16)
    found = cuda_kernels.squares(product.cuda(), expected.cuda())
    assert same(cuda_kernels.squares(product.cuda(), expected.cuda()), found)
    # the sums of 3e6 numbers in float64, in two orders
    torch.testing.assert_close(found.cpu(), awq.squares(product, expected), rtol=1e-12, atol=0)


def test_squares_beyond_two_to_the_31_are_added_up_too() -> None:
    product = torch.zeros((1 << 31) + 5000, device="cuda")
    product[-1] = 3
    expected = torch.zeros_like(product, dtype=torch.bfloat16)
    assert cuda_kernels.squares(product, expected).item() == 9
    product[5] = torch.inf
    assert not cuda_kernels.squares(product, expected).isfinite()


@pytest.mark.parametrize("key", SEARCHES)
def test_a_search_has_the_losses_of_plain_torch(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of micro-batches are rounded to float32, so that nothing is left in them of the order of adding up."""
    name, generator = "decoder.layers.0.mlp.linear_fc2", torch.Generator().manual_seed(0)
    weight = drawn(768, 1024)[0].cuda()
    channels = torch.randn(1024, generator=generator).exp2()
    batches = (torch.randn(3, 2, 100, 1024, generator=generator) * channels).to(torch.bfloat16).cuda()
    assert cuda_kernels.readable(weight)
    assert cuda_kernels.works(weight.device)
    found = []
    for works in (cuda_kernels.works, lambda device: False):
        monkeypatch.setattr(cuda_kernels, "works", works)
        alphas = Alphas(alone(), {name: channels}, lambda name: (key,), lambda values: values, {name: weight})
        for batch in batches:
            alphas.linear(name, weight, batch)
        found.append(alphas.losses[name, key])
    assert len(found[1].unique()) == len(ALPHAS)
    assert same(*found)


@pytest.mark.parametrize("seed", range(5))
def test_changes_of_weights_and_their_dot_products_are_those_of_the_cpu(seed: int) -> None:
    for weights, product, start in changed(seed):
        made = cuda_gram.changes(*(tensor.cuda() for tensor in weights), torch.float16)
        assert same(made.cpu(), awq_gram.changes(*weights, torch.float16))
        found = cuda_gram.dot(product.cuda(), made, start)
        assert same(found.cpu(), awq_gram.dot(product, made.cpu(), start))


@pytest.mark.parametrize("key", SEARCHES)
def test_losses_by_the_square_of_the_inputs_are_those_of_outputs(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are rounded to bfloat16, as scaled inputs are: 1e-3, much alike for all alphas. On a CPU the square is of float32."""
    name, generator = "decoder.layers.0.mlp.linear_fc2", torch.Generator().manual_seed(0)
    weight = drawn(768, 1536)[0].cuda()
    channels = torch.randn(1536, generator=generator).exp2()
    channels[7] = 0
    inputs = (torch.randn(4096, 1536, generator=generator) * channels).to(torch.bfloat16).cuda()
    found = {}
    for way, device in ((True, "cuda"), (False, "cuda"), (True, "cpu")):
        monkeypatch.setattr(awq_gram, "pays", lambda *sizes, way=way: way)
        here = dataclasses.replace(alone(), device=torch.device(device))
        mine = weight.to(device)
        alphas = Alphas(here, {name: channels}, lambda name: (key,), lambda values: values, {name: mine})
        alphas.linear(name, mine, inputs.to(device))
        found[way, device] = alphas.losses[name, key].cpu()
    square, outputs_of, cpu = found.values()
    shift = outputs_of / square - 1
    assert square.argmin() == outputs_of.argmin()
    assert shift.abs().max() < 2e-3
    assert shift.std() < 5e-4
    torch.testing.assert_close(square, cpu, rtol=2e-5, atol=0)


def test_a_square_takes_room_for_its_blocks_and_one_that_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.randn(512, 8192, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).cuda()
    before = torch.cuda.memory_allocated()
    awq_gram.Square.of(inputs)
    torch.cuda.reset_peak_memory_stats()
    square = awq_gram.Square.of(inputs)
    blocks = sum(block.nbytes for block in square.blocks)
    assert blocks == 2 * 8192 * 8192 * 9 // 16
    assert torch.cuda.max_memory_allocated() - before < blocks + 4 * 8192 * 1024 + (64 << 20)
