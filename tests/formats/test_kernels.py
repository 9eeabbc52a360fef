"""Which weights the kernels of formats/cuda_kernels.py take; where Triton is, its interpreter runs them on the CPU."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from megatron_export.common.piece import Amax
from megatron_export.formats import FORMATS, chosen, cuda_kernels

pytestmark = pytest.mark.whole


def test_every_format_that_quantizes_has_a_kernel() -> None:
    assert [name for name in FORMATS if not cuda_kernels.made_for(chosen(name))] == ["bf16"]


def test_nothing_stands_for_the_plain_path_on_the_cpu() -> None:
    scalar = torch.ones(())
    for device in ("cpu", "meta"):
        weight = torch.ones(128, 128, dtype=torch.bfloat16, device=device)
        assert [name for name in FORMATS if cuda_kernels.kernel_of(chosen(name), weight, Amax(scalar, scalar))] == []


def test_importing_the_formats_does_not_bring_triton() -> None:
    script = "import sys, torch; sys.modules['triton'] = None; import megatron_export.formats; print('fine')"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "fine\n"


if find_spec("triton"):

    def test_interpreted_kernels_give_the_bytes_of_plain_torch() -> None:
        """On all bfloat16 numbers at many scales, on ties, and on ragged shapes; those of a search too."""
        run = [sys.executable, "-m", "tests.support.interpreted"]
        done = subprocess.run(run, cwd=Path(__file__).parents[2], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "379 cases\n"
