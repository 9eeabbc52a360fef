"""What is refused of models with experts or latent attention, in time and on every rank; and two scales that must be one."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_export import calibrate

from ..support.live import loaded, refusal
from ..support.models import make_model, same, tensors
from ..support.ranks import Ranks
from ..support.refusals import assert_says, refused
from .test_topologies import calibration_flags, export

pytestmark = pytest.mark.whole


def calibrated(source: Path, shares: list[list[int]]) -> str:
    """In a rank of EP=2: what a calibration says when the replicas are given batches of these sizes."""
    ids = torch.randint(0, 500, (2, 24), generator=torch.Generator().manual_seed(3))
    with loaded(source, ep=2) as (model, here):
        return refusal(calibrate, model, [ids[:size] for size in shares[here.rank]])


@pytest.mark.parametrize("shares", [[[2, 2], [2]], [[2, 2], [2, 1]]])
def test_replicas_that_exchange_tokens_but_have_other_batches_are_refused_on_every_rank(
    shares: list[list[int]], models: dict, ranks: Ranks
) -> None:
    for said in ranks.call(2, calibrated, models["qwen3_moe"], shares):
        assert said.startswith("the experts of a layer are spread over data-parallel replicas")
        assert "Give all as many" in said


@pytest.mark.parametrize("samples", [6, 7])
def test_samples_that_do_not_fill_the_batches_of_all_replicas_are_refused_before_anything_is_read(
    samples: int, models: dict, ranks: Ranks, output: Path, tmp_path: Path
) -> None:
    data = models["qwen3_moe"].parent / "ids" / "calibration.safetensors"
    flags = ("--calib-data", data, "--calib-samples", samples, "--calib-seq-len", 24, "--calib-batch-size", 2)
    said = refused(ranks, tmp_path, "--ep", 2, "--hf-model", models["qwen3_moe"], *flags, "--output", output)
    assert_says(said, f"--calib-samples {samples} is no multiple of --calib-batch-size 2 x 2")


def test_routing_that_megatron_computes_otherwise_is_refused_for_calibration_only(
    ranks: Ranks, output: Path, tmp_path: Path
) -> None:
    groups = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 2}
    source = make_model(tmp_path / "models", "deepseek_v3", **groups)
    said = refused(ranks, tmp_path, "--hf-model", source, *calibration_flags(source), "--output", output)
    assert_says(said, "2 experts of 2 of 4 groups", "cannot be calibrated")
    export(ranks, 2, "--hf-model", source, "--format", "fp8_pb", "--ep", 2, "--output", output)


def test_the_projections_to_latents_share_one_clipped_scale(ranks: Ranks, tmp_path: Path) -> None:
    """Of their two clip ratios the larger is taken, so that neither loses more than it chose to."""
    source = make_model(tmp_path, "deepseek_v3", q_lora_rank=64)
    file = tmp_path / "c.safetensors"
    common = ("--hf-model", source, "--format", "nvfp4_awq", "--quantize-mla", "--awq-clip")
    measured = ("--tp", 2, *calibration_flags(source), "--save-calibration", file)
    export(ranks, 2, *common, *measured, "--output", tmp_path / "a")
    parts = [f"model.layers.1.self_attn.{part}" for part in ("q_a_proj", "kv_a_proj_with_mqa")]
    found, scales = load_file(file), []
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    for name, ratios in (("clipped", (0.5, 0.75)), ("whole", (1.0, 1.0))):
        found |= {f"{part}.clip_ratio.nvfp4": torch.tensor(ratio) for part, ratio in zip(parts, ratios, strict=True)}
        save_file(found, tmp_path / f"{name}.safetensors", metadata=metadata)
        export(ranks, 1, *common, "--load-calibration", tmp_path / f"{name}.safetensors", "--output", tmp_path / name)
        written = tensors(tmp_path / name)
        both = [written[f"{part}.weight_scale_2"] for part in parts]
        assert same(*both)
        scales.append(both[0])
    torch.testing.assert_close(scales[0] / scales[1], torch.tensor(0.75), rtol=1e-6, atol=0)  # float32 division
