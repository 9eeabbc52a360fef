"""SIGTERM and SIGUSR1, which a cluster sends before it takes a job away, are noticed, and heeded where the work can stop."""

import os
import signal
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from ..common.errors import Interrupted

AGAIN = 75  # EX_TEMPFAIL of sysexits.h: try again
GRACE = 8.0  # seconds until a process that could not stop where it is leaves all the same
HEEDED = (signal.SIGTERM, signal.SIGUSR1)

_noticed: list[str] = []


@contextmanager
def noticed() -> Iterator[None]:
    """While open, the signals do not end this process at once. Main thread only.

    Python runs handlers between its own steps, so never while a collective waits for a rank that does not come; the system
    writes a signal's number to a socket at once, and a thread reads it.
    """
    _noticed.clear()
    heard, told = socket.socketpair()
    told.setblocking(False)
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(heard, over), daemon=True)
    thread.start()
    outer = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    before = {number: signal.signal(number, _note) for number in HEEDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(outer)
        over.set()
        told.close()
        thread.join()
        heard.close()


def _note(number: int, frame: FrameType | None = None) -> None:
    _noticed.append(signal.Signals(number).name)


def _watch(heard: socket.socket, over: threading.Event) -> None:
    while number := heard.recv(1):
        if number[0] in HEEDED:
            _note(number[0])
            if not over.wait(GRACE):
                _leave()


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
