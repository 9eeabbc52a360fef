"""SIGTERM and SIGUSR1, which a cluster sends before it takes a job away, are noticed, and heeded where the work can stop."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from .errors import Interrupted

AGAIN = 75  # EX_TEMPFAIL of sysexits.h: try again
GRACE = 8.0  # seconds until a process that could not stop where it is leaves all the same
HEEDED = (signal.SIGTERM, signal.SIGUSR1)

_noticed: list[str] = []


@contextmanager
def noticed() -> Iterator[None]:
    """While open, the signals do not end this process at once. Main thread only."""

    def handle(number: int, frame: FrameType | None) -> None:
        if not _noticed:
            timer = threading.Timer(GRACE, _leave)
            timer.daemon = True
            timer.start()
        _noticed.append(signal.Signals(number).name)

    _noticed.clear()
    before = {number: signal.signal(number, handle) for number in HEEDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def asked_to_stop() -> bool:
    """Whether one of the signals came."""
    return bool(_noticed)


def heed() -> None:
    """Stop here if one of the signals came: called where nothing is left half done."""
    if _noticed:
        raise Interrupted(f"stopped by {_noticed[0]}")


def heeded(steps: Iterable) -> Iterator:
    """The steps, as long as no signal came."""
    for step in steps:
        heed()
        yield step


def _leave() -> None:
    """A collective or a long step holds the process: what is on disk is complete in itself, so it may be left."""
    os.write(2, f"\nstopped by {_noticed[0]}: --resume goes on with what is complete\n".encode())
    os._exit(AGAIN)
