"""Live models that config.json does not describe are refused; what Megatron put off is finished before the export."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from megatron_export import ExportError, calibrate, export_hf_checkpoint
from megatron_export.checkpoint import hf_folder
from megatron_export.mcore import build, load_hf, parallel_state
from megatron_export.mcore.cpu_compat import without_cuda

from ..support.models import EXAMPLE
from ..support.ranks import Ranks, command

pytestmark = pytest.mark.whole

CONTRADICTIONS: dict[str, tuple[Any, str]] = {
    "rotary_interleaved": (True, "False"),
    "layernorm_zero_centered_gamma": (True, "False"),
    "layernorm_epsilon": (1e-2, "1e-06"),
    "num_query_groups": (2, "4"),
}


def refusal(folder: Path, name: str, value: object) -> str:
    """What an export says of a model whose TransformerConfig is not what config.json means."""
    config = hf_folder.read_config(EXAMPLE)
    with parallel_state.started(2, 1, "cpu"):
        with parallel_state.current() as here:
            model = build.build_model(config, here, max_sequence_length=None)
        setattr(model.config, name, value)
        try:
            export_hf_checkpoint(model, folder, hf_model=EXAMPLE, format="bf16")
        except ExportError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_model_that_computes_something_else_is_refused(name: str, ranks: Ranks, tmp_path: Path) -> None:
    has, means = CONTRADICTIONS[name]
    said = ranks.call(2, refusal, tmp_path / "out", name, has)
    assert said == [f"the model has {name} = {has!r}, but config.json means {means}"] * 2
    assert list(tmp_path.iterdir()) == []


def rotary_base_refusal(folder: Path) -> str:
    config = hf_folder.read_config(EXAMPLE)
    with parallel_state.started(1, 1, "cpu"):
        with parallel_state.current() as here:
            model = build.build_model(config | {"rope_theta": 5e5}, here, max_sequence_length=8)
        try:
            export_hf_checkpoint(model, folder, hf_model=EXAMPLE, format="bf16")
        except ExportError as error:
            return str(error)
    return ""


def test_another_rotary_base_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.call(1, rotary_base_refusal, tmp_path / "out") == [
        "the model has rotary_base = 500000.0, but config.json means 10000.0"
    ]


def syncs(folder: Path, overlap: bool) -> list[dict]:
    """With which arguments the exports of a model in Megatron's DDP made it gather its parameters."""
    config = hf_folder.read_config(EXAMPLE)
    with parallel_state.started(1, 1, "cpu"):
        with parallel_state.current() as here:
            model = build.build_model(config, here, max_sequence_length=16, initialize=True)
            load_hf.load_hf_weights(model, EXAMPLE, config, here)
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
