"""Chunks on their way into files: several files are written at a time, and what goes wrong is raised to who sends."""

import threading
import time
import weakref

import numpy as np
import pytest
import torch

from megatron_export.planning.tensor_spec import Output
from megatron_export.writing import device_to_disk
from megatron_export.writing.device_to_disk import SLOTS, Conveyor

SIZE = 64


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads, and a chunk for every tensor."""
    monkeypatch.setattr(device_to_disk, "THREADS", 2)
    monkeypatch.setattr(device_to_disk, "CHUNK", SIZE)


def tensors(*names: str) -> list[tuple[Output, torch.Tensor]]:
    """Each is of the file that its first letter names."""
    return [(Output(name, "U8", (SIZE,)), torch.arange(SIZE, dtype=torch.uint8)) for name in names]


def file_of(output: Output) -> str:
    return output.name[0]


def test_a_thread_takes_the_file_that_the_fewest_write() -> None:
    """While one is held in file a, whose chunks came first, the other writes b."""
    held, order = threading.Event(), []

    def write(output: Output, start: int, data: memoryview) -> None:
        order.append(output.name)
        if output.name == "a0":
            assert held.wait(30)
        if output.name == "b2":
            held.set()

    conveyor = Conveyor(torch.device("cpu"), write, file_of)
    conveyor.put(tensors("a0", "a1", "a2", "b0", "b1", "b2"))
    with conveyor:
        conveyor.flush()
    assert order.index("b2") < order.index("a1")
    assert sorted(order) == ["a0", "a1", "a2", "b0", "b1", "b2"]


def test_what_goes_wrong_is_raised_to_who_sends_and_ends_the_writing() -> None:
    written = []

    def write(output: Output, start: int, data: memoryview) -> None:
        if output.name == "a1":
            raise OSError("no room")
        written.append(output.name)

    with Conveyor(torch.device("cpu"), write, file_of) as conveyor:
        conveyor.put(tensors("a0", "a1"))
        while conveyor.failure is None:
            time.sleep(0.001)
        for _ in range(2 * SLOTS):
            with pytest.raises(OSError, match="no room"):
                conveyor.put(tensors("b0"))
        with pytest.raises(OSError, match="no room"):
            conveyor.flush()
    assert written in (["a0"], [])


def test_what_is_written_is_held_no_longer() -> None:
    """A thread that waits for more would keep what it wrote last, and with it the memory of a whole bucket."""
    with Conveyor(torch.device("cpu"), lambda output, start, data: None, file_of) as conveyor:
        arrays = [np.zeros(SIZE, np.uint8) for _ in range(4)]
        alive = [weakref.ref(array) for array in arrays]
        named = [(Output(f"a{n}", "U8", (SIZE,)), torch.from_numpy(array)) for n, array in enumerate(arrays)]
        conveyor.put(named)
        conveyor.flush()
        del arrays, named
        deadline = time.monotonic() + 10
        while any(one() is not None for one in alive):
            assert time.monotonic() < deadline
            time.sleep(0.001)
