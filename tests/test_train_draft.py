"""The script that trains a draft for the example model: run for a moment; its folder is one that an export could write."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_export.models import parameters_of
from megatron_export.models.sources import expected_shapes

from .support.models import EXAMPLE, read_json, tensors

pytestmark = pytest.mark.whole
SCRIPT = Path(__file__).parents[1] / "examples" / "train_draft.py"


def test_it_writes_the_tensors_that_an_export_has(tmp_path: Path) -> None:
    (tmp_path / "library").mkdir()
    shutil.copy(EXAMPLE / "calibration.txt", tmp_path / "library")
    flags = ("--minutes", "0.02", "--batch-size", "2", "--device", "cpu", "--known", "300", "--ffn", "64")
    places = ("--base", EXAMPLE, "--library", tmp_path / "library", "--output", tmp_path / "draft")
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, SCRIPT, *flags, *places]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    config, held = read_json(tmp_path / "draft" / "config.json"), tensors(tmp_path / "draft")
    sources = parameters_of(config).values()
    assert {name: tuple(tensor.shape) for name, tensor in held.items()} == expected_shapes(sources)
    assert all(held[name].dtype == source.torch_dtype for source in sources for name in source.names().values())
    known = held["d2t"] + torch.arange(300)
    assert known.unique().equal(known) and int(known.max()) < config["vocab_size"]
