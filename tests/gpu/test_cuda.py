"""CUDA writes the bytes that the CPU writes: every format on single weights, and a whole export."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_export import formats
from megatron_export.formats import FORMATS, KV_FORMATS
from megatron_export.piece import Amax

from ..models import ARCHITECTURES, LENGTH, SAMPLES, assert_same, same, tensors

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("seed", range(20))
def test_encoding_on_cuda_gives_the_bytes_of_the_cpu(name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(256, 1024, generator=generator) * torch.rand(256, 1, generator=generator)).to(torch.bfloat16)
    weight[seed] = 0
    amax = Amax(weight.abs().amax().float(), torch.rand((), generator=generator) * 100)
    on_cpu = formats.encode(FORMATS[name], weight, amax)
    on_cuda = formats.encode(FORMATS[name], weight.cuda(), Amax(amax.weight.cuda(), amax.input.cuda()))
    assert [suffix for suffix in on_cpu if not same(on_cuda[suffix].data.cpu(), on_cpu[suffix].data)] == []
    kv = KV_FORMATS["fp8"]
    for key, value in kv.encode(amax.weight, amax.input).items():
        assert same(kv.encode(amax.weight.cuda(), amax.input.cuda())[key].cpu(), value)


def export(ranks: int, *flags: object) -> None:
    """Run the command as a user does. On one GPU the ranks share it: NCCL takes ranks with host ids for far apart."""
    script = ROOT / "launch" / "export.py"
    inner = f'NCCL_HOSTID=$RANK exec "{sys.executable}" "{script}" ' + " ".join(map(str, flags))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--no-python"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [*torchrun, "bash", "-c", inner], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["llama31", "qwen2"])
def test_nccl_at_tp2_and_gloo_on_the_cpu_write_what_one_gpu_writes(name: str, models: dict, tmp_path: Path) -> None:
    assert name in ARCHITECTURES
    ids = models[name].parent / "ids" / "calibration.safetensors"
    file = tmp_path / "calibration.safetensors"
    common = ("--hf-model", models[name], "--format", "nvfp4", "--kv-cache", "fp8")
    measured = ("--calib-data", ids, "--calib-samples", SAMPLES, "--calib-seq-len", LENGTH, "--save-calibration", file)
    export(1, *common, *measured, "--output", tmp_path / "gpu")
    export(2, *common, "--load-calibration", file, "--tp", 2, "--output", tmp_path / "nccl")
    export(2, *common, "--load-calibration", file, "--pp", 2, "--output", tmp_path / "nccl-pp")
    export(2, *common, "--load-calibration", file, "--tp", 2, "--device", "cpu", "--output", tmp_path / "gloo")
    for other in ("nccl", "nccl-pp", "gloo"):
        assert_same(tensors(tmp_path / other), tensors(tmp_path / "gpu"))
