"""Originals of every kind are judged against: layers that predict one more token, blocks of FP8, ties, stacks, copied towers."""

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from megatron_export.models import without_mtp
from megatron_export.verify.judge import judge

from ..support.exported import exported
from ..support.models import add_mtp, make_model, read_json, tensors


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = make_model(tmp_path_factory.mktemp("deepseek"), "deepseek_v3")
    add_mtp(source)
    return source


def sound(folder: Path, reference: Path) -> int:
    """How many weights were compared; none is wrong."""
    judged = judge(folder, reference)
    assert judged.problems == []
    return len(judged.weights)


@pytest.mark.parametrize("format", ["fp8_pb", "nvfp4_awq"])
def test_layers_that_predict_one_more_token_are_judged(format: str, deepseek: Path, tmp_path: Path) -> None:
    exported(deepseek, tmp_path / format, format)
    assert sound(tmp_path / format, deepseek) == len(tensors(deepseek))


def test_layers_that_were_dropped_are_not_missed(deepseek: Path, tmp_path: Path) -> None:
    source, held = tmp_path / "source", tensors(deepseek)
    source.mkdir()
    kept = {name: tensor for name, tensor in held.items() if not name.startswith("model.layers.4.")}
    save_file(kept, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(without_mtp(read_json(deepseek / "config.json"))))
    exported(source, tmp_path / "out", "nvfp4")
    assert sound(tmp_path / "out", deepseek) == len(kept)


def test_o_proj_alone_of_latent_attention_may_be_quantized(deepseek: Path, tmp_path: Path) -> None:
    """As in published checkpoints in NVFP4, whose other projections stay in bfloat16."""
    parts = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
    exclude = tuple(f"model.layers.*.self_attn.{part}" for part in parts)
    exported(deepseek, tmp_path / "out", "nvfp4", quantize_mla=True, exclude=exclude)
    quantized = [name for name in tensors(tmp_path / "out") if "self_attn" in name and name.endswith(".weight_scale_2")]
    assert len(quantized) == 5 and all(".o_proj." in name for name in quantized)
    assert sound(tmp_path / "out", deepseek) == len(tensors(deepseek))


def test_an_original_in_blocks_of_fp8_is_multiplied_out(deepseek: Path, tmp_path: Path) -> None:
    exported(deepseek, tmp_path / "blocks", "fp8_pb")
    exported(tmp_path / "blocks", tmp_path / "out", "nvfp4")
    assert sound(tmp_path / "out", tmp_path / "blocks") == len(tensors(deepseek))


@pytest.mark.parametrize(
    ("name", "format"),
    [("llama4", "fp8"), ("gpt_oss", "nvfp4"), ("llama32", "fp8"), ("mixtral", "bf16")],
)
def test_stacks_ties_and_other_names_are_judged(name: str, format: str, tmp_path: Path) -> None:
    source = make_model(tmp_path, name)
    exported(source, tmp_path / "out", format)
    assert sound(tmp_path / "out", source) > 30


def test_one_expert_of_a_stack_that_is_wrong_is_named(tmp_path: Path) -> None:
    source = make_model(tmp_path, "gpt_oss")
    exported(source, tmp_path / "out", "fp8")
    held = tensors(tmp_path / "out")
    stack = "model.layers.1.mlp.experts.down_proj"
    held[stack] = held[stack].clone()
    held[stack][2] = held[stack][3]
    save_file(held, tmp_path / "out" / "model.safetensors")
    (problem,) = judge(tmp_path / "out", source).problems
    assert problem.startswith("model.layers.1.mlp.experts.2.down_proj.weight: ")
    assert problem.endswith("what the reference has in model.layers.1.mlp.experts.3.down_proj.weight")
