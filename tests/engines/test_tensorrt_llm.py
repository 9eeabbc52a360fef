"""Parts of TensorRT-LLM's files, on a CPU: they fill what the rules say they fill, and refuse or leave empty what is not loaded.
CONTRIBUTING.md has their setup."""

import json
from functools import cache
from pathlib import Path

import pytest

from megatron_export.engines import CheckpointView, Verdict, verdict_of
from megatron_export.engines.runs import ON_CPU
from megatron_export.planning.engine_check import of_folder

from ..support.checkpoints import (
    ATTENTION,
    DAMAGES,
    FP8,
    HEADERS,
    NVFP4,
    damaged,
    described,
    golden,
    losing,
    saying,
    storing,
    written,
)
from ..support.ranks import Ranks, living
from .asking import exported, tried
from .product import FORMATS

pytestmark = pytest.mark.tensorrt_llm
SOME = {
    "llama31": ["fp8_kv", "fp8_pb_modelopt", "nvfp4_kvnvfp4", "int4_awq", "w4a8_awq", "mixed_head", "mixed_pb"],
    "qwen2": ["bf16", "fp8", "fp8_pb", "w4a8_nvfp4_fp8", "mixed_kvnvfp4"],
    "qwen3": [*FORMATS],
}
UNTAKEN = ("int4_awq", "w4a8_awq", "w4a8_mxfp4_fp8")  # formats of experts whose loaders are not run
SOME["qwen3_moe"] = [name for name in FORMATS if name not in UNTAKEN]
EVERY = dict.fromkeys(("llama31", "mistral", "qwen2", "qwen3"), [*FORMATS]) | {"qwen3_moe": SOME["qwen3_moe"]}
QWEN_MOE = "models/qwen3moe"
GATE = "model.layers.0.mlp.gate_proj"
UNNOTICED = ("a tensor repeated",)  # the second one is as good
LATER = ("NVFP4_AWQ", "W4A16_NVFP4", "MXFP8")  # algorithms that sources of an earlier commit do not have yet
MORE = {
    "factors of queries": (NVFP4, storing(f"{ATTENTION}.q_proj.pre_quant_scale", "BF16", 128)),
    "factors of gates": ("models/llama-INT4_AWQ", storing(f"{GATE}.pre_quant_scale", "BF16", 128)),
    "groups of no size": ("models/llama-INT4_AWQ", saying(group_size=None)),
    "groups of no size, W4A8": ("models/llama-W4A8_AWQ", saying(group_size=None)),
    "an expert's input": (f"{QWEN_MOE}-FP8", losing("model.layers.0.mlp.experts.1.up_proj.input_scale")),
    "an expert of another name": (f"{QWEN_MOE}-FP8", saying(quant_algo="FP8_PER_CHANNEL_PER_TOKEN")),
    "a name in small letters": (FP8, saying(quant_algo="fp8")),
    "an unknown algorithm": (FP8, saying(quant_algo="INT3")),
    "four bits of a cache in config.json alone": (
        "models/llama-NVFP4-KVNVFP4",
        lambda said: said.update(quant=None),
    ),
}


@cache
def unknown() -> set[str]:
    """Of the later algorithms, those that the sources lack."""
    from .tensorrt_llm_source import algorithms

    return {*LATER} - algorithms()


def judged(checkpoint: CheckpointView) -> Verdict:
    """The verdict about the release that the sources are of: about an algorithm that they lack, an earlier one's."""
    said = json.dumps([checkpoint.config, checkpoint.quant])
    early = any(f'"{name}"' in said for name in unknown())
    return verdict_of(checkpoint, "tensorrt_llm", "1.2" if early else None)


def loads(one: dict) -> bool:
    """Whether nothing was raised, nothing is lacking, no code was taken for a number, and no factor of inputs was dropped."""
    dropped = any(name.endswith("pre_quant_scale") for name in one["unread"])
    return not (one["error"] or one["lacking"] or one["converted"] or dropped)


def disagreement(verdict: Verdict, one: dict) -> str:
    """Where they did not do what the rules say: what loads, and which tensors nobody looks at."""
    rules = {finding.rule for finding in verdict.findings}
    unread = [name for name in one["unread"] if not name.endswith(("k_scale", "v_scale"))]
    looked = bool(unread) == bool(rules & {"unknown", "extra"})
    expected = bool(verdict.loads) and "expert backend" not in rules  # the usual one is asked
    return "" if loads(one) == expected and (looked or not loads(one)) else f"{verdict.text} | {one}"


@pytest.mark.parametrize("names", [SOME, pytest.param(EVERY, marks=pytest.mark.slow)], ids=["some", "every"])
def test_its_files_load_what_the_rules_say(names: dict[str, list[str]], pool: list[Ranks], tmp_path: Path) -> None:
    made = exported(living(pool), names, tmp_path)
    asked = tried("tensorrt_llm_loading", *made)
    found = {str(folder): disagreement(judged(of_folder(folder)), one) for folder, one in asked.items()}
    assert len(found) > 40 and {folder: text for folder, text in found.items() if text} == {}


def test_they_find_what_is_damaged_and_load_modelopts(tmp_path: Path) -> None:
    cases = {f"a checkpoint with {name}": damaged(name) for name in DAMAGES} | {name: golden(name) for name in HEADERS}
    for name, (of, change) in MORE.items():
        cases[name] = golden(of)
        change(cases[name])
    cases = {name: said for name, said in cases.items() if said["config"]["architectures"][0] in ON_CPU["tensorrt_llm"]}
    del cases["models/qwen3moe-INT4_AWQ"]
    folders = {written(said, tmp_path / str(number)): name for number, (name, said) in enumerate(cases.items())}
    found = {}
    for folder, one in tried("tensorrt_llm_loading", *folders).items():
        name = folders[folder]
        verdict = judged(described(cases[name]))
        if verdict.loads is not None and not name.endswith(UNNOTICED):
            found[name] = disagreement(verdict, one)
    assert len(found) > 50 and {name: text for name, text in found.items() if text} == {}
