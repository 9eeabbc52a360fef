"""Threads that work on parts of tensors: torch lets go of the interpreter while it computes, so that each of them takes a core."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

MOST = 8  # threads; each holds what it works on
SPARED = 31 << 20  # glibc keeps memory of up to so many bytes for the next use, once it was given such a piece back

Each = Callable[[Callable[[Any], Any], Iterable], Iterator]  # as `map`


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

    def each(function: Callable[[Any], Any], jobs: Iterable) -> Iterator:
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

    with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        torch.set_num_threads(1)
        try:
            yield each
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)
