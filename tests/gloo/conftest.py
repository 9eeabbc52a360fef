"""Fixtures of tests that damage a model."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def source(models: dict[str, Path], tmp_path: Path) -> Path:
    """A model of the test's own, to damage; its calibration data is beside it."""
    shutil.copytree(models["llama31"].parent, tmp_path / "models")
    return tmp_path / "models" / "llama31"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A folder that does not exist, in one that is empty."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "out"
