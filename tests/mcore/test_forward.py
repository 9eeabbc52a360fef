"""The Megatron model that is calibrated computes what the HF model computes: same logits, in float32, at TP 1 and 2."""

from pathlib import Path

import pytest
import torch

from megatron_export.checkpoint import hf_folder
from megatron_export.mcore import build, load_hf, parallel_state
from megatron_export.mcore.cpu_compat import without_cuda

from ..support.models import ARCHITECTURES, auto_model, make_model
from ..support.ranks import Ranks

pytestmark = pytest.mark.whole


def megatron_logits(source: Path, ids: torch.Tensor, tp: int) -> torch.Tensor:
    """This rank's columns of the logits [batch, tokens, vocabulary / tp]."""
    config = hf_folder.read_config(source)
    biased = config["architectures"] == ["GptOssForCausalLM"]  # whose experts Megatron-Core does not cut
    with parallel_state.started(tp, 1, "cpu", etp=1 if biased else None), parallel_state.current() as here:
        length = ids.shape[1]
        model = build.build_model(config, here, max_sequence_length=length, dtype=torch.float32)
        load_hf.load_hf_weights(model, source, config, here)
        mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
        with torch.no_grad(), without_cuda():
            return model.eval()(ids, torch.arange(length).expand_as(ids), mask)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_equal_those_of_transformers(name: str, tp: int, ranks: Ranks, models: dict) -> None:
    """Float32 sums in another order: 2e-5 of logits around 10, where a wrong row or rotation shows as 1."""
    ids = torch.randint(0, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = auto_model(name).from_pretrained(models[name], dtype=torch.float32)(input_ids=ids).logits
    found = torch.cat(ranks.call(tp, megatron_logits, models[name], ids, tp), dim=2)[..., : expected.shape[2]]
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("tp", [2, 4])
def test_logits_are_the_same_with_more_ranks_than_query_groups(tp: int, ranks: Ranks, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = make_model(tmp_path, "qwen2", num_key_value_heads=1)
    ids = torch.randint(0, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(ids).logits
    found = torch.cat(ranks.call(tp, megatron_logits, source, ids, tp), dim=2)[..., : expected.shape[2]]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
