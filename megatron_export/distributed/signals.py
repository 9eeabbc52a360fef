"""SIGTERM and SIGUSR1, which a cluster sends before it ends a job, and SIGINT (Ctrl-C) are noticed at once and heeded where the
work can stop.
"""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from ..common.errors import Interrupted
from . import last_words

AGAIN = 75  # EX_TEMPFAIL of sysexits.h: try again
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
GRACE = 8.0  # seconds until a process that could not stop where it is leaves all the same
HEEDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

_noticed: list[str] = []


@contextmanager
def noticed() -> Iterator[None]:
    """While it is open, the signals do not end this process at once. Main thread only.

    Python runs no handler while a collective waits, so the system writes a signal's number to a socket, and a thread reads it.
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
        _noticed.clear()  # an export that this process calls later was not asked to stop


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
    """Raise `Interrupted` if one of the signals came. Call it where nothing is left half done."""
    if _noticed:
        raise Interrupted(f"stopped by {_noticed[0]}")


def heeded(steps: Iterable) -> Iterator:
    """The steps; `Interrupted` before the next one if one of the signals came."""
    for step in steps:
        heed()
        yield step


def status_of(stopped_by: str) -> int:
    """The exit status of a process that a signal of this name stopped."""
    return INTERRUPTED if stopped_by == signal.SIGINT.name else AGAIN


def until_interrupted(run: Callable[[], int]) -> int:
    """What `run` returns. If Ctrl-C ends it where nothing heeds the signal, 130; rank 0 says so in one line."""
    try:
        return run()
    except KeyboardInterrupt:
        _say(f"stopped by {signal.SIGINT.name}")
        return INTERRUPTED


def _leave() -> None:
    """End the process, which hangs in a collective or a long step. Incomplete files never have their final names."""
    _say(f"stopped by {_noticed[0]}: --resume goes on with what is complete")
    os._exit(status_of(_noticed[0]))


def _say(line: str) -> None:
    """Of several ranks, rank 0 speaks."""
    last_words.leave(line)
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"\n{line}\n".encode())
