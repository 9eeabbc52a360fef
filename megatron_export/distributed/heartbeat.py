"""Which ranks are alive, and where each of them is: every rank tells rank 0 each second, in a thread of its own.

A rank that dies leaves the others in a collective that never ends. Here they learn which rank it was and where, and leave: by an
exception if they can, else by ending the process.
"""

import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from ..common.errors import RankLost
from ..common.text import clean
from . import last_words
from .rank_store import RankStore

BEAT = 1.0
GRACE = 3.0  # seconds in which a rank may leave by an exception, before its process is ended
ALARMED = 5  # beats of silence that are enough once a connection broke
_VERDICT, _ALARM = "verdict", "alarm"
_OF_PEERS = re.compile(r"gloo|nccl|connection|broken pipe|timed? ?out", re.IGNORECASE)


class Pulse:
    """The heartbeat of one rank. `share` is a collective that gives every rank the value that rank 0 passes. A process may open
    several, one in another: all of them are at one place.
    """

    place, tensor = "start", ""

    def __init__(self, rank: int, world: int, share: Callable[[object], object], timeout: float) -> None:
        self.rank = rank
        self.world = world
        self.timeout = timeout
        self.beat = min(BEAT, timeout / 5)
        self.verdict = ""
        Pulse.place, Pulse.tensor = "start", ""
        self.stopped = threading.Event()
        self.moved = threading.Event()
        self.told = threading.Event()
        self.thread: threading.Thread | None = None
        self.place_of_0, self.broken = "start", False
        if world == 1:
            return
        self.store = RankStore(rank, world, share, max(timeout, 30))
        self._say(0)
        share(None)  # now all have
        self.answered = time.monotonic()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        if rank:
            threading.Thread(target=self._miss_0, daemon=True).start()

    def at(self, stage: str, tensor: str | None = None) -> None:
        """Say where this rank is. A tensor stays named until another is; "" names none."""
        Pulse.tensor = self.tensor if tensor is None else tensor
        Pulse.place = f"{stage}, at {self.tensor}" if self.tensor else stage
        self.moved.set()

    def check(self) -> None:
        """Raise `RankLost` if a rank is known to be gone."""
        if self.verdict:
            raise RankLost(self.verdict)

    def tell(self, failure: str) -> str:
        """Tell all other ranks that this one leaves alone, and why; return the message that they will show."""
        verdict = f"rank {self.rank} failed to {self.place}: {failure}"
        if self.thread:
            self.store.set(_VERDICT, verdict)
        return verdict

    def explain(self, error: Exception) -> str:
        """Which rank is to blame, if the exception may come from a collective with a rank that is gone; "" for no other rank.

        It waits for the answer. Meanwhile a few seconds of silence are enough to suspect a rank.
        """
        if self.thread and isinstance(error, RuntimeError) and _OF_PEERS.search(f"{type(error).__name__} {error}"):
            with suppress(Exception):  # rank 0 itself may be gone
                self.store.set(_ALARM, "")
            self.told.wait(3 * ALARMED * self.beat)
        return self.verdict

    def stop(self) -> None:
        self.stopped.set()
        self.moved.set()
        if self.thread:
            self.thread.join(GRACE)  # it may be held by rank 0

    def _say(self, number: int) -> None:
        self.store.set(f"{self.rank}", f"{number} {self.place}")

    def _run(self) -> None:
        heard = {rank: ("", time.monotonic()) for rank in range(1, self.world)} if self.rank == 0 else {}
        number, listened = 0, time.monotonic()
        while not self.moved.wait(self.beat) or not self.stopped.is_set():
            self.moved.clear()
            number += 1
            try:
                self._say(number)
                if (verdict := self.store.get(_VERDICT)) is not None:
                    return self._leave(verdict)
                self.place_of_0 = _place_in(self.store.get("0"))
                self.answered = time.monotonic()
                if heard and time.monotonic() - listened >= self.beat / 2:
                    listened = time.monotonic()
                    self._listen(heard)
            except Exception:  # noqa: BLE001 - whatever a connection that is gone raises
                self.broken = True
        return None

    def _miss_0(self) -> None:
        """Judge rank 0, in a thread of its own: the one that asks its store hangs if rank 0 is frozen."""
        while not self.stopped.wait(self.beat):
            limit = min(self.timeout, ALARMED * self.beat) if self.broken else self.timeout
            if time.monotonic() - self.answered > limit:
                return self._leave(f"rank 0 is gone: it does not answer. It was at: {self.place_of_0}")
        return None

    def _listen(self, heard: dict[int, tuple[str, float]]) -> None:
        """On rank 0: judge a rank that has been silent for too long."""
        alarmed = self.store.get(_ALARM) is not None
        limit = min(self.timeout, ALARMED * self.beat) if alarmed else self.timeout
        for rank, now in zip(heard, self.store.all([f"{rank}" for rank in heard]), strict=True):
            said, when = heard[rank]
            if now is not None and now != said:
                heard[rank] = (now, time.monotonic())
            elif (silent := time.monotonic() - when) > limit:
                place = _place_in(said)
                self.store.set(_VERDICT, f"rank {rank} is gone: silent for {silent:.0f} s. It was at: {place}")

    def _leave(self, verdict: str) -> None:
        self.verdict = verdict
        self.told.set()
        if self.stopped.wait(GRACE + (0 if self.rank == 0 else 1)):
            return
        last_words.leave(f"error: {verdict}", blamed=True)
        if self.rank == 0 or verdict.startswith("rank 0 is gone"):  # one voice, where there is one
            os.write(2, f"\nerror: {clean(verdict)}\n".encode())
        os._exit(1)


def _place_in(said: str | None) -> str:
    """The place in what a rank says: the number of its beat, and where it is."""
    return (said or "0 start").partition(" ")[2]
