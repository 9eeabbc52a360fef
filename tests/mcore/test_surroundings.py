"""What Megatron users have around the package: a source folder on PYTHONPATH that nobody installed, and NVIDIA Apex."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import megatron_export
from megatron_export.writing.manifest import accelerators

from ..support.models import add_mtp, assert_same, make_model, read_json, tensors

pytestmark = pytest.mark.whole

SURROUNDINGS = Path(__file__).parent / "surroundings"
NAMES = ("llama31", "qwen3_moe", "deepseek_v3", "mtp")  # dense, experts, latent attention, a layer that predicts


@pytest.fixture(scope="module")
def sources(models: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    predicting = make_model(tmp_path_factory.mktemp("mtp"), "deepseek_v3")
    add_mtp(predicting)
    return {name: predicting if name == "mtp" else models[name] for name in NAMES}


@pytest.fixture(scope="module")
def exported(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The folder with one export for each model, and what the process said."""
    folder = tmp_path_factory.mktemp("exported")
    package = Path(megatron_export.__file__).parent
    shutil.copytree(package, folder / "source" / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    path = {"PYTHONPATH": f"{folder / 'source'}:{SURROUNDINGS}:{os.environ.get('PYTHONPATH', '')}"}
    models = [f"{name}={source}" for name, source in sources.items()]
    run = [sys.executable, "-m", "export_folders", *models, "--", "--device", "cpu", "--format", "bf16"]
    done = subprocess.run(run, cwd=folder, env=os.environ | path, capture_output=True, text=True, check=True)
    return folder, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", NAMES)
def test_models_are_built_where_apex_is_though_its_norm_refuses_rms_norm(
    name: str, exported: tuple[Path, dict], sources: dict[str, Path]
) -> None:
    folder, found = exported
    assert found["norm"] == "megatron.core.fusions.fused_layer_norm.FusedLayerNorm"
    status, said = found["exports"][name]
    assert status == 0, said
    assert_same(tensors(folder / name), tensors(sources[name]))


def test_a_source_folder_that_nobody_installed_exports_and_says_its_version(exported: tuple[Path, dict]) -> None:
    folder, found = exported
    assert Path(found["package"]).is_relative_to(folder)
    for name in NAMES:
        run = read_json(folder / name / "export_manifest.json")["run"]
        assert run["versions"]["megatron_export"] == megatron_export.__version__


def test_table_and_manifest_name_what_megatron_core_has_loaded(exported: tuple[Path, dict]) -> None:
    folder, found = exported
    for name in NAMES:
        assert re.search(r"Megatron-Core with +apex unknown\n", "\n".join(found["exports"][name][1]))
        assert read_json(folder / name / "export_manifest.json")["run"]["versions"]["apex"] == "unknown"


def test_versions_are_those_of_what_is_loaded_and_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert accelerators() == {}
    for name in ("transformer_engine", "apex"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    installed = {"transformer_engine": "2.20.2", "apex": "0.1"}
    monkeypatch.setattr("megatron_export.writing.manifest.version", installed.__getitem__)
    assert accelerators() == installed
