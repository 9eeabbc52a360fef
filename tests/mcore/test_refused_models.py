"""Live models that config.json does not describe are refused; what Megatron put off is finished before the export."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from megatron_export import ExportError, calibrate, export_hf_checkpoint
from megatron_export.mcore.cpu_compat import without_cuda

from ..support.live import blank, loaded, refusal
from ..support.models import EXAMPLE, read_json
from ..support.ranks import Ranks, command

pytestmark = pytest.mark.whole

# Model -> setting -> what the model has, what config.json means.
CONTRADICTIONS: dict[str, dict[str, tuple[Any, str]]] = {
    "example": {
        "rotary_interleaved": (True, "False"),
        "layernorm_zero_centered_gamma": (True, "False"),
        "layernorm_epsilon": (1e-2, "1e-06"),
        "num_query_groups": (2, "4"),
    },
    "deepseek_v3": {
        "moe_router_topk": (1, "2"),
        "moe_router_score_function": ("softmax", "'sigmoid'"),
        "moe_router_topk_scaling_factor": (None, "2.5"),
        "moe_expert_capacity_factor": (1.0, "None"),
        "window_size": ((127, 0), "None"),
        "v_head_dim": (8, "16"),
    },
}


def export_with(source: Path, folder: Path, settings: dict, **config: float) -> str:
    """In a rank of TP=2: what an export says of a model whose TransformerConfig, or rotation, is not what config.json means."""
    with blank(read_json(source / "config.json") | config, None if settings else 8, tp=2) as (model, _):
        vars(model.config).update(settings)
        return refusal(export_hf_checkpoint, model, folder, hf_model=source, format="bf16")


@pytest.mark.parametrize(
    ("model", "name"), [(model, name) for model, names in CONTRADICTIONS.items() for name in names]
)
def test_a_model_that_computes_something_else_is_refused(
    model: str, name: str, models: dict, ranks: Ranks, tmp_path: Path
) -> None:
    has, means = CONTRADICTIONS[model][name]
    latent = {"kv_channels": 128} if model == "deepseek_v3" else {}  # which latent attention does not read
    source = models.get(model, EXAMPLE)
    said = ranks.call(2, export_with, source, tmp_path / "out", {name: has} | latent)
    assert said == [f"the model has {name} = {has!r}, but config.json means {means}"] * 2
    assert list(tmp_path.iterdir()) == []


def test_another_rotary_base_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    said = ranks.call(2, export_with, EXAMPLE, tmp_path / "out", {}, rope_theta=5e5)
    assert said == ["the model has rotary_base = 500000.0, but config.json means 10000.0"] * 2


def syncs(folder: Path, overlap: bool) -> list[dict]:
    """With which arguments the exports of a model in Megatron's DDP made it gather its parameters."""
    with loaded(EXAMPLE, length=16) as (model, _):
        settings = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True)
        with without_cuda():
            wrapped = DistributedDataParallel(model.config, settings, model)
        settings.overlap_param_gather = overlap
        with mock.patch.object(wrapped, "start_param_sync") as sync:
            calibrate(wrapped, [torch.ones(1, 16, dtype=torch.int64)])
            export_hf_checkpoint(wrapped, folder, hf_model=EXAMPLE, format="bf16")
            return [call.kwargs for call in sync.call_args_list]


def test_parameters_that_ddp_gathers_late_are_gathered_first(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.call(1, syncs, tmp_path / "overlapped", True) == [[{"force_sync": True}] * 2]
    assert ranks.call(1, syncs, tmp_path / "plain", False) == [[]]


def sent_through_gradients(folder: Path) -> tuple[str, int, bool]:
    """What is said of MXFP8 weights that travel in the gradients' memory, before and after the caller has sent them; whether it
    exports then.
    """
    with loaded(EXAMPLE, length=16) as (model, _):
        settings = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True)
        with without_cuda():
            wrapped = DistributedDataParallel(model.config, settings, model)
        settings.overlap_param_gather = settings.reuse_grad_buf_for_mxfp8_param_ag = True
        with mock.patch.object(wrapped, "start_param_sync") as sync:
            with pytest.raises(ExportError) as refusal:
                export_hf_checkpoint(wrapped, folder, hf_model=EXAMPLE, format="bf16")
            for group in wrapped.bucket_groups:
                group.param_gather_dispatched = True
            export_hf_checkpoint(wrapped, folder, hf_model=EXAMPLE, format="bf16")
            return str(refusal.value), sync.call_count, (folder / "config.json").exists()


def test_weights_that_travel_through_gradients_must_have_been_sent(ranks: Ranks, tmp_path: Path) -> None:
    ((said, calls, exported),) = ranks.call(1, sent_through_gradients, tmp_path / "out")
    assert "call optimizer.prepare_model_params_for_param_sync(), then start_param_sync(force_sync=True)" in said
    assert (calls, exported) == (0, True)


def calibrated_beside_a_gpu(*flags: object) -> tuple[int, str]:
    """The command with --device cpu where torch says that there is CUDA."""
    with mock.patch.object(torch.cuda, "is_available", lambda: True):
        return command("--device", "cpu", "--calib-samples", 4, "--calib-seq-len", 16, *flags)


def test_device_cpu_calibrates_on_a_machine_with_a_gpu_too(ranks: Ranks, tmp_path: Path) -> None:
    results = ranks.call(2, calibrated_beside_a_gpu, "--pp", 2, "--output", tmp_path / "out")
    assert [status for status, _ in results] == [0, 0], results


def too_few_gpus(*flags: object) -> tuple[int, str]:
    """The command on the second machine of two, where there are fewer GPUs than ranks."""
    import os

    os.environ["LOCAL_RANK"] = "0"
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(torch.cuda, "device_count", lambda: 1),
    ):
        return command("--device", "cuda", *flags)


def test_the_first_rank_of_each_machine_tells_what_is_wrong_with_it(ranks: Ranks, tmp_path: Path) -> None:
    for status, said in ranks.call(2, too_few_gpus, "--output", tmp_path / "out"):
        assert status == 1
        assert "error: 2 ranks on a machine with 1 GPUs" in said
