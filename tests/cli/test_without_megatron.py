"""Where Megatron-Core is not installed: all that needs no Megatron model works, and what needs one says what to install."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest

from megatron_export.engines.checks import release_of

from ..support.command_line import python
from ..support.exported import exported

# Python as it is without Megatron-Core: whoever imports it, and whatever asks for it, is told that there is none.
HIDE = """
import json, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "megatron":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""
COMMANDS = """
from megatron_export.cli import commands

for line in json.loads(sys.argv[1]):
    said = []
    status = commands.main(lambda *words, **_: said.append(" ".join(map(str, words))), line)
    print(json.dumps([status, "\\n".join(said)]))
assert "megatron" not in sys.modules
"""
LIBRARY = """
import torch
import megatron_export
from megatron_export.export.pipeline import export_hf_checkpoint

for call in (
    lambda: megatron_export.calibrate(torch.nn.Linear(2, 2), [torch.zeros(1, 2, dtype=torch.int64)]),
    lambda: megatron_export.export_hf_checkpoint(torch.nn.Linear(2, 2), sys.argv[1], hf_model=sys.argv[2]),
):
    try:
        call()
    except megatron_export.ExportError as error:
        print(error)
"""
TOLD = "Megatron models need megatron-core, which is not installed here. Install it: pip install megatron-core"


def commands(*lines: tuple[object, ...]) -> list[tuple[int, str]]:
    """The exit status and all that was said by each of some commands, in one Python without Megatron-Core."""
    done = python("-c", HIDE + COMMANDS, json.dumps([[str(word) for word in line] for line in lines]))
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def folders(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model, and two exports of it."""
    base = tmp_path_factory.mktemp("exports")
    for form in ("fp8_pb", "nvfp4"):
        exported(models["llama31"], base / form, form)
    return models["llama31"], base / "fp8_pb", base / "nvfp4"


def test_finished_checkpoints_are_judged_and_exports_planned(folders: tuple[Path, Path, Path]) -> None:
    source, one, other = folders
    (planned, plan), (checked, check), (verified, verify), (differs, diff) = commands(
        ("plan", "--hf-model", source, "--format", "nvfp4", "--tp", 2),
        ("check", other),
        ("verify", other, "--reference", source),
        ("diff", one, other),
    )
    assert (planned, checked, verified) == (0, 0, 0), (plan, check, verify)
    assert "format            nvfp4" in plan
    assert "vLLM" in check
    assert "nothing wrong was found" in verify
    assert (differs, "fp8_pb" in diff) == (1, True), diff


def test_transformers_models_are_calibrated_and_exported(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, output = folders[0], tmp_path / "out"
    data = (
        "--calib-data",
        source.parent / "ids" / "calibration.safetensors",
        "--calib-samples",
        4,
        "--calib-seq-len",
        16,
    )
    flags = ("--engine", "transformers", "--hf-model", source, "--format", "fp8", "--device", "cpu", *data)
    ((status, said),) = commands(("export", *flags, "--output", output, "--verify"))
    assert (status, "nothing wrong was found" in said) == (0, True), said


def test_an_export_says_in_a_sentence_what_to_install(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Before it makes anything."""
    ((status, said),) = commands(("export", "--hf-model", folders[0], "--format", "bf16", "--output", tmp_path / "out"))
    assert (status, said.strip()) == (1, f"error: {TOLD}")
    assert list(tmp_path.iterdir()) == []


def test_so_does_the_library(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    done = python("-c", HIDE + LIBRARY, tmp_path / "out", folders[0])
    assert done.stdout.splitlines() == [TOLD, TOLD], done.stderr


def test_triton_is_asked_for_where_megatron_core_imports_it() -> None:
    """torch for CPUs does not bring it. Before 0.19 layers of Mamba alone need it."""
    hide = HIDE.replace('"megatron"', '"triton"')
    lines = (
        "from importlib.metadata import version",
        "from megatron_export.common.optional import part",
        "try:",
        "    build = part('mcore.build')",
        "    print(version('megatron-core'))",
        "    build._hybrids()",
        "except Exception as error:",
        "    print(error)",
    )
    done = python("-c", hide + "\n".join(lines))
    assert done.returncode == 0, done.stderr
    *built, said = done.stdout.splitlines()
    assert said == (
        "Megatron-Core imports triton, since 0.19 for all models and before for those with layers of Mamba; torch for CPUs "
        "does not bring it. Install it: pip install triton"
    )
    assert bool(built) == (release_of(version("megatron-core")) < (0, 19))
