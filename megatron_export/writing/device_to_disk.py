"""Tensors on their way from a device into files, in chunks that threads write while the next tensors are made.

Every chunk knows its place in its file, so the bytes do not depend on timing. Chunks of a GPU pass through pinned memory, which
the system is slow to give: the first are on their way before the last have it. At most `SLOTS` chunks of `CHUNK` bytes are on
the way; who sends more waits. Tensors on the host are written from where they are. A thread takes the chunk of the file that the
fewest threads write: a file system takes one file at the speed of one core or two.

The thread that sends has a turn of Python after every operation of torch, and waits for it among those that write. So it does few:
single numbers of a GPU are sent together.
"""

from __future__ import annotations

import os
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..common.storage import bytes_of
from ..planning.tensor_spec import Output

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 32 << 20  # as each costs some turns of Python, for which all threads wait
SLOTS = 8
PINNED_BYTES = SLOTS * CHUNK  # on the host of a GPU
THREADS = min(SLOTS, max(6, len(os.sched_getaffinity(0))))

Write = Callable[[Output, int, memoryview], None]


class _Slot(NamedTuple):
    """Pinned memory of a chunk, twice: for torch, and for those that write. Tensors on the host need none."""

    tensor: Tensor | None = None
    memory: memoryview = memoryview(b"")


class _Load(NamedTuple):
    """A slot that is full: tensors, where in each a chunk starts, and the chunk; and when it has come from the GPU."""

    slot: _Slot
    chunks: list[tuple[Output, int, memoryview]]
    copied: torch.cuda.Event | None


class Conveyor:
    """Use as a context. `write` is called by several threads at once, with a tensor, where in it a chunk starts, and the chunk.
    `file_of` says which file a tensor is of.
    """

    def __init__(self, device: torch.device, write: Write, file_of: Callable[[Output], Hashable]) -> None:
        self.write = write
        self.file_of = file_of
        self.device = device
        self.pinned = device.type == "cuda"
        self.free: SimpleQueue[_Slot] = SimpleQueue()
        self.sent: SimpleQueue[bool] = (
            SimpleQueue()
        )  # True for every load that waits, False for a thread that is to end
        self.choosing = threading.Condition()
        self.waiting: dict[Hashable, deque[_Load]] = {}  # by file; the file that has waited longest is first
        self.writing: Counter[Hashable] = Counter()  # how many threads write a file
        self.under_way = 0  # loads that are not written yet
        self.failure: BaseException | None = None
        self.ended = False
        self.slot: _Slot | None = None  # the one that is being filled
        self.load: list[tuple[Output, int, memoryview]] = []
        self.size = 0
        for _ in range(0 if self.pinned else SLOTS):
            self.free.put(_Slot())

    def __enter__(self) -> Conveyor:
        self.threads = [threading.Thread(target=self._work, name=f"write_{n}", daemon=True) for n in range(THREADS)]
        if self.pinned:
            self.threads.append(threading.Thread(target=self._pin, name="pin", daemon=True))
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended = True
        for _ in range(THREADS):
            self.sent.put(False)
        for thread in self.threads:
            thread.join()
        self.slot, self.load = None, []
        while not self.free.empty():  # torch keeps pinned memory for the next export, as soon as nobody has it
            self.free.get()

    def put(self, tensors: Iterable[tuple[Output, Tensor]]) -> None:
        """Send tensors, or slices of them, on the way; raises what went wrong with earlier ones, and sends nothing more then."""
        self._check()
        numbers: dict[torch.dtype, list[tuple[Output, Tensor]]] = defaultdict(list)
        for output, tensor in tensors:
            if self.pinned and not tensor.dim():
                numbers[tensor.dtype].append((output, tensor))
                continue
            data = bytes_of(tensor)
            for start in range(0, len(data), CHUNK):
                self._add([output], start, data if len(data) <= CHUNK else data[start : start + CHUNK])
        for found in numbers.values():
            outputs, alike = zip(*found, strict=True)
            self._add(outputs, 0, bytes_of(torch.stack(alike)))
        self._send()

    def flush(self) -> None:
        """Wait until all that was sent is written."""
        with self.choosing:
            self.choosing.wait_for(lambda: not self.under_way)
        self._check()

    def _pin(self) -> None:
        """Get the memory of all slots, one after the other."""
        try:
            with torch.cuda.device(self.device):  # a new thread has the first one
                for _ in range(SLOTS):
                    if not self.ended:
                        tensor = torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True)
                        self.free.put(_Slot(tensor, memoryview(tensor.numpy())))
        except BaseException as error:  # noqa: BLE001 - the thread that sends must hear of it, and may be waiting
            self.failure = error
            self.free.put(_Slot())

    def _add(self, outputs: Sequence[Output], start: int, data: Tensor) -> None:
        """Add a chunk of a tensor, or those of several that are of one size, one after the other."""
        size = data.numel()
        if self.size + size > CHUNK:
            self._send()
        if self.slot is None:
            self.slot = self.free.get()
            self._check()
        if self.pinned:
            end = self.size + size
            self.slot.tensor[self.size : end].copy_(data, non_blocking=True)
            memory = self.slot.memory[self.size : end]
        else:
            memory = memoryview(data.numpy())
        each = size // len(outputs)
        self.load += ((output, start, memory[n * each : (n + 1) * each]) for n, output in enumerate(outputs))
        self.size += size

    def _send(self) -> None:
        """Let a thread write what has been gathered."""
        if self.slot is None:
            return
        copied = None
        if self.pinned:
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(self.device))  # which need not be the current device
        file = self.file_of(self.load[0][0])
        with self.choosing:
            self.waiting.setdefault(file, deque()).append(_Load(self.slot, self.load, copied))
            self.under_way += 1
        self.sent.put(True)
        self.slot, self.load, self.size = None, [], 0

    def _work(self) -> None:
        """Write what is waiting, until this thread is to end; what is written is let go before it waits for more."""
        while self.sent.get():
            self._write_next()

    def _write_next(self) -> None:
        file, load = self._next()
        try:
            self._write(load)
        except BaseException as error:  # noqa: BLE001 - the thread that sends must hear of it
            self.failure = error
        self.free.put(load.slot)
        with self.choosing:
            self.writing[file] -= 1
            self.under_way -= 1
            if not self.under_way:
                self.choosing.notify_all()

    def _next(self) -> tuple[Hashable, _Load]:
        """A load of the file that the fewest threads write."""
        with self.choosing:
            file = min(self.waiting, key=self.writing.__getitem__)
            load = self.waiting[file].popleft()
            if not self.waiting[file]:
                del self.waiting[file]
            self.writing[file] += 1
            return file, load

    def _write(self, load: _Load) -> None:
        if load.copied is not None:
            load.copied.synchronize()
        for output, start, data in load.chunks:
            if self.failure is None:
                self.write(output, start, data)

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure
