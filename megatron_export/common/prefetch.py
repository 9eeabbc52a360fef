"""Jobs that a few threads do ahead of the one who needs their results, in order and within a bound of memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

THREADS = 4
AHEAD_BYTES = 512 << 20  # of all jobs that were begun and are not asked for yet, or of one

Result = TypeVar("Result")


def most_held(largest: int, total: int) -> int:
    """Bytes that results of jobs take at the most, of which the largest takes so many, and all together."""
    return min(max(AHEAD_BYTES, largest), total)


def in_order(jobs: Iterable[tuple[int, Callable[[], Result]]]) -> Iterator[Result]:
    """What the jobs return, each with the bytes that its result takes; what one raises is raised in its place.

    Close it when not all are asked for: what was not begun is then left, and what was begun is waited for.
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
