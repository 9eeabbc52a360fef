"""Tensors on their way from a device into files, in chunks that threads write while the next tensors are made.

Every chunk knows its place in its file, so the bytes do not depend on timing. Chunks of a GPU pass through pinned memory. At most
`SLOTS` chunks of `CHUNK` bytes are on the way; who sends more waits. Tensors on the host are written from where they are. A thread
takes the chunk of the file that the fewest threads write: a file system takes one file at the speed of one core or two.
"""

import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable
from queue import SimpleQueue
from typing import NamedTuple

import torch
from torch import Tensor

from ..planning.tensor_spec import Output

CHUNK = 32 << 20  # as each costs some turns of Python, for which all threads wait
SLOTS = 8
PINNED_BYTES = SLOTS * CHUNK  # on the host of a GPU
THREADS = min(SLOTS, max(6, len(os.sched_getaffinity(0))))

Write = Callable[[Output, int, memoryview], None]


class _Load(NamedTuple):
    """A slot that is full: tensors, where in each a chunk starts, and the chunk; and when it has come from the GPU."""

    slot: int
    chunks: list[tuple[Output, int, memoryview]]
    copied: "torch.cuda.Event | None"


class Conveyor:
    """Use as a context. `write` is called by several threads at once, with a tensor, where in it a chunk starts, and the chunk.
    `file_of` says which file a tensor is of.
    """

    def __init__(self, device: torch.device, write: Write, file_of: Callable[[Output], Hashable]) -> None:
        self.write = write
        self.file_of = file_of
        pinned = device.type == "cuda"
        self.pinned = torch.empty((SLOTS, CHUNK), dtype=torch.uint8, pin_memory=True) if pinned else None
        self.free: SimpleQueue[int] = SimpleQueue()
        for slot in range(SLOTS):
            self.free.put(slot)
        self.sent: SimpleQueue[bool] = (
            SimpleQueue()
        )  # True for every load that waits, False for a thread that is to end
        self.choosing = threading.Lock()
        self.waiting: dict[Hashable, deque[_Load]] = {}  # by file; the file that has waited longest is first
        self.writing: Counter[Hashable] = Counter()  # how many threads write a file
        self.failure: BaseException | None = None
        self.slot: int | None = None  # the one that is being filled
        self.load: list[tuple[Output, int, memoryview]] = []
        self.size = 0

    def __enter__(self) -> "Conveyor":
        self.threads = [threading.Thread(target=self._work, name=f"write_{n}", daemon=True) for n in range(THREADS)]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        for _ in self.threads:
            self.sent.put(False)
        for thread in self.threads:
            thread.join()

    def put(self, tensors: Iterable[tuple[Output, Tensor]]) -> None:
        """Send tensors, or slices of them, on the way; raises what went wrong with earlier ones, and sends nothing more then."""
        self._check()
        for output, tensor in tensors:
            data = tensor.contiguous().reshape(-1).view(torch.uint8)
            for start in range(0, data.numel(), CHUNK):
                self._add(output, start, data[start : start + CHUNK])
        self._send()

    def flush(self) -> None:
        """Wait until all that was sent is written."""
        self._check()
        taken = [self.free.get() for _ in range(SLOTS)]
        for slot in taken:
            self.free.put(slot)
        self._check()

    def _add(self, output: Output, start: int, data: Tensor) -> None:
        if self.size + data.numel() > CHUNK:
            self._send()
        if self.slot is None:
            self.slot = self.free.get()
            self._check()
        if self.pinned is not None:
            staged = self.pinned[self.slot, self.size : self.size + data.numel()]
            staged.copy_(data, non_blocking=True)
            data = staged
        self.load.append((output, start, memoryview(data.numpy())))
        self.size += data.numel()

    def _send(self) -> None:
        """Let a thread write what has been gathered."""
        if self.slot is None:
            return
        copied = None
        if self.pinned is not None:
            copied = torch.cuda.Event()
            copied.record()
        file = self.file_of(self.load[0][0])
        with self.choosing:
            self.waiting.setdefault(file, deque()).append(_Load(self.slot, self.load, copied))
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
        with self.choosing:
            self.writing[file] -= 1
        self.free.put(load.slot)

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
