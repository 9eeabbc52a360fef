"""Experts in stacks, as `save_pretrained(save_original_format=False)` of transformers 5 saves them, are read one by one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from megatron_export.checkpoint.hf_weights import SourceWeights
from megatron_export.common.errors import ExportError
from megatron_export.models import parameters_of
from megatron_export.models.sources import expected_shapes
from megatron_export.verify.judge import judge

from ..export.test_topologies import calibration_flags, export
from ..support.models import assert_same, make_model, read_json, tensors
from ..support.ranks import Ranks

NAMES = ("qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe")


def stacked(source: Path, folder: Path) -> Path:
    """The same model as transformers 5 has it in memory."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    model.save_pretrained(folder, save_original_format=False)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_has_its_own_name_and_bytes(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    folder, expected = stacked(models[name], tmp_path / name), tensors(models[name])
    assert any(key.endswith(".mlp.experts.gate_up_proj") for key in tensors(folder))
    config = read_json(models[name] / "config.json")
    with SourceWeights(folder, config=config) as weights:
        weights.check(expected_shapes(parameters_of(config).values()), spare="lm_head.weight")
        assert weights.files.keys() == expected.keys()
        for key, tensor in expected.items():
            whole = (slice(None),) * tensor.dim()
            assert torch.equal(weights.read(key, whole, tensor.dtype), tensor)
            half = (slice(len(tensor) // 2, None), *whole[1:])
            assert torch.equal(weights.read(key, half, tensor.dtype), tensor[half[0]])


@pytest.mark.parametrize(("name", "sizes"), [("qwen3_moe", ("--tp", 2, "--etp", 2)), ("mixtral", ("--ep", 2))])
def test_an_export_of_stacks_is_that_of_the_experts_one_by_one(
    name: str, sizes: tuple, models: dict[str, Path], ranks: Ranks, tmp_path: Path
) -> None:
    folder = stacked(models[name], tmp_path / "stacked")
    common = ("--format", "fp8", *calibration_flags(models[name]))
    export(ranks, 1, "--hf-model", models[name], *common, "--output", tmp_path / "one")
    export(ranks, 2, "--hf-model", folder, *common, *sizes, "--calib-batch-size", 4, "--output", tmp_path / "two")
    assert sorted(tensors(tmp_path / "two")) == sorted(tensors(tmp_path / "one"))
    export(ranks, 2, "--hf-model", folder, "--format", "bf16", *sizes, "--output", tmp_path / "plain")
    assert_same(tensors(tmp_path / "plain"), tensors(models[name]))
    assert judge(tmp_path / "one", folder).problems == []


def test_a_stack_of_other_experts_is_refused_by_name(tmp_path: Path) -> None:
    source = make_model(tmp_path, "qwen3_moe")
    folder, config = stacked(source, tmp_path / "stacked"), read_json(source / "config.json")
    held = tensors(folder)
    name = "model.layers.0.mlp.experts.down_proj"
    held[name] = held[name][:3]
    save_file({key: tensor.contiguous() for key, tensor in held.items()}, folder / "model.safetensors")
    with SourceWeights(folder, config=config) as weights, pytest.raises(ExportError) as caught:
        weights.check(expected_shapes(parameters_of(config).values()))
    assert "model.layers.0.mlp.experts.0.down_proj.weight is (3, 64, 48), but config.json means (64, 48)" in str(
        caught.value
    )
