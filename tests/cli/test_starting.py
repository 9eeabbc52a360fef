"""`plan` and `check` look at names and shapes alone: they start without torch, and without what else takes long to import."""

import json
from pathlib import Path

import pytest

from ..support.command_line import python
from ..support.configs import DEEPSEEK_V3, LLAMA, NEMOTRON, PHI3, QWEN35, QWEN_MOE
from ..support.models import EXAMPLE

SLOW = ("torch._C", "numpy._core", "transformers", "megatron.core", "pyarrow", "safetensors.torch")
SCRIPT = f"""
import runpy, sys, traceback

def heard(event, told):
    if event == "import" and told[0] in {SLOW}:
        ours = [frame for frame in traceback.extract_stack() if "megatron_export" in frame.filename]
        print(told[0], "for", ours[-1].filename, ours[-1].lineno, ours[-1].line, file=sys.stderr)

sys.addaudithook(heard)
runpy.run_module("megatron_export", run_name="__main__")
"""


def imported_by(*flags: object) -> str:
    """Which of what takes long a command imports, and where; it must not fail."""
    done = python("-c", SCRIPT, *flags)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("config", "flags"),
    [
        (LLAMA, ("--format", "nvfp4", "--tp", 2, "--kv-cache", "fp8")),
        (LLAMA, ("--format", "int4_awq", "--device", "cpu", "--json")),
        (LLAMA, ("--set", "*.o_proj=fp8", "--format", "nvfp4")),
        (LLAMA, ("--format", "fp8", "--input-scale", 0.5, "--target", "vllm,sglang")),
        (DEEPSEEK_V3 | {"num_hidden_layers": 5}, ("--format", "fp8_pb", "--tp", 4, "--ep", 8)),
        (NEMOTRON, ("--format", "mxfp8")),
        (PHI3, ("--format", "nvfp4_awq", "--tp", 2)),
        (QWEN35, ("--format", "w4a16_nvfp4", "--pp", 2)),
        (QWEN_MOE, ("--format", "fp8_pc_pt", "--etp", 1, "--ep", 2, "--tp", 2)),
    ],
    ids=lambda said: said["architectures"][0] if isinstance(said, dict) else " ".join(map(str, said)),
)
def test_plan_imports_nothing_that_takes_long(config: dict, flags: tuple, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert imported_by("plan", "--hf-model", tmp_path, *flags) == ""


@pytest.mark.parametrize(
    "flags",
    [("check", EXAMPLE), ("check", EXAMPLE, "--engine", "vllm", "--json"), ("check", "--rules"), ("--help",)],
    ids=["check", "check --json", "check --rules", "--help"],
)
def test_check_and_help_import_nothing_that_takes_long(flags: tuple) -> None:
    assert imported_by(*flags) == ""


def test_other_commands_have_torch_from_the_start() -> None:
    assert "torch._C for" in imported_by("verify", "--help")


def test_what_looks_through_torch_finds_all_of_it_where_it_is_imported_late() -> None:
    done = python(
        "-c",
        "from megatron_export.common.later import import_later; import_later('torch', 'numpy'); "
        "from megatron_export.checkpoint.safe_pickle import _dtypes; print(sorted(_dtypes()))",
    )
    assert "'torch.bfloat16'" in done.stdout, done.stderr
