"""What not every file system can: hold a lock, and let two folders change names in one step."""

import ctypes
import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path

from ..common.errors import ExportError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
LOCK = "lock"  # in the folder of a journal
_RUNNING = "another export into {} is running. Wait for it, or give another --output"
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # of Lustre without -o flock, of NFS without lockd


def exchange(one: Path, other: Path) -> None:
    """Let two folders change names in one step (Linux 3.15); where the file system cannot (NFS), in three."""
    if _swapped(one, other):
        return
    aside = one.with_suffix(".old")
    other.rename(aside)
    try:
        one.rename(other)
    except OSError:
        aside.rename(other)
        raise
    aside.rename(one)


def _swapped(one: Path, other: Path) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.renameat2(_AT_FDCWD, bytes(one), _AT_FDCWD, bytes(other), _RENAME_EXCHANGE) == 0


def locked(target: Path, journal: Path) -> int:
    """A descriptor that holds the lock of `target` until it is closed; it holds nothing on a file system without locks."""
    while True:
        journal.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # its last owner removed the folder in this moment
            descriptor = os.open(journal / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if _locks(descriptor, journal / LOCK):
                    return descriptor
            except BlockingIOError:
                raise ExportError(_RUNNING.format(target)) from None
            os.close(descriptor)


def check_unlocked(target: Path, journal: Path) -> None:
    """`ExportError` while an export into `target` holds its lock."""
    with suppress(FileNotFoundError, NotADirectoryError):
        descriptor = os.open(journal / LOCK, os.O_RDWR)
        try:
            _locks(descriptor, journal / LOCK)
        except BlockingIOError:
            raise ExportError(_RUNNING.format(target)) from None
        os.close(descriptor)


def _locks(descriptor: int, path: Path) -> bool:
    """Whether an open file, locked now where that can be, is still the one at `path`."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return True
        os.close(descriptor)
        raise
