"""`launch/benchmark.py export` and `scale` as their user sees them, and the models that they make of nothing but names."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from xml.etree import ElementTree

import pytest

from megatron_export import export_hf_checkpoint
from megatron_export.mcore import parallel_state

from ..support.command_line import python
from ..support.models import EXAMPLE, contents, read_json
from ..support.plans import plan_of
from ..support.ranks import Ranks

pytestmark = pytest.mark.whole

LAUNCH = Path(__file__).parents[2] / "launch"
SMALL = ("--shape", "tiny", "--device", "cpu", "--repeat", "1")


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """bench.shapes, imported as the script does."""
    monkeypatch.syspath_prepend(LAUNCH)
    return import_module("bench.shapes")


def run(*flags: object, path: Path | None = None) -> subprocess.CompletedProcess:
    """The command; `path` is where Python looks for packages first."""
    where = os.pathsep.join(str(part) for part in (path, os.environ.get("PYTHONPATH")) if part)
    return python(LAUNCH / "benchmark.py", *flags, PYTHONPATH=where)


def rows_of(said: str) -> list[dict[str, str]]:
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if "|" in line]
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_export_shows_a_row_for_every_format_and_kind_of_sync_beside_save_file(tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "rows.json"
    done = run("export", *SMALL, "--formats", "fp8", "nvfp4", "--output", out, "--json", file)
    assert done.returncode == 0, done.stderr
    rows = rows_of(done.stdout)
    kinds = [(form, sync) for form in ("fp8", "nvfp4") for sync in ("no", "yes")]
    assert [(row["format"], row["fsync"]) for row in rows] == kinds
    for row, kept in zip(rows, read_json(file)["rows"], strict=True):
        assert row["ratio"] == f"{kept['seconds'] / kept['saved'][0]:.2f}"
        assert (kept["format"], kept["written"] < kept["model_bytes"], kept["wire"]) == (row["format"], True, 0)
    assert list(out.iterdir()) == []


def test_trace_shows_what_each_kind_of_thread_did_and_writes_every_call(tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "events.json"
    done = run("trace", "--shape", "tiny", "--device", "cpu", "--format", "fp8", "--output", out, "--events", file)
    assert done.returncode == 0, done.stderr
    rows = rows_of(done.stdout)
    assert {"MainThread", "write", "read", "judge", "finish"} <= {row["thread"] for row in rows}
    calls = {(row["thread"], row["what"]): int(row["calls"]) for row in rows}
    events = read_json(file)["traceEvents"]
    assert sum(calls.values()) == len(events)
    assert calls["write", "write"] == calls["write", "checksum of what is written"]
    assert calls["MainThread", "encode"] == sum(event["name"] == "encode" for event in events)
    assert list(out.iterdir()) == []


def test_load_is_compared_with_safetensors_alone(tmp_path: Path) -> None:
    done = run("load", *SMALL, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    [row] = rows_of(done.stdout)
    assert (row["model"], row["bytes"]) == ("tiny", "1.05 MB")
    assert float(row["speed against safetensors"]) > 0
    assert list((tmp_path / "out").iterdir()) == []


def test_scale_shows_models_of_ever_more_layers_and_draws_them(tmp_path: Path) -> None:
    out, first, plot = tmp_path / "out", tmp_path / "first.json", tmp_path / "plot.svg"
    flags = ("scale", *SMALL, "--fsync", "no", "--alone", "--output", out)
    assert run(*flags, "--sizes", "1", "--json", first).returncode == 0
    done = run(*flags, "--sizes", "2", "4", "--with", first, "--svg", plot)
    assert done.returncode == 0, done.stderr
    assert [row["model"].split(",")[1] for row in rows_of(done.stdout)] == [" 1 layers", " 2 layers", " 4 layers"]
    lines = ElementTree.parse(plot).getroot().findall("{http://www.w3.org/2000/svg}polyline")
    points = [[point.split(",") for point in line.get("points").split()] for line in lines]
    assert [len(line) for line in points] == [3, 3]  # seconds and memory; no save_file, as each is --alone
    across = [float(x) for x, _ in points[0]]
    assert across == sorted(across)


def test_what_does_not_fit_is_refused_before_any_work(tmp_path: Path) -> None:
    done = run("export", "--shape", "405b", "--device", "cpu", "--formats", "fp8", "--output", tmp_path / "out")
    assert done.returncode == 1
    assert "405b of 126 layers in fp8 takes 2.0" in done.stderr
    assert "of memory, and" in done.stderr
    assert not (tmp_path / "out").exists()


def test_known_shapes_have_the_parameters_that_their_publishers_count(shapes: ModuleType) -> None:
    counts = {
        "1b": 1_100_048_384,
        "8b": 8_030_261_248,
        "70b": 70_553_706_496,
        "405b": 405_853_388_800,
        "30b-a3b": 30_532_122_624,
        "235b-a22b": 235_093_634_560,
    }
    for name, count in counts.items():
        config = shapes.config_of(name, None, None)
        assert plan_of(config, format="bf16").source_nbytes == 2 * count


def made(launch: Path, kind: str, config: dict, source: Path, out: Path, tp: int, ep: int) -> None:
    """In a rank: export a model of that kind that was made from names."""
    sys.path.insert(0, str(launch))
    from bench.shapes import build

    with parallel_state.started(tp, 1, "cpu", ep=ep):
        with parallel_state.current() as here:
            model = build(kind, config, here)
        export_hf_checkpoint(model, out, hf_model=source, format="bf16")


@pytest.mark.parametrize(("name", "tp", "ep"), [("llama32", 2, 1), ("qwen3_moe", 1, 2), ("llama4", 2, 1)])
def test_weights_that_are_made_from_names_are_the_same_on_all_topologies(
    ranks: Ranks, models: dict[str, Path], tmp_path: Path, name: str, tp: int, ep: int
) -> None:
    source = models[name]
    config = read_json(source / "config.json")
    ranks.call(1, made, LAUNCH, "megatron", config, source, tmp_path / "one", 1, 1)
    ranks.call(2, made, LAUNCH, "megatron", config, source, tmp_path / "two", tp, ep)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_model_of_transformers_that_is_made_from_names_is_that_of_megatron(
    ranks: Ranks, models: dict[str, Path], tmp_path: Path
) -> None:
    source = models["llama32"]
    config = read_json(source / "config.json")
    for kind in ("megatron", "transformers"):
        ranks.call(1, made, LAUNCH, kind, config, source, tmp_path / kind, 1, 1)
    assert contents(tmp_path / "megatron") == contents(tmp_path / "transformers")


def test_rows_that_were_not_written_by_json_are_refused(tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text(json.dumps({"rows": [{"tool": "other"}]}))
    done = run("scale", *SMALL, "--with", tmp_path / "odd.json", "--output", tmp_path / "out")
    assert (done.returncode, "not written by --json" in done.stderr) == (1, True)


PEER = {
    "quantization": """
        FP8_DEFAULT_CFG, INT4_AWQ_CFG = "fp8", "int4_awq"
        def quantize(model, config, forward_loop):
            forward_loop(model)
            model.quantized = config
    """,
    "export": """
        import torch
        from pathlib import Path
        from safetensors.torch import save_file
        def export_mcore_gpt_to_hf(model, pretrained, dtype, export_dir):
            assert (model.quantized, dtype, (Path(pretrained) / "config.json").is_file()) == ("fp8", torch.bfloat16, True)
            export_hf_checkpoint(model, export_dir)
        def export_hf_checkpoint(model, export_dir):
            assert model.quantized == "fp8"
            Path(export_dir).mkdir()
            save_file({"a": torch.zeros(1000)}, Path(export_dir) / "model.safetensors")
    """,
}


def packages(folder: Path) -> Path:
    """With a package in ModelOpt's place that has just the calls that are made of it."""
    for name, code in PEER.items():
        home = folder / "modelopt" / "torch" / name
        home.mkdir(parents=True)
        (home / "__init__.py").write_text(dedent(code))
    return folder


@pytest.mark.parametrize(("source", "said"), [("megatron", ""), ("transformers", ", transformers")])
def test_peer_measures_both_on_a_model_that_can_be_run(tmp_path: Path, source: str, said: str) -> None:
    out = tmp_path / "out"
    flags = ("--formats", "fp8", "--source", source, "--output", out)
    done = run("peer", *SMALL, *flags, path=packages(tmp_path / "packages"))
    assert done.returncode == 0, done.stderr
    ours, theirs = rows_of(done.stdout)
    assert (ours["tool"], theirs["tool"], theirs["written"]) == (f"megatron_export{said}", f"ModelOpt{said}", "4.07 KB")
    assert float(ours["seconds"]) > 0
    assert list(out.iterdir()) == []


def test_search_times_both_on_the_same_tokens(tmp_path: Path) -> None:
    flags = ("--samples", 3, "--tokens", 8, "--batch", 2, "--device", "cpu", "--json", tmp_path / "rows.json")
    done = run("search", "--hf-model", EXAMPLE, "--layers", 1, *flags, path=packages(tmp_path / "packages"))
    assert done.returncode == 0, done.stderr
    assert [row["tool"] for row in rows_of(done.stdout)] == ["megatron_export", "ModelOpt"]
    found = read_json(tmp_path / "rows.json")
    assert (found["samples"], found["layers"]) == (3, 1)
    assert all(row["tokens/s"] * row["seconds"] == pytest.approx(24) for row in found["rows"])


@pytest.mark.parametrize(
    ("flags", "reason"),
    [(("--batch", 0), "at least 1"), (("--format", "nvfp4_awq", "--device", "cpu"), "on a GPU only. Add --alone")],
)
def test_search_refuses_what_cannot_be_measured(
    shapes: ModuleType, capsys: pytest.CaptureFixture, flags: tuple, reason: str
) -> None:
    assert import_module("benchmark").main(["search", *map(str, flags)]) == 1
    assert reason in capsys.readouterr().err


def test_peer_says_what_to_install(
    shapes: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(import_module("bench.peering"), "find_spec", lambda name: None)
    assert import_module("benchmark").main(["peer"]) == 1
    assert "pip install nvidia-modelopt" in capsys.readouterr().err
