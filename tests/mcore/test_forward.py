"""The Megatron model that is calibrated computes what the HF model computes: same logits, in float32, at TP 1 and 2."""

from pathlib import Path

import pytest
import torch

from megatron_export.mcore.cpu_compat import without_cuda

from ..support.live import loaded
from ..support.models import ARCHITECTURES, auto_model, make_model, read_json
from ..support.ranks import Ranks

pytestmark = pytest.mark.whole


def megatron_logits(source: Path, ids: torch.Tensor, tp: int) -> torch.Tensor:
    """This rank's columns of the logits [batch, tokens, vocabulary / tp]."""
    biased = read_json(source / "config.json")["architectures"] == ["GptOssForCausalLM"]
    etp, length = 1 if biased else None, ids.shape[1]  # Megatron-Core does not cut experts with biases
    with loaded(source, tp, etp=etp, length=length, dtype=torch.float32) as (model, _):
        mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
        with torch.no_grad(), without_cuda():
            return model.eval()(ids, torch.arange(length).expand_as(ids), mask)


def assert_same_logits(name: str, source: Path, tp: int, ranks: Ranks) -> None:
    """Float32 sums in an order of the processor's: 4e-5 of logits around 10, where a wrong row or rotation shows as 1."""
    ids = torch.randint(0, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = auto_model(name).from_pretrained(source, dtype=torch.float32)(input_ids=ids).logits
    found = torch.cat(ranks.call(tp, megatron_logits, source, ids, tp), dim=2)[..., : expected.shape[2]]
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=4e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_equal_those_of_transformers(name: str, tp: int, ranks: Ranks, models: dict) -> None:
    assert_same_logits(name, models[name], tp, ranks)


@pytest.mark.parametrize("tp", [2, 4])
def test_logits_are_the_same_with_more_ranks_than_query_groups(tp: int, ranks: Ranks, tmp_path: Path) -> None:
    assert_same_logits("qwen2", make_model(tmp_path, "qwen2", num_key_value_heads=1), tp, ranks)
