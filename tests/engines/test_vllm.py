"""A real vLLM, on a CPU: it loads what the rules say it loads, and refuses what they say it refuses. See README for its setup."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_export.checking import of_folder
from megatron_export.engines import Effect, judged, vllm

from ..ranks import Ranks, living
from . import product
from .checkpoints import DAMAGES, HEADERS, damaged, described, golden, written

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).parents[2]
SOME = {
    "llama31": ["fp8_kv", "fp8_pb", "fp8_pb_modelopt", "nvfp4", "int4_awq"],
    "qwen3_moe": ["fp8_kv", "nvfp4_awq"],
    "deepseek_v3": ["fp8_pb", "nvfp4", "nvfp4+mla"],
    "llama4": ["fp8", "fp8_pb"],
    "llama4_vision": ["fp8_kv", "nvfp4"],
    "gpt_oss": ["bf16", "fp8"],
}
EVERY = {
    name: [*product.FORMATS, *((f"{form}+mla" for form in product.FORMATS) if name == "deepseek_v3" else ())]
    for name in product.MODELS
}
GENERATING = ("bf16", "fp8", "fp8_kv", "fp8_pb", "fp8_pb_modelopt", "nvfp4", "nvfp4_kv", "nvfp4_awq")
UNNOTICED = {"bad/qwen3moe-FP8-mcore-tp1pp1ep2"}  # experts that are not there, which vLLM does not look for
CACHE_SCALES = "with dtype torch.float32 into parameter with dtype torch.bfloat16"  # vLLM keeps KV scales in bfloat16


def tried(*folders: Path, generate: bool = False) -> dict[Path, dict]:
    """What became of each folder in vLLM, one after the other in a process of its own."""
    flags = ["--generate"] if generate else []
    command = [sys.executable, "-m", "tests.engines.vllm_loading", *flags, *map(str, folders)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"folder"')]
    assert len(said) == len(folders), done.stderr[-3000:]
    return {Path(one["folder"]): one for one in said}


def exported(ranks: Ranks, names: dict[str, list[str]], out: Path) -> list[Path]:
    """Folders of those models in those formats, but for what the exporter refuses."""
    folders = []
    for name, forms in names.items():
        (out / name).mkdir()
        (out / f"{name}-source").mkdir()
        model = product.source(out / f"{name}-source", name)
        [refused] = ranks.call(1, product.export, model, out / name, forms, seconds=300)
        folders += [out / name / form for form in forms if form not in refused]
    return folders


def disagreements(folders: list[Path]) -> dict[str, str]:
    """Where vLLM did not do what the rules say, or warned of scales."""
    found = {}
    for folder, one in tried(*folders).items():
        verdict = judged(of_folder(folder), "vllm")
        warned = [text for text in one["warned"] if "not found" in text or "scale" in text and CACHE_SCALES not in text]
        warned = [text for text in warned if "q scaling factor" not in text]  # of queries; nothing calibrates it
        if (one["error"] is None) != (verdict.loads is not False) or (one["error"] is None and warned):
            found[f"{folder.parent.name} {folder.name}"] = f"{verdict.text} | {one['error']} | {warned}"
    return found


def test_vllm_loads_what_the_rules_say(pool: list[Ranks], tmp_path: Path) -> None:
    assert disagreements(exported(living(pool), SOME, tmp_path)) == {}


@pytest.mark.slow
def test_vllm_loads_every_architecture_in_every_format_as_the_rules_say(pool: list[Ranks], tmp_path: Path) -> None:
    assert disagreements(exported(living(pool), EVERY, tmp_path)) == {}


def test_vllm_loads_of_modelopts_checkpoints_those_that_the_rules_say(tmp_path: Path) -> None:
    folders = {written(golden(name), tmp_path / name.replace("/", "-")): name for name in HEADERS}
    for folder, one in tried(*folders).items():
        name = folders[folder]
        loads = judged(described(golden(name)), "vllm").loads
        assert (one["error"] is None) == (loads or name in UNNOTICED), f"{name}: {one['error']}"


def test_vllm_refuses_what_is_damaged(tmp_path: Path) -> None:
    damages = {written(damaged(*damage), tmp_path / str(n)): damage for n, damage in enumerate(DAMAGES)}
    for folder, one in tried(*damages).items():
        rule, _, _, noticed = DAMAGES[damages[folder]]
        refuses = bool(rule) and vllm.RULES[rule].effect in (Effect.REFUSES, Effect.UNKNOWN)
        assert (one["error"] is not None) == (refuses and noticed), f"{damages[folder]}: {one['error']}"


def test_vllm_generates(pool: list[Ranks], tmp_path: Path) -> None:
    folders = exported(living(pool), {"qwen3": ["bf16", "nvfp4_kv"]}, tmp_path)
    assert {folder.name: one["error"] for folder, one in _generated(folders).items()} == {
        "bf16": None,
        "nvfp4_kv": None,
    }


@pytest.mark.slow
def test_vllm_generates_in_every_format_that_a_cpu_can_compute(pool: list[Ranks], tmp_path: Path) -> None:
    dense = {name: list(GENERATING) for name in ("llama31", "llama32", "qwen2", "qwen3")}
    experts = {name: ["bf16"] for name in ("qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "gpt_oss")}
    folders = exported(living(pool), dense | experts, tmp_path)
    assert {str(folder): one["error"] for folder, one in _generated(folders).items() if one["error"]} == {}


def _generated(folders: list[Path]) -> dict[Path, dict]:
    """Each in a process of its own: an engine keeps its threads and its memory."""
    return {folder: one for folder in folders for one in tried(folder, generate=True).values()}
