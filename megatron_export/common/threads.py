"""Threads that work on parts of tensors: torch lets go of the interpreter while it computes, so that each of them takes a core."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from threading import Barrier
from typing import Any, TypeVar

import torch

MOST = 8  # threads; each holds what it works on
SPARED = 31 << 20  # glibc keeps memory of up to so many bytes for the next use, once it was given such a piece back

_pool: ContextVar[ThreadPoolExecutor | None] = ContextVar("pool", default=None)
_working: ContextVar[int] = ContextVar("working", default=1)  # threads of that pool, and the one that started it
_begun: ContextVar[_Begun | None] = ContextVar("begun", default=None)

Job = TypeVar("Job")
Result = TypeVar("Result")
Each = Callable[[Callable[[Any], Any], Iterable], Iterator]  # as `map`


@contextmanager
def _started(count: int) -> Iterator[ThreadPoolExecutor]:
    """So many threads, of which each has one of torch's; this thread keeps its own. All have begun when it is entered."""
    before, begun = torch.get_num_threads(), Barrier(count + 1)

    def begin() -> None:
        torch.set_num_threads(1)  # of this thread; but also of those that begin after it
        begun.wait()

    with ThreadPoolExecutor(count, thread_name_prefix="strip", initializer=begin) as pool:
        try:
            for _ in range(count):
                pool.submit(int)
            begun.wait()
        except BaseException:  # a thread that the system does not give, or Ctrl-C: those that wait here must end
            begun.abort()
            raise
        torch.set_num_threads(before)
        yield pool


@contextmanager
def threads(most: int = MOST) -> Iterator[Each]:
    """A `map` by as many threads as torch has for one operation, at most `most`; meanwhile torch has one for each operation.

    Results come in order, and an exception comes in its result's place. No more than twice as many calls as there are threads are
    begun before their results are taken. What is mapped may be made with the same `map`; the function must not call it.
    """
    torch.empty(SPARED, dtype=torch.uint8)
    before = torch.get_num_threads()
    count = min(before, most)
    if count == 1:
        yield map
        return

    def in_order(function: Callable[[Any], Any], jobs: Iterable) -> Iterator:
        waiting: deque[Future] = deque()
        try:
            for job in jobs:
                if len(waiting) == 2 * count:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(function, job))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    with _started(count) as pool:
        torch.set_num_threads(1)
        try:
            yield in_order
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)


@contextmanager
def side_by_side(device: torch.device) -> Iterator[None]:
    """Meanwhile `each` has as many threads as torch has here, this one among them, where tensors are on the CPU. Each of them works
    alone, and so does every thread that first uses torch now: torch's own threads wait for one another after every operation, and
    spin meanwhile, which takes the cores from those that write and read.
    """
    before = torch.get_num_threads()
    count = min(before, MOST)
    if count == 1 or device.type != "cpu":
        yield
        return
    with _started(count - 1) as pool:
        tokens = _pool.set(pool), _working.set(count)
        try:
            torch.set_num_threads(1)
            yield
        finally:
            torch.set_num_threads(before)
            _pool.reset(tokens[0])
            _working.reset(tokens[1])


@contextmanager
def torchs_own() -> Iterator[None]:
    """Meanwhile torch has the threads of `each`, for large tensors that this thread works on alone."""
    if working() == 1:
        yield
        return
    torch.set_num_threads(working())
    try:
        yield
    finally:
        torch.set_num_threads(1)


def working() -> int:
    """How many threads `each` has."""
    return _working.get()


def each(work: Callable[[Job], Result], jobs: Iterable[Job], most: int = MOST) -> list[Result]:
    """What `work` gives for each job, in their order; at most `most` at a time, one by this thread. It must not call this."""
    pool, todo = _pool.get(), list(jobs)
    if pool is None or len(todo) == 1:
        return [work(job) for job in todo]
    if most == 1:
        with torchs_own():
            return [work(job) for job in todo]
    with _done_at_the_end(pool) as begun:
        return begun.add(work, todo, min(working(), most) - 1)


def begin(work: Callable[[Job], Result], jobs: Iterable[Job]) -> list[Result]:
    """What `work` gives for each job, in their order; within `gathered`, in a list that is full when that has ended. It must
    not call this.
    """
    begun = _begun.get()
    return each(work, jobs) if begun is None else begun.add(work, list(jobs), working() - 1)


@contextmanager
def gathered() -> Iterator[None]:
    """What is begun meanwhile is done when this ends; what it raised is raised then. So this thread prepares the next work while
    others do the last, and helps them at the end.
    """
    pool = _pool.get()
    if pool is None:
        yield
        return
    with _done_at_the_end(pool) as begun:
        token = _begun.set(begun)
        try:
            yield
        finally:
            _begun.reset(token)


class _Begun:
    """Work that was begun, and the threads that do it."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.pool = pool
        self.waiting: deque[Callable[[], None]] = deque()
        self.helpers: list[Future] = []

    def add(self, work: Callable[[Job], Result], jobs: list[Job], helpers: int) -> list[Result]:
        """Begin it in at most so many threads of the pool; the results are there at the end."""
        found: list[Any] = [None] * len(jobs)
        inference = torch.is_inference_mode_enabled()  # which each thread has of its own

        def do(number: int) -> None:
            with torch.inference_mode(inference):
                found[number] = work(jobs[number])

        self.waiting += (partial(do, number) for number in range(len(jobs)))
        self.helpers += (self.pool.submit(self.help) for _ in range(min(helpers, len(jobs))))
        return found

    def help(self) -> None:
        """Do what waits, in turns with other threads."""
        while self.waiting:
            try:
                do = self.waiting.popleft()
            except IndexError:  # another thread was faster
                return
            do()


@contextmanager
def _done_at_the_end(pool: ThreadPoolExecutor) -> Iterator[_Begun]:
    """What is begun is done, also by this thread, when this ends; after a failure the rest is not begun."""
    begun = _Begun(pool)
    try:
        yield begun
        begun.help()
    finally:
        begun.waiting.clear()
        wait(begun.helpers)
    try:
        while begun.helpers:  # none is left, as what one raises leads to this frame, and would lead back
            begun.helpers.pop().result()
    finally:
        begun.helpers.clear()
