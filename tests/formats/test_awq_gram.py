"""AWQ's losses by the square of the inputs are the errors of outputs that nothing has rounded."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_export.calibration.awq_search import Alphas
from megatron_export.formats import awq, awq_gram
from megatron_export.formats.awq import ALPHAS, SEARCHES
from megatron_export.formats.awq_gram import Square, pays, squares

from .test_golden_vectors import SEARCHED, alone, search_of

NAME = "decoder.layers.0.mlp.linear_fc2"
BLOCKS = (1024, 128, 48)  # the last one divides no width below
ALWAYS, NEVER = (lambda *sizes: True), (lambda *sizes: False)


def drawn(tokens: int, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs whose channels differ in size and depend on one another, a weight, and factors of all alphas."""
    generator = torch.Generator().manual_seed(columns)
    mixed = torch.randn(tokens, 24, generator=generator) @ torch.randn(24, columns, generator=generator)
    inputs = (mixed + torch.randn(tokens, columns, generator=generator)) * torch.randn(
        columns, generator=generator
    ).exp()
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    vectors = torch.stack([awq.factors(inputs.abs().mean(dim=0), weight.abs().mean(dim=0), alpha) for alpha in ALPHAS])
    return inputs.to(torch.bfloat16), weight.to(torch.bfloat16), vectors


def given(name: str, weight: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """bfloat16 factors, their inverses and the amaxes that a search needs."""
    factors = vectors.to(torch.bfloat16)
    amaxes = [*awq.largest(weight, factors)] if SEARCHES[name].per_tensor else [None] * len(factors)
    return factors, (1 / vectors).to(torch.bfloat16), amaxes


def exactly(name: str, inputs: Tensor, weight: Tensor, vectors: Tensor) -> Tensor:
    """By the definition, in float64."""
    expected = inputs.double() @ weight.double().T
    return torch.stack([
        ((inputs.double() * inverse.double()) @ awq.rounded(SEARCHES[name], weight, factor, amax).double().T - expected)
        .square()
        .sum()
        for factor, inverse, amax in zip(*given(name, weight, vectors), strict=True)
    ])  # fmt: skip


@pytest.mark.parametrize("width", BLOCKS)
@pytest.mark.parametrize("name", SEARCHES)
def test_losses_are_the_definitions(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 sums of a few hundred numbers: 1e-5."""
    monkeypatch.setattr(awq_gram, "WIDTH", width)
    for sizes in ((200, 40, 256), (3, 64, 384)):
        inputs, weight, vectors = drawn(*sizes)
        found = squares(SEARCHES[name], inputs, weight, *given(name, weight, vectors))
        torch.testing.assert_close(found, exactly(name, inputs, weight, vectors), rtol=1e-5, atol=0)


def test_half_of_the_blocks_are_made_and_count_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awq_gram, "WIDTH", 64)
    inputs = drawn(100, 1, 256)[0]
    square = Square.of(inputs)
    assert [tuple(block.shape) for block in square.blocks] == [(64, 64), (128, 64), (192, 64), (256, 64)]
    assert max(block.abs().max() for block in square.blocks) < 2 + 1e-6
    torch.testing.assert_close(square.blocks[0].diagonal(), torch.ones(64), rtol=1e-6, atol=0)
    rows = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    expected = (inputs.double() @ (rows.double() / square.norms).T).square().sum()
    torch.testing.assert_close(square.sum(rows), expected, rtol=1e-5, atol=0)


def test_channels_of_zeros_add_nothing_and_weights_of_zeros_lose_nothing() -> None:
    inputs, weight, vectors = drawn(200, 40, 256)
    inputs[:, 3:9] = 0
    found = squares(SEARCHES["nvfp4"], inputs, weight, *given("nvfp4", weight, vectors))
    torch.testing.assert_close(found, exactly("nvfp4", inputs, weight, vectors), rtol=1e-5, atol=0)
    zeros = torch.zeros_like(weight)
    assert not squares(SEARCHES["int4_g64"], inputs, zeros, *given("int4_g64", zeros, vectors)).any()
    nothing = torch.zeros_like(inputs)
    assert not squares(SEARCHES["int4_g64"], nothing, weight, *given("int4_g64", weight, vectors)).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_make_losses_that_are_not(bad: float) -> None:
    inputs, weight, vectors = drawn(20, 16, 128)
    for one in (inputs, weight):
        before, one[7, 100] = one[7, 100].item(), bad
        assert squares(SEARCHES["nvfp4"], inputs, weight, *given("nvfp4", weight, vectors)).isnan().all()
        one[7, 100] = before


def test_outputs_that_would_overflow_make_losses_that_are_not_finite() -> None:
    _, weight, vectors = drawn(4, 16, 128)
    inputs = torch.full((4, 128), 1e10).to(torch.bfloat16)
    large = torch.full_like(weight, 1e30)
    assert squares(SEARCHES["nvfp4"], inputs, large, *given("nvfp4", large, vectors)).isnan().all()


def test_it_is_worth_its_while_where_there_are_many_tokens() -> None:
    of_8b = {"qkv": (6144, 4096), "proj": (4096, 4096), "fc1": (28672, 4096), "fc2": (4096, 14336)}
    chosen = {tokens: [name for name, sizes in of_8b.items() if pays(tokens, *sizes)] for tokens in (512, 4096, 32768)}
    assert chosen == {512: [], 4096: ["qkv", "proj", "fc1"], 32768: [*of_8b]}
    assert not pays(1, 64, 64)


@pytest.mark.parametrize("path", SEARCHED, ids=lambda path: f"{path.parent.name} {path.stem}")
def test_it_chooses_modelopts_alpha_or_a_better_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ModelOpt rounds outputs. Of 48 tokens in one of these files that reverses two losses that lie closer than its roundings:
    0.02 % apart with them, and 0.19 % apart the other way without.
    """
    vector, key = load_file(path), search_of(path)
    losses, factors = found_by(ALWAYS, vector, key, monkeypatch)
    best, golden = losses.argmin().item(), ALPHAS.index(vector["search.best_alpha"].item())
    if (path.parent.name, path.stem) != ("NVFP4_AWQ", "s256x512"):
        assert best == golden
        torch.testing.assert_close(factors[best], vector["search.best_scale"], rtol=2**-20, atol=0)
        return
    exact = exactly(key, vector["in.x"].to(torch.bfloat16), vector["in.weight"], factors)
    assert best == exact.argmin()
    assert (best, golden) == (6, 5)
    assert exact[golden] > 1.0015 * exact[best]
    assert vector["search.loss"][best] < 1.0003 * vector["search.loss"][golden]


@pytest.mark.parametrize("path", SEARCHED, ids=lambda path: f"{path.parent.name} {path.stem}")
def test_both_ways_have_the_same_losses_but_for_roundings(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of outputs to bfloat16, 48 tokens of which are few."""
    vector, key = load_file(path), search_of(path)
    losses, outputs = (found_by(way, vector, key, monkeypatch)[0] for way in (ALWAYS, NEVER))
    torch.testing.assert_close(losses, outputs, rtol=0.02, atol=0)
    assert (losses != outputs).all() or not outputs.any()


def found_by(
    way: Callable[..., bool], vector: dict[str, Tensor], key: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor]:
    """Losses, and the factors of all alphas."""
    monkeypatch.setattr(awq_gram, "pays", way)
    means = {NAME: vector["search.act_scale"]}
    alphas = Alphas(alone(), means, lambda name: (key,), lambda values: values, {NAME: vector["in.weight"]})
    for batch in vector["in.x"].unflatten(0, (3, 4, 4)):
        alphas.linear(NAME, vector["in.weight"], batch)
    return alphas.losses[NAME, key], alphas.factors[NAME, key]
