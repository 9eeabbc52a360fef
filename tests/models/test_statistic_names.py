"""The names of statistics: no other file of the package has a part of one."""

import ast
import re
from pathlib import Path

import pytest

import megatron_export
from megatron_export.models import statistic_names as names

from ..support.configs import QWEN_MOE

PACKAGE = Path(megatron_export.__file__).parent
# A kind of statistic as it is put behind a module or looked for in a name. ModelOpt's buffer `_amax` and the tensor
# `{linear}.pre_quant_scale` of a checkpoint are none. Formats know no modules; their kernels have arguments called amax.
PART = re.compile(
    r"\.(input|weight|k|v)(_channel)?_amax|\.(pre_quant_scale|alpha|losses)\.|\.clip(_ratio)?\b|\.tokens$|_channel_amax|^amax$"
)
MOE = QWEN_MOE | {"num_hidden_layers": 1, "num_experts": 2}
LAYER, ATTENTION = "decoder.layers.0", "decoder.layers.0.self_attention"
QKV, FC1 = f"{ATTENTION}.linear_qkv", f"{LAYER}.mlp.experts.linear_fc1"


def texts(path: Path) -> set[str]:
    """The strings of a file, those in f-strings too, and not its docstrings."""
    tree = ast.parse(path.read_text())
    said = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and node not in said]
    return {node.value for node in constants if isinstance(node.value, str)}


def test_names_of_statistics_are_made_and_taken_apart_in_one_file_alone() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "formats"]
    having = {path for path in files if any(PART.search(text) for text in texts(path))}
    assert having == {Path(names.__file__)}


@pytest.mark.parametrize(
    ("key", "hf"),
    [
        (names.input_key(QKV), [f"{part}_proj.input_amax" for part in "qkv"]),
        (names.kv_keys(ATTENTION)[0], ["k_proj.k_amax"]),
        (names.kv_keys(ATTENTION)[1], ["v_proj.v_amax"]),
        (names.codes_key(QKV, "int4_g64", "k"), ["k_proj.clip.int4_g64"]),
        (names.ratio_key(QKV, "nvfp4"), [f"{part}_proj.clip_ratio.nvfp4" for part in "qkv"]),
        (names.vector_key(f"{ATTENTION}.linear_proj", "nvfp4_shared"), ["o_proj.pre_quant_scale.nvfp4_shared"]),
        (names.alpha_key(FC1, "int4_g128"), ["experts.gate_proj.alpha.int4_g128", "experts.up_proj.alpha.int4_g128"]),
        (names.losses_key(FC1, "nvfp4"), ["experts.gate_proj.losses.nvfp4", "experts.up_proj.losses.nvfp4"]),
        (names.codes_key(f"{LAYER}.mlp.experts.1.linear_fc2", "int4_g64", ""), ["experts.1.down_proj.clip.int4_g64"]),
        (names.tokens_key(f"{LAYER}.mlp.experts"), ["experts.tokens"]),
    ],
)
def test_a_name_in_memory_has_its_names_on_disk_and_each_of_these_means_it(key: str, hf: list[str]) -> None:
    homes = names.homes_of(MOE)
    block = "self_attn" if "attention" in key else "mlp"
    assert names.on_disk(key, homes) == [f"model.layers.0.{block}.{name}" for name in hf]
    assert {names.in_memory(name, names.owners_of(homes)) for name in names.on_disk(key, homes)} == {key}


def test_a_name_tells_its_module_and_a_vector_its_alpha() -> None:
    vector = names.vector_key(QKV, "nvfp4")
    assert names.module_of(vector) == QKV
    assert names.alpha_of(vector) == names.alpha_key(QKV, "nvfp4")
