"""Under a real torchrun: signals reach the ranks, a rank that is killed is named, --resume finishes, and our words come last."""

import os
import re
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


def spoken(said: str) -> list[str]:
    """The lines that ranks themselves said of an error."""
    return [line for line in said.splitlines() if line.startswith(("error: ", "stopped by"))]


def last_words(said: str) -> str:
    """What torchrun shows last: the message of the rank that failed first, above a line of =."""
    *_, last, border = said.rstrip().splitlines()
    assert set(border) == {"="}, said
    return last


@pytest.mark.parametrize(
    ("number", "more", "status"),
    [
        pytest.param(signal.SIGTERM, (), "75", id="SIGTERM"),
        pytest.param(signal.SIGINT, (), "130", id="SIGINT", marks=pytest.mark.slow),  # as SIGTERM, but for the status
        pytest.param(
            signal.SIGUSR1, ("--signals-to-handle", "SIGTERM,SIGUSR1"), "75", id="SIGUSR1", marks=pytest.mark.slow
        ),
    ],
)
def test_a_signal_to_torchrun_ends_all_ranks_with_its_status_and_resume_finishes(
    number: int, more: tuple, status: str, models: dict, tmp_path: Path
) -> None:
    with waiting(models, tmp_path, *more) as (run, pids):
        run.send_signal(number)  # as Ctrl-C does too: its ranks have sessions of their own
        assert run.wait(timeout=30) == 1  # torchrun's own
    said = (tmp_path / "said.log").read_text()
    assert [(tmp_path / f"{rank}.status").read_text() for rank in (0, 1)] == [status, status], said
    [line] = spoken(said)
    assert re.fullmatch(rf"error: stopped by {number.name}: \d of its files are complete: .* --resume goes on .*", line)
    assert said.count("Traceback") == 1, said  # torchrun's own
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
    [line] = spoken(said)
    assert line.startswith(f"error: rank {rank} is gone") and ", at decoder." in line, said
    assert line in said[said.index("Root Cause") :] and "--resume" in last_words(said)
    assert (tmp_path / f"{1 - rank}.status").read_text() == "1"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (("--device", "cpu", "--tp", "3"), 1, "error: world size 2 is not tp * pp * dp"),
        (("--formt", "fp8"), 2, "error: unrecognized arguments: --formt fp8"),
    ],
    ids=["refused", "bad usage"],
)
def test_the_last_that_torchrun_shows_is_our_message(flags: tuple, status: int, message: str, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "launch/export.py"]
    done = subprocess.run(
        [*line, *flags, "--output", str(tmp_path / "out")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1  # torchrun's own
    assert message in last_words(done.stderr), done.stderr
    assert f"exitcode  : {status} " in done.stderr and "To enable traceback" not in done.stderr
