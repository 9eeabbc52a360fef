"""A folder that is uploaded says what it was made from, and not where that lay."""

import json
import shutil
from pathlib import Path
from unittest import mock

import pytest

from megatron_export.cli import hub
from megatron_export.common.text import without_folders
from megatron_export.verify.report.facts import account_of
from megatron_export.verify.thresholds import Wanted, inspected
from megatron_export.writing.manifest import names_in, origin_of

from ..support.command_line import command_line as run
from ..support.models import read_json
from ..support.ranks import Ranks, command

HOME = "private-home"


def pushing(*flags: object) -> tuple[int, str]:
    """In a rank: the command, with a hub that takes everything."""
    taken = mock.patch.object(hub, "push", lambda folder, repository: f"https://hub/{repository}")
    with taken, mock.patch.object(hub, "check", lambda repository: None):
        return command(*flags)


@pytest.fixture
def home(models: dict[str, Path], tmp_path: Path) -> Path:
    """Where somebody keeps a model, and ids to calibrate with."""
    shutil.copytree(models["llama31"].parent, tmp_path / HOME / "my models")
    return tmp_path / HOME


def told_in(folder: Path, words: str) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file() and words.encode() in path.read_bytes()]


def test_an_uploaded_folder_names_its_inputs_and_not_where_they_lie(home: Path, ranks: Ranks) -> None:
    model, ids = home / "my models" / "llama31", home / "my models" / "ids" / "calibration.safetensors"
    made = ("--device", "cpu", "--hf-model", model, "--format", "fp8", "--report", "--push-to-hub", "org/name")
    measured = ("--calib-data", ids, "--calib-samples", 4, "--calib-seq-len", 16)
    saved = ("--save-calibration", home / "statistics.safetensors")
    ((status, said),) = ranks.call(1, pushing, *made, *measured, *saved, "--output", home / "one")
    assert status == 0, said
    loaded = ("--load-calibration", home / "statistics.safetensors", "--output", home / "two")
    ((status, said),) = ranks.call(1, pushing, *made, *loaded)
    assert status == 0, said
    for folder in (home / "one", home / "two"):
        assert {"report.html", "README.md", "export_manifest.json"} <= {path.name for path in folder.iterdir()}
        assert told_in(folder, HOME) == told_in(folder, "my models") == []
        assert told_in(folder, "llama31")
    run_of = read_json(home / "one" / "export_manifest.json")["run"]
    assert (run_of["hf_model"], run_of["calibration"]["calib_data"]) == ("llama31", "calibration.safetensors")
    assert read_json(home / "two" / "export_manifest.json")["run"]["calibration"]["load_calibration"] == (
        "statistics.safetensors"
    )
    shutil.move(home / "one", home / "my models" / "one")
    status, said = run("verify", home / "my models" / "one", "--device", "cpu", "--report")
    assert status == 0, said  # the original was found beside it
    assert told_in(home / "my models" / "one", HOME) == []


def test_a_report_has_no_paths_even_where_something_is_wrong(home: Path, tmp_path: Path) -> None:
    model = home / "my models" / "llama31"
    found = inspected(model, model, Wanted())
    found.problems[:] = [f"{model}: odd", f"{model / 'config.json'} is odd", "/etc/private-home/x.json: odd, 1/2, a/b"]
    found.unscored = f"no text file {model.parent / 'x.txt'}"
    told = account_of(found, str(model)).found
    assert told.problems == ["llama31: odd", "llama31/config.json is odd", "x.json: odd, 1/2, a/b"]
    assert told.unscored == "no text file x.txt"


def test_a_path_becomes_its_name_and_a_hub_id_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep" / "model").mkdir(parents=True)
    assert names_in({"a": "deep/model", "b": ["/x/y.txt", "deep/../deep"], "c": 3, "d": None}) == {
        "a": "model",
        "b": ["y.txt", "deep"],
        "c": 3,
        "d": None,
    }
    assert [names_in(said) for said in ("org/name", "fp8", "", "x" * 5000)] == ["org/name", "fp8", "", "x" * 5000]
    assert names_in("/root/.cache/huggingface/hub/models--org--name/snapshots/0a1b") == "org/name"
    assert names_in(".") == tmp_path.name
    assert without_folders("see https://x/y/z, /home/me/a.txt and b/c (/d/e)") == "see https://x/y/z, a.txt and b/c (e)"


@pytest.mark.parametrize("named", ["..", ".", "", "nothing", "/nothing", "x" * 5000, 7, None])
def test_an_original_that_is_not_there_is_asked_for(named: object, tmp_path: Path) -> None:
    said = {"kind": "megatron_export manifest 1", "run": {"hf_model": named}}
    (tmp_path / "export_manifest.json").write_text(json.dumps(said))
    (tmp_path / "model.safetensors").touch()
    status, shown = run("verify", tmp_path)
    assert (status, "Give --reference PATH_OR_ID" in shown) == (2, True)


def test_an_original_beside_a_checkpoint_is_found(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "model").mkdir()
    for name, found in (("model", str(tmp_path / "model")), ("org/name", "org/name")):
        said = {"kind": "megatron_export manifest 1", "run": {"hf_model": name}}
        (tmp_path / "out" / "export_manifest.json").write_text(json.dumps(said))
        assert origin_of(tmp_path / "out") == found
