"""What the bytes of a file are written on, wherever in it and by several threads at once: a file system's file, or memory that is
mapped and stays so.
"""

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
        """All is written."""

    def close(self) -> None:
        """It is written no more."""


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
        if self.sync:
            self._start_writeback(start, nbytes)

    def _start_writeback(self, start: int, nbytes: int) -> None:
        """Have the system begin to write a part to disk, so that little is left when all is to be there (Linux)."""
        ctypes.CDLL(None).sync_file_range(
            self.descriptor, ctypes.c_int64(start), ctypes.c_int64(nbytes), _SYNC_FILE_RANGE_WRITE
        )  # a hint: where it fails, fsync does all the work

    def finish(self) -> None:
        if self.sync:
            os.fsync(self.descriptor)

    def close(self) -> None:
        os.close(self.descriptor)


class InMemory:
    """A file in memory, by its descriptor, for as many exports as there are. Once its pages are there, threads write on them at the
    speed of memory, where writes into one file wait for each other.
    """

    def __init__(self, descriptor: int, nbytes: int) -> None:
        os.ftruncate(descriptor, nbytes)
        self.bytes = np.frombuffer(mmap.mmap(descriptor, nbytes), np.uint8)

    def write(self, data: bytes | memoryview, offset: int) -> None:
        np.copyto(self.bytes[offset : offset + len(data)], np.frombuffer(data, np.uint8))  # others run meanwhile

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass  # it serves the next export
