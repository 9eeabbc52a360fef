"""--resume: what it refuses, what it does not do twice, and what it does where there is nothing to go on with."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_export.writing.journal import journal_of, kept

from ..support.faults import Fault, export_with
from ..support.models import LENGTH, contents, read_json

pytestmark = pytest.mark.whole

HALF = Fault("raise", "last bucket", (1,))


@pytest.fixture
def flags(models: dict, tmp_path: Path) -> tuple:
    source = tmp_path / "model"
    shutil.copytree(models["llama31"], source)
    shutil.copytree(models["llama31"].parent / "ids", tmp_path / "ids")
    return ("--device", "cpu", "--tp", 2, "--hf-model", source, "--calib-data", tmp_path / "ids" / "calibration.safetensors",
            "--calib-seq-len", LENGTH, "--calib-batch-size", 2, "--max-shard-size", "60KB",
            "--output", tmp_path / "out")  # fmt: skip


CALIBRATION = ("--calib-data", "--calib-seq-len", "--calib-batch-size")
USUAL = ("--format", "fp8", "--calib-samples", 4)


@pytest.fixture
def interrupted(flags: tuple, tmp_path: Path) -> int:
    """How many files an interrupted export has completed."""
    statuses, said, _ = export_with(HALF, tmp_path, *flags, *USUAL)
    assert statuses == [1, 1]
    complete = kept(tmp_path / "out")
    assert f"{complete} of its files are complete: the same command with --resume goes on with them" in said
    return complete


def test_what_is_complete_is_neither_calibrated_nor_written_again(
    interrupted: int, flags: tuple, tmp_path: Path
) -> None:
    assert 0 < interrupted < 5
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / ".out.partial").glob("*.safetensors")}
    statuses, said, _ = export_with(None, tmp_path, *flags, *USUAL, "--resume")
    assert statuses == [0, 0], said
    assert "calibrate" not in said
    unchanged = [p for p, when in files.items() if (tmp_path / "out" / p.name).stat().st_mtime_ns == when]
    assert len(unchanged) == interrupted
    fresh = (*flags[:-1], tmp_path / "fresh")
    assert export_with(None, tmp_path, *fresh, *USUAL)[0] == [0, 0]
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("sizes", [("--tp", 1), ("--pp", 2, "--tp", 1)])
def test_an_export_goes_on_on_another_topology(sizes: tuple, interrupted: int, flags: tuple, tmp_path: Path) -> None:
    world = 2 if "--pp" in sizes else 1
    statuses, said, _ = export_with(None, tmp_path, *flags, *USUAL, *sizes, "--resume", world=world)
    assert statuses == [0] * world, said
    fresh = (*flags[:-1], tmp_path / "fresh")
    statistics = journal_of(tmp_path / "out")
    assert not statistics.exists()
    assert export_with(None, tmp_path, *fresh, *USUAL)[0] == [0, 0]
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


FORMATS = {  # format -> what it is asked for with
    **{name: () for name in ("w4a16_nvfp4", "fp8_pc_pt", "mxfp8", "mxfp4", "w4a8_mxfp4_fp8")},
    "w4a8_nvfp4_fp8": ("--calib-samples", 4),
    "a recipe": ("--recipe", "nvfp4_mlp_fp8_attention", "--set", "*.layers.0.mlp.*=mxfp8", "--calib-samples", 4),
}


def killed_with_a_file(folder: Path) -> None:
    """In a rank: die as soon as a file is complete, which threads see to."""
    until = time.monotonic() + 4
    while not kept(folder) and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_goes_on_after_a_kill_to_the_same_bytes(name: str, flags: tuple, tmp_path: Path) -> None:
    more = FORMATS[name]
    asked = (*more, *(() if "--recipe" in more else ("--format", name)), "--timeout", 5, "--max-shard-size", "30KB")
    if not more:  # it measures nothing
        flags = tuple(
            one for n, one in enumerate(flags) if not {*map(str, flags[max(n - 1, 0) : n + 1])} & set(CALIBRATION)
        )
    fault = Fault("kill", "last bucket", (0,), (killed_with_a_file, tmp_path / "out"))
    statuses, said, _ = export_with(fault, tmp_path, *flags, *asked)
    assert statuses[0] == -signal.SIGKILL, said
    complete = kept(tmp_path / "out")
    statuses, said, _ = export_with(None, tmp_path, *flags, *asked, "--resume")
    assert statuses == [0, 0], said
    files = len(list((tmp_path / "out").glob("*.safetensors")))
    assert 0 < complete < files
    assert f"{complete} of {files} files were complete already" in said
    assert export_with(None, tmp_path, *flags[:-1], tmp_path / "fresh", *asked)[0] == [0, 0]
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("others", "what"),
    [
        (("--format", "nvfp4", "--calib-samples", 4), "settings"),
        (("--format", "fp8", "--calib-samples", 4, "--max-shard-size", "70KB"), "settings"),
        (("--format", "fp8", "--calib-samples", 6), "source of model or calibration data"),
        (("--format", "fp8", "--calib-samples", 4, "--kv-cache", "fp8"), "settings"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_lost(
    others: tuple, what: str, interrupted: int, flags: tuple, tmp_path: Path
) -> None:
    statuses, said, _ = export_with(None, tmp_path, *flags, *others, "--resume")
    assert statuses == [1, 1]
    assert f"an interrupted export with another {what}: it cannot be continued" in said
    assert kept(tmp_path / "out") == interrupted


def changed(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"][0] += 1


def swapped(tensors: dict[str, Tensor]) -> None:
    gate, up = (f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up"))
    tensors[gate], tensors[up] = tensors[up], tensors[gate]


@pytest.mark.parametrize("change", [changed, swapped])
def test_another_model_is_refused(
    change: Callable[[dict[str, Tensor]], None], interrupted: int, flags: tuple, tmp_path: Path
) -> None:
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    statuses, said, _ = export_with(None, tmp_path, *flags, *USUAL, "--resume")
    assert statuses == [1, 1]
    assert "an interrupted export with another model: it cannot be continued" in said


def test_resume_with_nothing_to_go_on_with_starts_and_a_second_time_finds_it_done(flags: tuple, tmp_path: Path) -> None:
    for _ in range(2):
        statuses, said, _ = export_with(None, tmp_path, *flags, *USUAL, "--resume")
        assert statuses == [0, 0], said
    made = (tmp_path / "out" / "model.safetensors.index.json").stat().st_mtime_ns
    assert export_with(None, tmp_path, *flags, *USUAL, "--resume")[0] == [0, 0]
    assert (tmp_path / "out" / "model.safetensors.index.json").stat().st_mtime_ns == made
    statuses, said, _ = export_with(None, tmp_path, *flags, "--format", "nvfp4", "--calib-samples", 4, "--resume")
    assert statuses == [1, 1]
    assert "is not empty" in said


def test_the_manifest_says_how_the_checkpoint_came_about(flags: tuple, tmp_path: Path) -> None:
    assert export_with(None, tmp_path, *flags, *USUAL)[0] == [0, 0]
    said = read_json(tmp_path / "out" / "export_manifest.json")
    assert said["run"]["topology"]["tp"] == 2
    assert said["run"]["hf_model"] == "model"
    assert said["run"]["calibration"]["calib_samples"] == 4
    assert said["files"].keys() == {p.name for p in (tmp_path / "out").iterdir()} - {"export_manifest.json"}
