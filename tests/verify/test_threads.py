"""How many threads compare a checkpoint changes no figure, and what they hold does not grow with the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import pytest
import torch

from megatron_export.common.strips import strips_of
from megatron_export.common.threads import threads
from megatron_export.verify import snr, weight_pairs
from megatron_export.verify.judge import judge

from ..support.exported import exported
from ..support.models import make_model


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
        assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def strips_of_eight_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_pairs, "strips_of", lambda shape, rows=1: strips_of(shape, 8, 1))


@pytest.mark.parametrize("format", ["fp8", "nvfp4_awq", "int4_awq"])
@pytest.mark.usefixtures("strips_of_eight_rows")
def test_one_thread_and_four_find_the_same_figures(format: str, tmp_path: Path) -> None:
    reference = make_model(tmp_path / "reference", "qwen3", hidden_size=128, intermediate_size=128)
    exported(reference, tmp_path / "out", format)
    found = []
    for count in (1, 4):
        with torch_threads(count):
            judged = judge(tmp_path / "out", reference)
        assert judged.problems == []
        found.append([vars(one) for one in judged.weights])
    assert found[0] == found[1]
    assert any(one["noise"] for one in found[0])


@pytest.mark.usefixtures("strips_of_eight_rows")
@pytest.mark.parametrize("format", ["bf16", "fp8", "nvfp4", "int4_awq", "mxfp8"])
def test_strips_that_a_gpu_compares_at_once_give_the_figures_of_each(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = make_model(tmp_path / "reference", "qwen3", hidden_size=128, intermediate_size=128)
    exported(reference, tmp_path / "out", format)
    found = []
    for most in (1, 3, 1000):
        monkeypatch.setattr(weight_pairs, "at_once", lambda device, weights, most=most: most)
        found.append([vars(one) for one in judge(tmp_path / "out", reference).weights])
    assert found[0] == found[1] == found[2]


def test_a_gpu_holds_as_many_weights_at_once_whatever_the_width() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert [weight_pairs.at_once(cuda, 128 * width) for width in (8192, 28672, 1 << 20)] == [16, 4, 1]
    assert weight_pairs.at_once(cpu, 128 * 64) == 1


@pytest.mark.usefixtures("strips_of_eight_rows")
def test_no_more_strips_are_held_than_there_are_threads_whatever_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, most, calls, lock, real = 0, 0, 0, Lock(), snr._compared

    def counted(*strip: object) -> object:
        nonlocal held, most, calls
        with lock:
            held, calls = held + 1, calls + 1
            most = max(most, held)
        try:
            return real(*strip)
        finally:
            with lock:
                held -= 1

    monkeypatch.setattr(snr, "_compared", counted)
    peaks = []
    for layers in (1, 3):
        reference = make_model(tmp_path / f"reference{layers}", "qwen3", num_hidden_layers=layers)
        exported(reference, tmp_path / f"out{layers}", "fp8")
        most = calls = 0
        with torch_threads(3):
            assert judge(tmp_path / f"out{layers}", reference).problems == []
        peaks.append((most, calls))
    assert max(most for most, _ in peaks) <= 3
    assert peaks[0][1] < peaks[1][1]


def test_results_come_in_order_and_at_most_twice_as_many_calls_as_threads_wait() -> None:
    taken, most = 0, 0

    def jobs() -> Iterator[int]:
        nonlocal most
        for number in range(50):
            most = max(most, number + 1 - taken)
            yield number

    with torch_threads(3), threads() as each:
        for number, result in enumerate(each(lambda one: one * one, jobs())):
            assert result == number**2
            taken += 1
    assert taken == 50
    assert most <= 2 * 3 + 1


def test_an_exception_comes_in_its_results_place() -> None:
    def half(one: int) -> float:
        return 1 / (one - 2)

    with torch_threads(2), threads() as each:
        results = each(half, range(5))
        assert [next(results), next(results)] == [-0.5, -1.0]
        with pytest.raises(ZeroDivisionError):
            next(results)
