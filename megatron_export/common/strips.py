"""Strips of rows: how many weights are worked on at a time, so that float32 copies stay small."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from threading import Barrier
from typing import TypeVar

import torch
from torch import Tensor

STRIP_ELEMENTS = 1 << 20
CUDA_STRIP_ELEMENTS = 1 << 22
SHARED_ELEMENTS = 1 << 22  # of all strips that are encoded side by side on the CPU
THREADS = 8  # that do so, at most

_pool: ContextVar[ThreadPoolExecutor | None] = ContextVar("strips", default=None)
_threads: ContextVar[int] = ContextVar("threads", default=1)  # of that pool

Job = TypeVar("Job")
Result = TypeVar("Result")


def row_strips(weight: Tensor, rows: int) -> Iterator[slice]:
    """Slices of a `[out, in]` weight, in whole tiles of `rows` rows, of at most `strip_elements` elements.

    On the CPU a strip's float32 copies stay in its cache, and glibc reuses their memory; a GPU wants more work at a time.
    """
    return strips_of(weight.shape, rows, strip_elements(weight.device.type))


def shared_strips(weight: Tensor, rows: int) -> Iterator[slice]:
    """The same, of those that `each` works on side by side: smaller ones where it has many threads."""
    elements = strip_elements(weight.device.type)
    return strips_of(weight.shape, rows, min(elements, SHARED_ELEMENTS // _threads.get()))


def cached_strips(tensor: Tensor) -> Iterator[slice]:
    """Those that a CPU reads more than once before the next; on a GPU, which is not to be waited for, all at once."""
    return iter([slice(0, tensor.shape[0])]) if tensor.is_cuda and tensor.dim() else strips_of(tensor.shape)


def strips_of(shape: Sequence[int], rows: int = 1, elements: int = STRIP_ELEMENTS) -> Iterator[slice]:
    """Slices of the first dim of a tensor of this shape, each a multiple of `rows`, of at most `elements` elements (or one tile,
    if that is larger). A tensor without dims has one slice.
    """
    if not shape:
        yield slice(0, 1)
        return
    step = max(elements // max(prod(shape[1:]), 1) // rows, 1) * rows
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def strip_elements(device: str) -> int:
    """How many weights are encoded at a time on a "cpu" or a "cuda" device."""
    return CUDA_STRIP_ELEMENTS if device == "cuda" else STRIP_ELEMENTS


@contextmanager
def side_by_side(device: torch.device) -> Iterator[None]:
    """Meanwhile `each` has as many threads as torch has here, where tensors are on the CPU. Each of them works alone: torch's own
    threads wait for one another after every operation, and spin meanwhile, which takes the cores from those that write and read.
    """
    before = torch.get_num_threads()
    count = min(before, THREADS)
    if count == 1 or device.type != "cpu":
        yield
        return
    begun = Barrier(count + 1)

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
        tokens = _pool.set(pool), _threads.set(count)
        try:
            yield
        finally:
            _pool.reset(tokens[0])
            _threads.reset(tokens[1])


def at_once(elements: int) -> int:
    """How many strips of so many weights may be worked on side by side: those of tall tiles are larger than others."""
    return max(SHARED_ELEMENTS // max(elements, 1), 1)


def each(work: Callable[[Job], Result], jobs: Iterable[Job], most: int = THREADS) -> list[Result]:
    """What `work` gives for each job, in their order; at most `most` at a time."""
    pool, todo = _pool.get(), list(jobs)
    if pool is None or len(todo) == 1 or most == 1:
        return [work(job) for job in todo]
    found: dict[int, Result] = {}
    numbers = iter(range(len(todo)))  # from which every thread takes its next one
    inference = torch.is_inference_mode_enabled()  # which each thread has of its own

    def some() -> None:
        with torch.inference_mode(inference):
            for number in numbers:
                found[number] = work(todo[number])

    threads = [pool.submit(some) for _ in range(min(THREADS, most, len(todo)))]
    wait(threads)
    for thread in threads:
        thread.result()
    return [found[number] for number in range(len(todo))]
