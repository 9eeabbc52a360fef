"""What a calibration run takes is told before: a bound, and not far above what is measured."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_export.calibration.memory import MicroBatch, calibration_bytes
from megatron_export.cli.config import configured
from megatron_export.cli.plan_command import previewed
from megatron_export.formats import Options, awq_gram
from megatron_export.planning.plan import assumed
from megatron_export.planning.rank_placement import grid_of

from ..cli.test_plan_command import peak_of
from ..support.configs import LLAMA, QWEN_MOE
from ..support.models import EXAMPLE, make_model
from ..support.plans import plan_for

SMALL = {"num_hidden_layers": 2, "max_position_embeddings": 1024}
WIDE = SMALL | {"vocab_size": 64000}
CASES = {  # which takes most: sizes, samples of a micro-batch, tokens, what is set beside the format
    "logits": (WIDE, 8, 256, "lm_head=fp8"),
    "no logits": (WIDE | {"hidden_size": 256}, 16, 512, "lm_head=bf16"),
    "scores": (SMALL | {"num_attention_heads": 16, "num_key_value_heads": 16}, 4, 1024, "lm_head=bf16"),
    "gate and up": (SMALL | {"hidden_size": 256, "intermediate_size": 16384}, 8, 512, "lm_head=bf16"),
}


@pytest.mark.whole
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in ("gate and up", "scores") else name for name in CASES],
)
def test_a_calibration_run_takes_at_most_what_was_told_and_half_as_much_at_least(name: str, tmp_path: Path) -> None:
    """Beside the weights: of the whole command, from the first import on, with a run and with its statistics loaded.

    oneDNN packs weights for a multiplication as suits the CPU: up to 8 % of all that was told on those seen so far.
    Without AVX512 products are made in float32, which takes copies: 10 % more than was told without logits, not 2 %.
    """
    sizes, samples, length, line = CASES[name]
    source = make_model(tmp_path, "qwen2", **sizes)
    save_file({"input_ids": torch.arange(samples * length).view(samples, length) % 500}, tmp_path / "ids.safetensors")
    file = tmp_path / "statistics.safetensors"
    flags = ["--hf-model", str(source), "--format", "fp8", "--set", line, "--device", "cpu"]
    data = ["--calib-data", str(tmp_path / "ids.safetensors"), "--calib-batch-size", str(samples)]
    with_run = peak_of(*flags, *data, "--save-calibration", str(file), "--output", str(tmp_path / "one"))
    without = peak_of(*flags, "--load-calibration", str(file), "--output", str(tmp_path / "other"))
    settings = {"hf_model": str(source), "format": "fp8", "set": (line,), "device": "cpu", "dry_run": True}
    shape = {"calib_batch_size": samples, "calib_seq_len": length}
    (told,), (plain,) = (
        previewed(configured(**settings, **shape, **more), EXAMPLE, 1).forecast.host
        for more in ({}, {"load_calibration": file})
    )
    print(f"{name}: told {told - plain:,}, measured {with_run - without:,}")
    assert 0.5 * (told - plain) < with_run - without < 1.1 * (told - plain) + 20_000_000


def told(
    config: dict, batch: MicroBatch, form: str = "fp8", options: Options | None = None, head: bool = False, **sizes: int
) -> int:
    sizes = {"tp": 1} | sizes
    more = ({"options": options} if options else {}) | ({"set": ("lm_head=fp8",)} if head else {})
    plan = plan_for(config, assumed(config, **sizes), format=form, **more)
    return calibration_bytes(plan, grid_of(config, **sizes), batch, "cuda")


def test_it_grows_with_the_samples_and_shrinks_with_tensor_parallelism() -> None:
    wide = LLAMA | {"hidden_size": 64, "vocab_size": 128_000}
    one, two = (told(wide, MicroBatch(samples, 128), head=True) for samples in (4, 8))
    assert two == 2 * one
    assert told(wide, MicroBatch(8, 128), head=True, tp=4) < two // 3
    assert told(wide, MicroBatch(8, 128)) < two // 3  # no logits


def test_it_knows_experts_their_exchange_losses_and_searches() -> None:
    batch = MicroBatch(4, 128)
    wide = QWEN_MOE | {"moe_intermediate_size": 8192}
    assert told(wide, batch, ep=4) > told(wide, batch, ep=2) > told(wide, batch)
    searched, clipped = (told(LLAMA, batch, "nvfp4_awq", Options(awq_clip=clip)) for clip in (False, True))
    assert clipped - searched == 1 << 30
    assert searched > told(LLAMA, batch)


def test_a_search_of_many_tokens_takes_a_square_of_inputs_in_place_of_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the linear that takes most: its gathered input, the square, a block of outputs, copies of its weight, one strip."""
    of_8b = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128, "max_position_embeddings": 1024}
    config, batch = LLAMA | of_8b, MicroBatch(64, 512)
    searched = told(config, batch, "int4_awq") - told(config, batch)
    square, strip = 6 * 14336**2, 24 << 22
    assert searched == 4 * batch.tokens * 14336 + square + 4 * 4096 * 1024 + 8 * 4096 * 14336 + strip
    monkeypatch.setattr(awq_gram, "pays", lambda *sizes: False)
    assert told(config, batch, "int4_awq") > told(config, batch) + 2 * searched


def test_more_samples_never_take_less_as_the_last_micro_batch_may_have_fewer() -> None:
    """Near the number of tokens from which squares pay, which take less than the outputs of the tokens just before."""
    of_8b = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128, "max_position_embeddings": 1024}
    found = [told(LLAMA | of_8b, MicroBatch(samples, 512), "int4_awq") for samples in range(1, 24)]
    assert found == sorted(found)
