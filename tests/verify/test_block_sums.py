"""Sums of blocks, by which weights are compared: exact, in one order, and no other figures where a way is shorter."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_export.common.piece import Amax
from megatron_export.formats import chosen
from megatron_export.planning.parameter import Item
from megatron_export.verify import snr
from megatron_export.verify.block_sums import block_sums, totals, turned, turned_sums, turns

from ..support.models import make_model, read_json
from ..support.plans import plan_of


@pytest.fixture
def item(tmp_path: Path) -> Item:
    """A parameter that is quantized."""
    config = read_json(make_model(tmp_path, "llama31") / "config.json")
    return next(item for item in plan_of(config, format="fp8").items if item.form)


@pytest.mark.parametrize(("high", "wide"), [(1, 16), (1, 37), (8, 16), (5, 7), (10, 37)])
def test_sums_of_blocks_are_exact_on_whole_numbers(high: int, wide: int) -> None:
    values = torch.arange(10 * 37, dtype=torch.float32).view(10, 37)
    said = [
        [float(values[row : row + high, column : column + wide].sum()) for column in range(0, 37, wide)]
        for row in range(0, 10, high)
    ]
    assert block_sums(values.clone(), high, wide).tolist() == said
    assert totals(values, -values).tolist() == [[370 * 369 / 2], [-370 * 369 / 2]]
    assert totals(values, strips=2).tolist() == [[185 * 184 / 2, (370 * 369 - 185 * 184) / 2]]


@pytest.mark.parametrize("wide", [8, 16, 32])
def test_turned_blocks_are_added_in_the_same_order(wide: int) -> None:
    """Numbers of many sizes: in another order they would round to other sums."""
    values = torch.randn(7, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 96)
    assert turns(values, wide)
    expected = block_sums(values.clone(), 1, wide)
    assert torch.equal(turned_sums(turned(values, wide), 7), expected)
    assert not torch.equal(sum(values.unflatten(1, (-1, wide)).unbind(2)), expected)
    odd = values > 0
    assert torch.equal(turned_sums(turned(odd, wide).float(), 7), block_sums(odd.float(), 1, wide))


def test_only_small_whole_blocks_are_turned() -> None:
    values = torch.empty(2, 48)
    assert [wide for wide in (8, 12, 16, 32, 48) if turns(values, wide)] == [8, 16]
    assert not turns(values.to("meta"), 16)


@pytest.mark.parametrize("name", ["fp8", "fp8_pb", "nvfp4", "mxfp4", "int4_awq"])
def test_what_is_as_rounding_gives_it_has_the_figures_of_the_long_way(
    name: str, item: Item, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a count of the codes that differ, which are none, every block is compared with rounding."""
    form = chosen(name)
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0)).mul(0.02).to(torch.bfloat16)
    weight[3], weight[5, 7] = 0, 40
    pieces = form.encode(weight, Amax(weight.abs().max().float(), torch.ones(())))
    target = weight.float()
    three = form.decode(pieces), target, form.requantize(target, pieces)
    assert torch.equal(three[0], three[2])
    found = []
    for count in (snr.count, lambda odd: torch.tensor(1)):
        monkeypatch.setattr(snr, "count", count)
        found.append(snr.Likeness(name, form, False, tuple(weight.shape)))
        snr._add(found[-1:], replace(item, form=form), three, 0, 2.0**-8)
    short, long = map(vars, found)
    assert (short.pop("codes"), long.pop("codes")) == (0, 1)
    assert short == long
    assert short["noise"] > 0
