"""What is refused of models with experts or latent attention, in time and on every rank; and two scales that must be one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_export import ExportError, calibrate, export_hf_checkpoint
from megatron_export.checkpoint import hf_folder
from megatron_export.mcore import build, load_hf, parallel_state

from ..support.models import make_model, same, tensors
from ..support.ranks import Ranks
from ..support.refusals import assert_says, refused
from .test_topologies import calibration_flags, export

pytestmark = pytest.mark.whole


def ids(count: int) -> torch.Tensor:
    return torch.randint(0, 500, (count, 24), generator=torch.Generator().manual_seed(3))


def calibrated(source: Path, shares: list[list[int]]) -> str:
    """In a rank of EP=2: what a calibration says when the replicas are given batches of these sizes."""
    config = hf_folder.read_config(source)
    with parallel_state.started(1, 1, "cpu", ep=2), parallel_state.current() as here:
        model = build.build_model(config, here, max_sequence_length=24)
        load_hf.load_hf_weights(model, source, config, here)
        try:
            calibrate(model, [ids(size) for size in shares[here.rank]])
        except ExportError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("shares", [[[2, 2], [2]], [[2, 2], [2, 1]]])
def test_replicas_that_exchange_tokens_but_have_other_batches_are_refused_on_every_rank(
    shares: list[list[int]], models: dict, ranks: Ranks
) -> None:
    for said in ranks.call(2, calibrated, models["qwen3_moe"], shares):
        assert said.startswith("the experts of a layer are spread over data-parallel replicas")
        assert "Give all as many" in said


@pytest.mark.parametrize("samples", [6, 7])
def test_samples_that_do_not_fill_the_batches_of_all_replicas_are_refused_before_anything_is_read(
    samples: int, models: dict, ranks: Ranks, tmp_path: Path
) -> None:
    data = models["qwen3_moe"].parent / "ids" / "calibration.safetensors"
    flags = ("--calib-data", data, "--calib-samples", samples, "--calib-seq-len", 24, "--calib-batch-size", 2)
    place = tmp_path / "place"
    place.mkdir()
    said = refused(ranks, tmp_path, "--ep", 2, "--hf-model", models["qwen3_moe"], *flags, "--output", place / "out")
    assert_says(said, f"--calib-samples {samples} is no multiple of --calib-batch-size 2 x 2")


def test_routing_that_megatron_computes_otherwise_is_refused_for_calibration_only(ranks: Ranks, tmp_path: Path) -> None:
    groups = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 2}
    source = make_model(tmp_path / "models", "deepseek_v3", **groups)
    place = tmp_path / "place"
    place.mkdir()
    said = refused(ranks, tmp_path, "--hf-model", source, *calibration_flags(source), "--output", place / "out")
    assert_says(said, "2 experts of 2 of 4 groups", "cannot be calibrated")
    export(ranks, 2, "--hf-model", source, "--format", "fp8_pb", "--ep", 2, "--output", place / "out")


CONTRADICTIONS = {
    "moe_router_topk": (1, "2"),
    "moe_router_score_function": ("softmax", "'sigmoid'"),
    "moe_router_topk_scaling_factor": (None, "2.5"),
    "moe_expert_capacity_factor": (1.0, "None"),
    "window_size": ((127, 0), "None"),
    "v_head_dim": (8, "16"),
}


def contradicted(source: Path, out: Path, name: str, value: object) -> str:
    """In a rank: what an export says of a model with another setting than config.json's."""
    config = hf_folder.read_config(source)
    with parallel_state.started(1, 1, "cpu"):
        with parallel_state.current() as here:
            model = build.build_model(config, here, max_sequence_length=None)
        setattr(model.config, name, value)
        model.config.kv_channels = 128  # which latent attention does not read
        try:
            export_hf_checkpoint(model, out, hf_model=source, format="bf16")
        except ExportError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_model_that_routes_or_attends_otherwise_is_refused(
    name: str, models: dict, ranks: Ranks, tmp_path: Path
) -> None:
    has, means = CONTRADICTIONS[name]
    assert ranks.call(1, contradicted, models["deepseek_v3"], tmp_path / "out", name, has) == [
        f"the model has {name} = {has!r}, but config.json means {means}"
    ]


def test_the_projections_to_latents_share_one_clipped_scale(ranks: Ranks, tmp_path: Path) -> None:
    """Of their two clip ratios the larger is taken, so that neither loses more than it chose to."""
    source = make_model(tmp_path, "deepseek_v3", q_lora_rank=64)
    file = tmp_path / "c.safetensors"
    common = ("--hf-model", source, "--format", "nvfp4_awq", "--quantize-mla", "--awq-clip")
    export(
        ranks, 2, *common, *calibration_flags(source), "--tp", 2, "--save-calibration", file, "--output", tmp_path / "a"
    )
    found = load_file(file)
    attention = "model.layers.1.self_attn."
    found[f"{attention}q_a_proj.clip_ratio.nvfp4"] = torch.tensor(0.5)
    found[f"{attention}kv_a_proj_with_mqa.clip_ratio.nvfp4"] = torch.tensor(0.75)
    scales = []
    for name, ratios in (("clipped", found), ("whole", found | {
        f"{attention}{part}.clip_ratio.nvfp4": torch.tensor(1.0) for part in ("q_a_proj", "kv_a_proj_with_mqa")
    })):  # fmt: skip
        metadata = _metadata(file)
        save_file(ratios, tmp_path / f"{name}.safetensors", metadata=metadata)
        export(ranks, 1, *common, "--load-calibration", tmp_path / f"{name}.safetensors", "--output", tmp_path / name)
        written = tensors(tmp_path / name)
        both = [written[f"{attention}{part}.weight_scale_2"] for part in ("q_a_proj", "kv_a_proj_with_mqa")]
        assert same(*both)
        scales.append(both[0])
    torch.testing.assert_close(scales[0] / scales[1], torch.tensor(0.75), rtol=1e-6, atol=0)  # float32 division


def _metadata(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return opened.metadata()
