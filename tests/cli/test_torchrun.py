"""Under a real torchrun: signals reach the ranks, a rank that is killed is named, and --resume finishes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ..support.faults import export_with, flags_of
from ..support.models import contents

pytestmark = pytest.mark.whole

ROOT = Path(__file__).parents[2]


def flags(models: dict, target: Path) -> list[str]:
    return list(map(str, (*flags_of(models), "--output", target)))


@contextmanager
def waiting(models: dict, folder: Path, *more: str) -> Iterator[tuple[subprocess.Popen, list[int]]]:
    """A torchrun whose two ranks wait in the middle of an export, and their process ids."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *more]
    env = os.environ | {"WAITING": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (folder / "said.log").open("w") as log:
        line = [*start, "-m", "tests.support.waiting", *flags(models, folder / "out")]
        run = subprocess.Popen(line, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)
    notes = [folder / "0.waits", folder / "1.waits"]
    try:
        until = time.monotonic() + 120
        while not all(note.exists() and note.read_text() for note in notes):
            assert run.poll() is None and time.monotonic() < until, (folder / "said.log").read_text()
            time.sleep(0.05)
        yield run, [int(note.read_text()) for note in notes]
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()


@pytest.mark.parametrize(
    ("number", "more"),
    [
        pytest.param(signal.SIGTERM, (), id="SIGTERM"),
        pytest.param(signal.SIGUSR1, ("--signals-to-handle", "SIGTERM,SIGUSR1"), id="SIGUSR1", marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_torchrun_ends_all_ranks_with_75_and_resume_finishes(
    number: int, more: tuple, models: dict, tmp_path: Path
) -> None:
    with waiting(models, tmp_path, *more) as (run, pids):
        run.send_signal(number)
        assert run.wait(timeout=30) == 1  # torchrun's own
    said = (tmp_path / "said.log").read_text()
    assert [(tmp_path / f"{rank}.status").read_text() for rank in (0, 1)] == ["75", "75"], said
    assert said.count("error: ") == 1 and f"error: stopped by {number.name}" in said and "with --resume" in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not (tmp_path / "out").exists()
    for name in ("out", "whole"):
        statuses, said, _ = export_with(None, tmp_path, *flags(models, tmp_path / name), "--resume")
        assert statuses == [0, 0], said
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_is_killed_is_named(rank: int, models: dict, tmp_path: Path) -> None:
    """torchrun sends the other one SIGTERM at once, and would have it leave without a word about the cause."""
    with waiting(models, tmp_path) as (run, pids):
        os.kill(pids[rank], signal.SIGKILL)
        assert run.wait(timeout=40) == 1
    said = (tmp_path / "said.log").read_text()
    assert said.count("error: ") == 1 and f"error: rank {rank} is gone" in said and ", at decoder." in said, said
    assert (tmp_path / f"{1 - rank}.status").read_text() == "1"
    assert not (tmp_path / "out").exists()
