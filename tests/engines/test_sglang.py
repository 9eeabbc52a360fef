"""A real SGLang, on a CPU: it fills what the rules say it fills, and refuses or leaves empty what they say it does not load.
CONTRIBUTING.md has its setup."""

import json
from pathlib import Path

import pytest

from megatron_export.engines import Verdict
from megatron_export.planning import recipe
from megatron_export.planning.engine_check import of_folder

from ..support.checkpoints import DAMAGES, HEADERS, damaged, described, golden, storing, written
from ..support.ranks import Ranks, living
from .asking import EVERY, exported, judged, told_otherwise, tried
from .product import list_joined

pytestmark = pytest.mark.sglang
NEW = ["fp8_pc_pt", "mxfp8", "w4a16_nvfp4", "mxfp4", "w4a8_nvfp4_fp8", "w4a8_mxfp4_fp8", "nvfp4_kvnvfp4"]
HEADS = ["fp8_head", "nvfp4_head", "w4a16_nvfp4_head", "mixed_head", "mixed_head_w4a16"]
MIXED = ["mixed_mxfp8", "mixed_pc_pt", "mixed_pb", "mixed_pb_native", "mixed_kvnvfp4"]
RECIPES = recipe.names()
DENSE = [name for name in RECIPES if "experts" not in name]
SOME = {
    "llama31": ["fp8_kv", "fp8_pb", "fp8_pb_modelopt", "nvfp4_kv", "int4_awq", *NEW, *HEADS, *DENSE],
    "qwen3": ["fp8_kv", "fp8_pb", *NEW, *DENSE, *MIXED],
    "qwen3_moe": ["bf16", "fp8"],
    "qwen3_moe-sparse": ["fp8_kv", "fp8_pb", "nvfp4_awq", "nvfp4_experts_kv_cast", *NEW, *HEADS, *RECIPES, *MIXED],
    "mixtral": ["fp8_kv", "nvfp4", *HEADS],
    "deepseek_v3": ["fp8_pb", "nvfp4", "fp8+mla", "nvfp4+mla", "nvfp4_experts_kv_cast", *NEW, *HEADS, *RECIPES]
    + [f"{name}+mla" for name in RECIPES],
    "llama4": ["bf16", "fp8"],
    "llama4_vision": ["fp8_kv", "fp8_pb", "nvfp4"],
    "gpt_oss": ["bf16", "fp8", "mxfp4"],
    "ministral3": ["fp8_kv", "fp8_pb", "nvfp4", "nvfp4_mlp_only"],
    "mistral3": ["fp8_kv", "fp8_pb", "nvfp4_mlp_only", "nvfp4_mlp_fp8_attention"],
    "phi3": ["fp8_pb", "nvfp4_mlp_only", "w4a16_nvfp4"],
    "gemma3": ["fp8_kv", "nvfp4_mlp_fp8_attention"],
    "gemma3_vision": ["fp8_pb"],
    "minimax_m2": ["fp8_kv", "nvfp4_head", "nvfp4_mlp_fp8_attention"],
    "qwen3_vl": ["fp8_kv", "nvfp4_mlp_only", "nvfp4_mlp_fp8_attention"],
    "qwen3_vl_moe": ["bf16", "nvfp4_experts_only", "fp8_attention_only"],
    "kimi_k25": ["fp8_pb", "nvfp4", "fp8+mla"],
    "deepseek_v32-mtp": ["fp8_pb", "nvfp4"],
    "glm_moe_dsa": ["bf16", "nvfp4"],
    "qwen3_next-mtp": ["bf16", "fp8_kv", "fp8_pb", "nvfp4", "mxfp8", "nvfp4_mlp_fp8_attention", "fp8_head"],
    "qwen3_5-mtp": ["bf16", "fp8_kv", "fp8_pb", "nvfp4", "mxfp8", "w4a16_nvfp4_mlp_fp8_attention"],
    "qwen3_5_moe-mtp": ["bf16", "fp8", "nvfp4", "w4a16_nvfp4_mlp_fp8_attention"],
    "qwen3_5_text": ["fp8", "fp8_head"],
    "qwen3_5_moe_text": ["bf16", "nvfp4_awq"],
    "nemotron_h-mtp": ["bf16", "fp8_kv", "fp8_pb", "nvfp4", "w4a16_nvfp4", "mxfp8", "mixed_hybrid"],
}
WHILE_COMPUTING = {"awq"}  # rules of what a kernel does
UNNOTICED = ("a tensor repeated",)  # the second one is as good


def agrees(verdict: Verdict, one: dict) -> bool:
    """Whether SGLang filled every parameter of what the rules say it loads, and of nothing else."""
    broken = {finding.rule for finding in verdict.findings if finding.effect is verdict.effect}
    return filled(one) == (bool(verdict.loads) or broken <= WHILE_COMPUTING)


def filled(one: dict) -> bool:
    """Whether nothing was raised, nothing is lacking, and no code was taken for a number."""
    return one["error"] is None and not one["lacking"] and not one["converted"]


def disagreements(folders: list[Path]) -> dict[str, str]:
    """Where SGLang did not do what the rules say."""
    found = {}
    for folder, one in tried("sglang_loading", *folders).items():
        checkpoint = of_folder(folder)
        verdict = judged(checkpoint, "sglang")
        keeps = bool(checkpoint.indexed.kv) and all(finding.rule != "kv ignored" for finding in verdict.findings)
        if not agrees(verdict, one) or (filled(one) and one["kv"] != keeps):
            found[f"{folder.parent.name} {folder.name}"] = f"{verdict.text} | {one}"
    return found


@pytest.mark.parametrize("names", [SOME, pytest.param(EVERY, marks=pytest.mark.slow)], ids=["some", "every"])
def test_sglang_loads_what_the_rules_say(names: dict[str, list[str]], pool: list[Ranks], tmp_path: Path) -> None:
    assert disagreements(exported(living(pool), names, tmp_path)) == {}


def test_sglang_finds_joined_linears_of_a_mix_where_they_are_named(pool: list[Ranks], tmp_path: Path) -> None:
    names = {
        "llama31": ["nvfp4_mlp_fp8_attention", "mixed_head"],
        "qwen3": ["w4a16_nvfp4_mlp_fp8_attention", "mixed_pb_native"],
    }
    folders = exported(living(pool), names, tmp_path)
    for file in [folder / name for folder in folders for name in ("config.json", "hf_quant_config.json")]:
        said = json.loads(file.read_text())
        list_joined((said.get("quantization_config") or said.get("quantization"))["quantized_layers"])
        file.write_text(json.dumps(said))
    assert disagreements(folders) == {}
    assert all(judged(of_folder(folder), "sglang").loads for folder in folders)


def test_sglang_reads_configs_as_its_release_does(pool: list[Ranks], tmp_path: Path) -> None:
    folders = exported(living(pool), {"qwen3_moe-sparse": ["fp8", "nvfp4", "nvfp4_mlp_fp8_attention"]}, tmp_path)
    for folder in folders:
        told_otherwise(folder)
    assert disagreements(folders) == {}


def test_sglang_loads_of_modelopts_checkpoints_those_that_the_rules_say(tmp_path: Path) -> None:
    folders = {written(golden(name), tmp_path / name.replace("/", "-")): name for name in HEADERS}
    for folder, one in tried("sglang_loading", *folders).items():
        verdict = judged(described(golden(folders[folder])), "sglang")
        assert agrees(verdict, one), f"{folders[folder]}: {verdict.text} | {one}"


def test_sglang_refuses_what_is_damaged_or_leaves_it_empty(tmp_path: Path) -> None:
    damages = {written(damaged(damage), tmp_path / str(n)): damage for n, damage in enumerate(DAMAGES)}
    for folder, one in tried("sglang_loading", *damages).items():
        verdict = judged(described(damaged(damages[folder])), "sglang")
        unnoticed = damages[folder] in UNNOTICED
        assert filled(one) if unnoticed else agrees(verdict, one), f"{damages[folder]}: {verdict.text} | {one}"


def test_sglang_refuses_a_kv_scale_of_two_numbers(tmp_path: Path) -> None:
    said = golden("models/llama-FP8-KVFP8")
    storing("model.layers.0.self_attn.k_proj.k_scale", "F32", 2)(said)
    verdict = judged(described(said), "sglang")
    [one] = tried("sglang_loading", written(said, tmp_path / "two")).values()
    assert [finding.rule for finding in verdict.findings] == ["kv shape"]
    assert "Attempted to load weight" in one["error"] and agrees(verdict, one)
