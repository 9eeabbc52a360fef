"""The names of statistics: no other file of the package has a part of one."""

import ast
import re
from pathlib import Path

import pytest

import megatron_export
from megatron_export.models import statistic_names
from megatron_export.models.statistic_names import (
    alpha_key,
    alpha_of,
    codes_key,
    homes_of,
    in_memory,
    input_key,
    kv_keys,
    losses_key,
    module_of,
    on_disk,
    owners_of,
    ratio_key,
    tokens_key,
    vector_key,
)

PACKAGE = Path(megatron_export.__file__).parent
# A kind of statistic as it is put behind a module or looked for in a name. ModelOpt's buffer `_amax` and the tensor
# `{linear}.pre_quant_scale` of a checkpoint are none. Formats know no modules; their kernels have arguments called amax.
PART = re.compile(
    r"\.(input|weight|k|v)(_channel)?_amax|\.(pre_quant_scale|alpha|losses)\.|\.clip(_ratio)?\b|\.tokens$|_channel_amax|^amax$"
)
MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "norm_topk_prob": True,
    "vocab_size": 96,
    "rms_norm_eps": 1e-6,
}
LAYER = "decoder.layers.0"
QKV, FC1 = f"{LAYER}.self_attention.linear_qkv", f"{LAYER}.mlp.experts.linear_fc1"


def texts(path: Path) -> set[str]:
    """The strings of a file, those in f-strings too, and not its docstrings."""
    tree = ast.parse(path.read_text())
    said = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and node not in said]
    return {node.value for node in constants if isinstance(node.value, str)}


def test_names_of_statistics_are_made_and_taken_apart_in_one_file_alone() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "formats"]
    having = {path for path in files if any(PART.search(text) for text in texts(path))}
    assert having == {Path(statistic_names.__file__)}


@pytest.mark.parametrize(
    ("key", "hf"),
    [
        (input_key(QKV), ["q_proj.input_amax", "k_proj.input_amax", "v_proj.input_amax"]),
        (kv_keys(f"{LAYER}.self_attention")[0], ["k_proj.k_amax"]),
        (kv_keys(f"{LAYER}.self_attention")[1], ["v_proj.v_amax"]),
        (codes_key(QKV, "int4_g64", "k"), ["k_proj.clip.int4_g64"]),
        (ratio_key(QKV, "nvfp4"), ["q_proj.clip_ratio.nvfp4", "k_proj.clip_ratio.nvfp4", "v_proj.clip_ratio.nvfp4"]),
        (vector_key(f"{LAYER}.self_attention.linear_proj", "nvfp4_shared"), ["o_proj.pre_quant_scale.nvfp4_shared"]),
        (alpha_key(FC1, "int4_g128"), ["experts.gate_proj.alpha.int4_g128", "experts.up_proj.alpha.int4_g128"]),
        (losses_key(FC1, "nvfp4"), ["experts.gate_proj.losses.nvfp4", "experts.up_proj.losses.nvfp4"]),
        (codes_key(f"{LAYER}.mlp.experts.1.linear_fc2", "int4_g64", ""), ["experts.1.down_proj.clip.int4_g64"]),
        (tokens_key(f"{LAYER}.mlp.experts"), ["experts.tokens"]),
    ],
)
def test_a_name_in_memory_has_its_names_on_disk_and_each_of_these_means_it(key: str, hf: list[str]) -> None:
    homes = homes_of(MOE)
    block = "self_attn" if "attention" in key else "mlp"
    assert on_disk(key, homes) == [f"model.layers.0.{block}.{name}" for name in hf]
    assert {in_memory(name, owners_of(homes)) for name in on_disk(key, homes)} == {key}


def test_a_name_tells_its_module_and_a_vector_its_alpha() -> None:
    vector = vector_key(QKV, "nvfp4")
    assert module_of(vector) == QKV
    assert alpha_of(vector) == alpha_key(QKV, "nvfp4")
