"""Worlds of their own in which something goes wrong at a chosen point of an export."""

import errno
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_export import formats
from megatron_export.cli import export_command
from megatron_export.common.optional import part
from megatron_export.distributed import heartbeat, signals
from megatron_export.export import transport, weight_amax
from megatron_export.planning import shard_files
from megatron_export.writing import read_back, staging

from .models import LENGTH
from .ranks import CONTEXT, as_rank, free_port

subject, load_hf = part("calibration.mcore.subject"), part("mcore.load_hf")

SECONDS = 60.0
SMALL = (20_000, 20_000)  # bytes of a file, beyond which the system itself refuses

# name -> where, and at which call of it, counted from 1
POINTS: dict[str, tuple[Any, str, int]] = {
    "load": (load_hf, "shard_of", 5),
    "calibrate": (subject, "_step", 2),
    "survey": (weight_amax, "_read", 3),
    "first bucket": (formats, "encode", 2),
    "last bucket": (formats, "encode", 26),
    "send": (transport, "deliver", 3),
    "first file": (staging.Staging, "finish", 1),
    "last file": (staging.Staging, "finish", 5),
    "verify": (read_back, "replace", 2),
    "publish": (staging.Staging, "publish", 1),
    "rename": (staging.Staging, "_replace", 1),
    "published": (staging.Staging, "__exit__", 1),
    "tidied": (staging.Staging, "_leave", 1),
}
AT_WRITER = ("first file", "last file", "verify", "publish", "rename", "published", "tidied")


@dataclass(frozen=True)
class Fault:
    """What happens on which ranks when they come to a point."""

    action: str
    point: str
    ranks: tuple[int, ...]
    other: tuple[Callable[..., None], Any] | None = None  # something to call, and with what

    def __str__(self) -> str:
        return f"{self.action} at {self.point} on rank {' and '.join(map(str, self.ranks))}".replace(" ", "_")


def _raise(error: Exception) -> None:
    raise error


ACTIONS: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "freeze": lambda: os.kill(os.getpid(), signal.SIGSTOP),  # no connection breaks, and nothing is said any more
    "raise": lambda: _raise(RuntimeError("injected")),
    "slow": lambda: time.sleep(3),
    "no room": lambda: _raise(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    "small files": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, SMALL),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGUSR1": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    "SIGINT": lambda: os.kill(os.getpid(), signal.SIGINT),
}


def in_small_steps() -> None:
    """Short waits and small buckets, in this process."""
    heartbeat.BEAT, heartbeat.GRACE, signals.GRACE = 0.1, 1.0, 5.0
    shard_files.BUCKET_BYTES, shard_files.LANES = 30_000, 2


@contextmanager
def armed(fault: Fault | None, rank: int) -> Iterator[None]:
    if fault is None or rank not in fault.ranks:
        yield
        return
    home, name, number = POINTS[fault.point]
    real, calls = getattr(home, name), iter(range(1, 1_000_000))

    def called(*args: Any, **kwargs: Any) -> Any:
        on_meta = name == "encode" and args[1].device.type == "meta"
        if not on_meta and next(calls) == number:
            call, *given = fault.other or (ACTIONS[fault.action],)
            call(*given)
        return real(*args, **kwargs)

    with mock.patch.object(home, name, called):
        yield


def _rank(rank: int, world: int, port: int, fault: Fault | None, flags: tuple[str, ...], log: str) -> None:
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600), 2)
    as_rank(rank, world, port)
    in_small_steps()
    with armed(fault, rank):
        status = export_command.main(lambda *words, **_: print(*words, file=sys.stderr, flush=True), list(flags))
    os._exit(status)


def flags_of(models: dict) -> tuple:
    """An export at TP=2 into five files, but for where it goes."""
    source = models["llama31"]
    data = source.parent / "ids" / "calibration.safetensors"
    return ("--device", "cpu", "--tp", 2, "--hf-model", source, "--format", "fp8", "--calib-data", data,
            "--calib-samples", 4, "--calib-seq-len", LENGTH, "--calib-batch-size", 2, "--max-shard-size", "60KB",
            "--timeout", 5)  # fmt: skip


def export_with(fault: Fault | None, folder: Path, *flags: object, world: int = 2) -> tuple[list[int], str, float]:
    """The exit status of every rank, negative if a signal ended it, what they said, and the seconds that it took."""
    port = free_port()
    log, started = folder / "said.log", time.monotonic()
    log.unlink(missing_ok=True)
    texts = tuple(map(str, flags))
    processes = [
        CONTEXT.Process(target=_rank, args=(rank, world, port, fault, texts, str(log)), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    frozen = fault.ranks if fault and fault.action == "freeze" else ()
    for rank, process in enumerate(processes):
        if rank not in frozen:
            process.join(max(started + SECONDS - time.monotonic(), 0.1))
    seconds = time.monotonic() - started
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive() and rank not in frozen]
    for process in processes:
        process.kill()
        process.join()
    said = log.read_text()
    assert not hanging, f"ranks {hanging} hang after {fault}; said: {said}"
    return [process.exitcode for process in processes], said, seconds
