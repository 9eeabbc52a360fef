"""Threads that do jobs before their results are needed, in order and in bounded memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

THREADS = 4
AHEAD_BYTES = 512 << 20  # of all jobs that were begun and are not asked for yet, or of one

Result = TypeVar("Result")


def most_held(largest: int, total: int) -> int:
    """The most bytes that results take at a time, if the largest takes `largest` bytes and all of them `total`."""
    return min(max(AHEAD_BYTES, largest), total)


def in_order(jobs: Iterable[tuple[int, Callable[[], Result]]]) -> Iterator[Result]:
    """The results of jobs (bytes that the result takes, function), in their order; an exception is raised in the result's place.

    Close the iterator if you do not take all results: jobs that were not begun are dropped, the others are waited for.
    """
    waiting: deque[tuple[int, Future[Result]]] = deque()
    held = 0
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for size, job in jobs:
                while waiting and held + size > AHEAD_BYTES:
                    yield waiting[0][1].result()
                    held -= waiting.popleft()[0]
                waiting.append((size, pool.submit(job)))
                held += size
            while waiting:
                yield waiting.popleft()[1].result()
        finally:
            pool.shutdown(cancel_futures=True)
