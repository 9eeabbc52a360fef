"""Jobs done ahead: their order, their bound of memory, and what is left when one is in the way."""

import threading
from contextlib import closing
from functools import partial

import pytest

from megatron_export.common import prefetch
from megatron_export.common.prefetch import THREADS, in_order

SECONDS = 10


def test_results_come_in_order_though_jobs_end_in_another() -> None:
    ended = [threading.Event() for _ in range(THREADS)]

    def job(number: int) -> int:
        assert number + 1 == THREADS or ended[number + 1].wait(SECONDS), "not at the same time"
        ended[number].set()
        return number

    assert list(in_order((1, partial(job, number)) for number in range(THREADS))) == list(range(THREADS))


def test_no_more_is_begun_than_fits_the_bound_or_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "AHEAD_BYTES", 10)
    begun: list[int] = []
    sizes = [4, 4, 4, 25, 1]
    jobs = ((size, lambda: None) for size in sizes)

    def watched() -> object:
        for size, job in jobs:
            begun.append(size)
            yield size, job

    seen = []
    for _ in in_order(watched()):
        seen.append(len(begun))
    assert seen == [3, 4, 4, 5, 5]  # one job is looked at that does not fit, and waits


def test_what_was_not_begun_is_left_when_a_job_fails_or_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "AHEAD_BYTES", 1)
    done: list[int] = []

    def job(number: int) -> None:
        done.append(number)
        if number == 1:
            raise ValueError("the second")

    with pytest.raises(ValueError, match="the second"):
        list(in_order((1, partial(job, number)) for number in range(9)))
    assert done == [0, 1]
    with closing(in_order((1, partial(job, number)) for number in range(2, 9))) as results:
        next(results)
    assert done == [0, 1, 2]
