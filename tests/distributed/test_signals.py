"""Signals to stop: heeded between steps, and after a while also where no step ends."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from megatron_export.common.errors import Interrupted
from megatron_export.distributed import signals
from megatron_export.distributed.signals import asked_to_stop, heed, heeded, noticed

IN_C = """
import hashlib, signal, sys
from megatron_export.distributed import signals
signals.GRACE = 0.5
with signals.noticed():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000_000)  # minutes in which Python runs no handler, as in a collective
"""

WAITING = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background of a script ignores
from megatron_export.distributed.signals import until_interrupted
def run():
    print("ready", flush=True)
    time.sleep(60)
raise SystemExit(until_interrupted(run))
"""


@pytest.mark.parametrize("number", signals.HEEDED)
def test_a_signal_stops_what_goes_step_by_step_and_the_old_handler_is_back(number: int) -> None:
    before, steps = signal.getsignal(number), []
    with noticed():
        assert not asked_to_stop()
        with pytest.raises(Interrupted, match=f"stopped by {number.name}"):
            for step in heeded(range(5)):
                steps.append(step)
                if step == 2:
                    os.kill(os.getpid(), number)
    assert steps == [0, 1, 2]
    assert signal.getsignal(number) is before
    with noticed():
        heed()  # of an earlier run


def test_work_that_ends_in_time_is_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "GRACE", 0.2)
    threads = threading.active_count()
    with noticed():
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked_to_stop()
    time.sleep(0.4)
    assert threading.active_count() == threads


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_process_that_hangs_outside_of_python_leaves_too(number: int, status: int) -> None:
    started = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-c", IN_C], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as one:
        try:
            assert one.stdout.readline() == "ready\n"
            time.sleep(0.2)
            one.send_signal(number)
            _, said = one.communicate(timeout=20)
        finally:
            one.kill()
    assert one.returncode == status
    assert said == f"\nstopped by {number.name}: --resume goes on with what is complete\n"
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(("rank", "line"), [("0", "\nstopped by SIGINT\n"), ("1", "")])
def test_ctrl_c_where_nothing_heeds_it_is_one_line_of_rank_0_and_status_130(rank: str, line: str) -> None:
    """While a command imports torch, and in the commands that only read."""
    told = [sys.executable, "-c", WAITING]
    with subprocess.Popen(
        told, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"RANK": rank}
    ) as one:
        try:
            assert one.stdout.readline() == "ready\n"
            one.send_signal(signal.SIGINT)
            _, said = one.communicate(timeout=20)
        finally:
            one.kill()
    assert (one.returncode, said) == (130, line)


def test_what_came_is_forgotten_with_the_run_that_it_stopped() -> None:
    with signals.noticed():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted, match="stopped by SIGTERM"):
            signals.heed()
    signals.heed()
