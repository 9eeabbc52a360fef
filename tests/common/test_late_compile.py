"""Functions that are compiled where they are called."""

import subprocess
import sys

import pytest
import torch

from megatron_export.common.late_compile import compiled_when_called


def test_a_function_is_compiled_at_its_first_call_and_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(options) or (lambda x: -x))
    stand_in = torch.compile
    with compiled_when_called():

        @torch.compile(dynamic=True)
        def on_gpu(x: int) -> int:
            """A sentence."""
            return x

        @torch.compile
        def on_cpu(x: int) -> int:
            return x

    assert (torch.compile, on_gpu.__doc__, compiled) == (stand_in, "A sentence.", [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (on_gpu(1), on_gpu(2), compiled) == (-1, -2, [{"dynamic": True}])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (on_cpu(1), len(compiled)) == (1, 1)


def test_neither_a_plan_nor_a_rank_of_megatron_imports_what_it_has_no_use_for(models: dict) -> None:
    script = """
import sys
from megatron_export.cli.commands import main
sizes = ("--tp", "2", "--etp", "1", "--ep", "2", "--world", "4")
for form in ("nvfp4", "fp8_pb"):
    assert main(lambda *said, **kinds: None, ["plan", "--hf-model", sys.argv[1], "--format", form, *sizes]) == 0
print({"torch._dynamo", "sympy", "transformers", "megatron.core"} & {*sys.modules})
from megatron_export.common.optional import part
part("cli.megatron_model"), part("export.megatron_model"), part("calibration.mcore.subject")
print({"torch._dynamo", "transformers"} & {*sys.modules}, "megatron.core" in sys.modules)
"""
    line = [sys.executable, "-c", script, str(models["qwen3_moe"])]
    said = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    assert said == "set()\nset() True\n"
