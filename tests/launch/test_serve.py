"""`launch/benchmark.py serve` without an engine: what processes that answer, die or hang become, and the decoded half."""

import argparse
import json
import math
import time
from pathlib import Path

import pytest
import torch

from launch.bench import serving, vllm_process
from megatron_export.common.errors import ExportError
from megatron_export.verify.perplexity import score

from ..support.checkpoints import golden, written
from ..support.models import EXAMPLE

pytestmark = pytest.mark.whole

TEXT = EXAMPLE / "heldout.txt"
ANSWER = {
    "version": "1",
    "device": "GPU",
    "error": None,
    "tokens": [1, 2],
    "losses": [1.0, 2.0],
    "warned": [],
    "chose": [],
}


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A script that runs in place of vLLM; it dies until a test writes another."""
    script = tmp_path / "vllm_process.py"
    script.write_text("import os, sys; sys.stderr.write('CUDA error'); sys.stderr.flush(); os.abort()")
    monkeypatch.setattr(vllm_process, "__file__", str(script))
    return script


def run(*line: object) -> None:
    parser = argparse.ArgumentParser()
    serving.add_serve(parser)
    flags = parser.parse_args(list(map(str, line)))
    flags.run(flags)


def rows(file: Path) -> dict[str, dict]:
    return {row["folder"]: row for row in map(json.loads, file.read_text().splitlines())}


def lives(pid: Path) -> bool:
    """Whether a process, by its folder in /proc, has not ended."""
    return pid.exists() and "(zombie)" not in (pid / "status").read_text()


def answer_with(process: Path, **changes: object) -> None:
    answer = vllm_process.MARK + json.dumps(ANSWER | changes)
    process.write_text(f"import sys; sys.stdin.read(); print('noise'); print({answer!r})")


def test_a_process_that_dies_ends_no_other(process: Path, tmp_path: Path) -> None:
    refused = written(golden("models/llama-NVFP4_AWQ"), tmp_path / "refused")
    with pytest.raises(ExportError, match="3 of 3 did not do what `check` says"):
        run("--json", tmp_path / "rows", EXAMPLE, refused, tmp_path / "nothing", "--jobs", 2)
    found = rows(tmp_path / "rows")
    assert {name: (row["loads"], "CUDA error" in row["error"]) for name, row in found.items()} == {
        "examples/model": (True, True),
        f"{tmp_path.name}/refused": (False, True),
        f"{tmp_path.name}/nothing": (None, False),
    }


def test_a_process_that_hangs_is_ended(process: Path, tmp_path: Path) -> None:
    started = tmp_path / "started"
    other = f"import os, time; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    process.write_text(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {other!r}])")
    with pytest.raises(ExportError, match="examples/model"):
        run("--json", tmp_path / "rows", "--timeout", 3, EXAMPLE)
    assert rows(tmp_path / "rows")["examples/model"]["error"].startswith("no answer in 3 s")
    pid = Path("/proc", started.read_text())
    for _ in range(500):  # a process that is killed may be there until it has a core
        if not lives(pid):
            break
        time.sleep(0.02)
    assert not lives(pid), "a process that it has started lives on"


SGLANG = """
import sys
class Engine:
    def __init__(self, model_path, **how):
        if "refused" in model_path:
            print("[2026-01-01 00:00:00] Scheduler hit an exception: Traceback", file=sys.stderr)
            print("ValueError: ModelOpt currently only supports: FP8", file=sys.stderr, flush=True)
            __import__("os").kill(__import__("os").getpid(), 9)
        print("[2026-01-01 00:00:00 TP0] Using KV cache scaling factor 1.0, not found", file=sys.stderr, flush=True)
    def generate(self, input_ids, sampling_params, **how):
        def one(row, count):
            steps = [(None, row[0], None), *((-2.0, token, None) for token in row[1:])]
            meta = {"input_token_logprobs": steps, "output_token_logprobs": [(-1.0, 7, None)] * count}
            return {"output_ids": [7] * count, "meta_info": meta}
        count = sampling_params["max_new_tokens"]
        return one(input_ids, count) if isinstance(input_ids[0], int) else [one(row, count) for row in input_ids]
"""


def test_an_sglang_that_dies_has_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of SGLang is a module of its name: an engine whose scheduler fails ends the process that started it."""
    (tmp_path / "sglang.py").write_text(SGLANG)
    (tmp_path / "sglang-9.9.dist-info").mkdir()
    (tmp_path / "sglang-9.9.dist-info" / "METADATA").write_text("Name: sglang\nVersion: 9.9\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    refused = written(golden("models/llama-NVFP4_AWQ"), tmp_path / "refused")
    how = ("--engine", "sglang", "--json", tmp_path / "rows", "--text", TEXT, "--windows", 2)
    with pytest.raises(ExportError, match="1 of 2 did not do what `check` says: examples/model"):
        run(*how, EXAMPLE, refused)
    found = rows(tmp_path / "rows")
    model, other = found["examples/model"], found[f"{tmp_path.name}/refused"]
    assert (model["version"], model["error"], model["tokens"], model["losses"]) == ("9.9", None, [7] * 8, [2.0, 2.0])
    assert model["warned"] == ["Using KV cache scaling factor 1.0, not found"]
    assert (other["version"], other["error"]) == ("9.9", "ValueError: ModelOpt currently only supports: FP8")


@pytest.mark.parametrize("flag", ["--jobs", "--tp"])
def test_nothing_is_served_on_no_gpu(flag: str, process: Path) -> None:
    with pytest.raises(ExportError, match="must be at least 1"):
        run(flag, 0, EXAMPLE)


def test_warnings_of_scales_are_held_against_a_checkpoint(process: Path, capsys: pytest.CaptureFixture) -> None:
    said = "Using KV cache scaling factor 1.0 for fp8_e4m3."
    answer_with(process, warned=[said, "with a q scaling factor"])
    with pytest.raises(ExportError, match="1 of 1"):
        run(EXAMPLE)
    warned = [line for line in capsys.readouterr().out.splitlines() if "warned" in line]
    assert warned == [f"examples/model: warned: {said}"]


def test_the_decoded_half_is_that_of_quality(process: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "decoded"
    run("--through", "decode", "--text", TEXT, "--windows", 2, "--json", file, EXAMPLE)
    decoded = rows(file)["examples/model"]
    assert math.isclose(math.exp(sum(decoded["losses"]) / 2), score(EXAMPLE, EXAMPLE, TEXT, windows=2).perplexity)
    decoded["tokens"][3] = -1
    answer_with(process, tokens=decoded["tokens"], losses=[loss + 1 for loss in decoded["losses"]])
    capsys.readouterr()
    run("--text", TEXT, "--windows", 2, "--with", file, EXAMPLE)
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| examples/model")]
    assert "(3 as decode)" in line
    assert line.endswith("| 2.7183 | +1.00000 ± 0.00000 |")


def test_without_a_tokenizer_the_bytes_are_the_tokens(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(bytes(range(256)) * 5)
    ids = serving.ids_of(text, tmp_path)
    assert torch.equal(ids, torch.arange(256).repeat(4).view(2, 512))


def test_norms_that_round_once_are_those_of_float32_rounded() -> None:
    from transformers.models.llama4.modeling_llama4 import Llama4TextRMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    inputs, weight = torch.randn(2, 64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    for norm in (Qwen3RMSNorm(256, eps=1e-2), Llama4TextRMSNorm(256, eps=1e-2)):
        norm.weight.data = weight[0].float()
        exact = norm(inputs.float()).bfloat16()
        norm.weight.data = weight[0]
        assert not torch.equal(norm(inputs), exact)
        serving.round_norms_once(torch.nn.Sequential(norm))
        assert torch.equal(norm(inputs), exact)
