"""Tensors on their way from a device into files, in chunks that threads write while the next tensors are made.

Every chunk knows its place in its file, so the bytes do not depend on timing. Chunks of a GPU pass through pinned memory. At most
`SLOTS` chunks of `CHUNK` bytes are on the way; who sends more waits. Tensors on the host are written from where they are.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import torch
from torch import Tensor

from ..planning.tensor_spec import Output

CHUNK = 16 << 20
SLOTS = 16
PINNED_BYTES = SLOTS * CHUNK  # on the host of a GPU
THREADS = 6

Write = Callable[[Output, int, memoryview], None]


class Conveyor:
    """Use as a context. `write` is called by several threads at once, with a tensor, where in it a chunk starts, and the chunk."""

    def __init__(self, device: torch.device, write: Write) -> None:
        self.write = write
        pinned = device.type == "cuda"
        self.pinned = torch.empty((SLOTS, CHUNK), dtype=torch.uint8, pin_memory=True) if pinned else None
        self.free: SimpleQueue[int] = SimpleQueue()
        for slot in range(SLOTS):
            self.free.put(slot)
        self.failure: BaseException | None = None
        self.slot: int | None = None  # the one that is being filled
        self.load: list[tuple[Output, int, memoryview]] = []
        self.size = 0

    def __enter__(self) -> "Conveyor":
        self.pool = ThreadPoolExecutor(THREADS, thread_name_prefix="write")
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown()

    def put(self, tensors: Iterable[tuple[Output, Tensor]]) -> None:
        """Send tensors, or slices of them, on the way; raises what went wrong with earlier ones."""
        for output, tensor in tensors:
            data = tensor.contiguous().reshape(-1).view(torch.uint8)
            for start in range(0, data.numel(), CHUNK):
                self._add(output, start, data[start : start + CHUNK])
        self._send()

    def flush(self) -> None:
        """Wait until all that was sent is written."""
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
        self.pool.submit(self._run, self.slot, self.load, copied)
        self.slot, self.load, self.size = None, [], 0

    def _run(self, slot: int, load: list[tuple[Output, int, memoryview]], copied: "torch.cuda.Event | None") -> None:
        try:
            if copied is not None:
                copied.synchronize()
            for output, start, data in load:
                if self.failure is None:
                    self.write(output, start, data)
        except BaseException as error:  # noqa: BLE001 - the thread that sends must hear of it
            self.failure = error
        finally:
            self.free.put(slot)

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure
