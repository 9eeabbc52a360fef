"""What the bytes of a file are written on, by several threads at once: a file on disk, or a file in memory."""

import ctypes
import mmap
import os
from pathlib import Path
from typing import Protocol

import numpy as np

_SYNC_FILE_RANGE_WRITE = 2


class Sheet(Protocol):
    """A file of a known size while it is written."""

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write all of `data` at `offset`."""

    def finish(self) -> None:
        """All is written: with `sync`, wait until it is on disk."""

    def close(self) -> None:
        """Nobody writes it any more, whether it is complete or not."""


class OnDisk:
    """The file at `path`; with `sync` it is on the disk when it is finished."""

    def __init__(self, path: Path, nbytes: int, sync: bool) -> None:
        self.sync = sync
        self.descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        os.truncate(path, nbytes)

    def write(self, data: bytes | memoryview, offset: int) -> None:
        start, nbytes = offset, len(data)
        while data:  # the system may write less than it is given, before it says that there is no more room
            count = os.pwrite(self.descriptor, data, offset)
            data, offset = data[count:], offset + count
        if (
            self.sync
        ):  # the system begins now, so that fsync has little left; where this hint fails, it does all the work
            place = ctypes.c_int64(start), ctypes.c_int64(nbytes)
            ctypes.CDLL(None).sync_file_range(self.descriptor, *place, _SYNC_FILE_RANGE_WRITE)

    def finish(self) -> None:
        if self.sync:
            os.fsync(self.descriptor)

    def close(self) -> None:
        os.close(self.descriptor)


class InMemory:
    """A mapped file in memory, kept from one export to the next. Threads write its pages at once; writes to a file would wait."""

    def __init__(self, descriptor: int, nbytes: int) -> None:
        os.ftruncate(descriptor, nbytes)
        self.bytes = np.frombuffer(mmap.mmap(descriptor, nbytes), np.uint8)

    def write(self, data: bytes | memoryview, offset: int) -> None:
        np.copyto(self.bytes[offset : offset + len(data)], np.frombuffer(data, np.uint8))  # others run meanwhile

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass  # it serves the next export
