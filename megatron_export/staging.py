"""The folders beside the target in which an export grows: one export at a time, kept when it is interrupted, published by
one rename.

`.NAME.partial` holds the files that will be published. `.NAME.journal` holds `statistics.safetensors`, what they are quantized
with; `journal.jsonl`, a first line that says which export it is, then one for every file of rank 0 that is complete and synced,
with the checksums of its tensors; `journal-R.jsonl`, the same of another rank that writes; and `lock`, which is locked while an
export runs.
"""

import ctypes
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import ExportError

JOURNAL, STATISTICS = "journal.jsonl", "statistics.safetensors"
_OF_GUESTS = "journal-*.jsonl"
KIND = "megatron_export journal 1"
_AT_FDCWD, _RENAME_EXCHANGE, _SYNC_FILE_RANGE_WRITE = -100, 2, 2

Checks = dict[str, list[int]]  # tensor -> checksums of its slices, one if it is whole


def partial_of(target: Path) -> Path:
    """The folder that an export into `target` grows in."""
    return target.parent / f".{target.name}.partial"


def journal_of(target: Path) -> Path:
    """The folder of its journal."""
    return target.parent / f".{target.name}.journal"


class Staging:
    """Use as a context. Leaving it by an exception keeps what a later run can go on with, if any file is complete.

    `finished` maps the files that an interrupted run completed to the checksums of their tensors.
    """

    def __init__(
        self, target: Path, fingerprint: dict[str, str], *, overwrite: bool, resume: bool, sync: bool = True
    ) -> None:
        self.target = target
        self.folder = partial_of(target)
        self.journal = journal_of(target)
        self.fingerprint = fingerprint
        self.overwrite = overwrite
        self.resume = resume
        self.sync = sync
        self.finished: dict[str, Checks] = {}
        self.noting = threading.Lock()

    def __enter__(self) -> "Staging":
        with naming(self.target):
            self.made = [folder for folder in self.target.parents if not folder.exists()]
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.lock = _locked(self.target, self.journal)
        try:
            with naming(self.target):
                self._open()
        except BaseException as error:
            self.__exit__(type(error))
            raise
        return self

    def _open(self) -> None:
        said = read_journal(self.target) if self.resume else None
        if said is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
            (self.journal / STATISTICS).unlink(missing_ok=True)
            self._begin_journal({"kind": KIND, **self.fingerprint})
            return
        first, self.finished = said
        if other := [key for key, value in self.fingerprint.items() if first.get(key) != value]:
            raise ExportError(
                f"{self.folder} holds an interrupted export with another {' and another '.join(other)}: it cannot be continued. "
                "Repeat the command that was interrupted, or leave --resume out to start anew"
            )
        for path in self.folder.iterdir():
            if path.name not in self.finished:
                path.unlink()
        self._begin_journal(first, *({"file": file, "tensors": checks} for file, checks in self.finished.items()))

    def _begin_journal(self, *lines: dict) -> None:
        """One journal of all ranks' lines, in place of those that are there."""
        new = self.journal / "new"
        new.unlink(missing_ok=True)
        _note(new, *lines, sync_too=self.sync)
        new.rename(self.journal / JOURNAL)
        for path in self.journal.glob(_OF_GUESTS):
            path.unlink()
        if self.sync:
            sync(self.folder)
            sync(self.journal)

    def path(self, file: str) -> Path:
        return self.folder / file

    def finish(self, file: str, checks: Checks) -> None:
        """Note that a file is complete; it must be synced already."""
        with naming(self.target), self.noting:
            _finish(self.folder, self.journal / JOURNAL, file, checks, self.sync)
            self.finished[file] = checks

    def keep(self, statistics: dict[str, Tensor]) -> None:
        """Keep the statistics for a run that goes on with this one."""
        if statistics and not self.finished:
            with naming(self.target):
                save_file({n: t.clone() for n, t in statistics.items()}, self.journal / STATISTICS)

    def publish(self) -> None:
        """Sync everything and give the folder its final name; what had it is removed afterwards."""
        with naming(self.target):
            if self.sync:
                for path in self.folder.iterdir():
                    sync(path)
                sync(self.folder)
            self._replace()
            if self.sync:
                sync(self.target.parent)
            shutil.rmtree(self.folder, ignore_errors=True)

    def _replace(self) -> None:
        if self.target.exists() and self.overwrite:
            exchange(self.folder, self.target)
            return
        if self.target.exists():
            self.target.rmdir()  # fails if somebody filled it since it was checked
        self.folder.rename(self.target)

    def __exit__(self, kind: type | None, *error: object) -> None:
        if kind is None or not self.finished:
            shutil.rmtree(self.folder, ignore_errors=True)
            shutil.rmtree(self.journal, ignore_errors=True)
        self._leave()

    def _leave(self) -> None:
        os.close(self.lock)
        for folder in self.made:
            with suppress(OSError):  # not empty: the checkpoint was published into it
                folder.rmdir()


class Guest:
    """A rank that writes files into the folder that rank 0 has opened for an export into `target`."""

    def __init__(self, target: Path, rank: int, finished: dict[str, Checks], sync: bool = True) -> None:
        self.target = target
        self.folder = partial_of(target)
        self.journal = journal_of(target) / _OF_GUESTS.replace("*", str(rank))
        self.finished = dict(finished)
        self.sync = sync
        self.noting = threading.Lock()
        if not self.folder.is_dir():
            raise ExportError(
                f"{self.folder}, which rank 0 has made, is not there on rank {rank}. Give an --output on a disk that all writers "
                "share, or --writers rank0"
            )

    def path(self, file: str) -> Path:
        return self.folder / file

    def finish(self, file: str, checks: Checks) -> None:
        """Note that a file is complete; it must be synced already."""
        with naming(self.target), self.noting:
            _finish(self.folder, self.journal, file, checks, self.sync)
            self.finished[file] = checks


def _finish(folder: Path, journal: Path, file: str, checks: Checks, sync_too: bool) -> None:
    if sync_too:
        sync(folder)
    _note(journal, {"file": file, "tensors": checks}, sync_too=sync_too)


def _note(path: Path, *lines: dict, sync_too: bool) -> None:
    with path.open("a", encoding="utf-8") as journal:
        journal.write("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
        journal.flush()
        if sync_too:
            os.fsync(journal.fileno())


def read_journal(target: Path) -> tuple[dict, dict[str, Checks]] | None:
    """The first line of an interrupted export's journal, and the checksums of the files that it completed and that are
    there; None if there is none to go on with. Last lines that were cut off count for nothing.
    """
    folder = journal_of(target)
    try:
        texts = [path.read_text(encoding="utf-8") for path in (folder / JOURNAL, *sorted(folder.glob(_OF_GUESTS)))]
        first, *rest = [json.loads(line) for text in texts for line in text.split("\n")[:-1]]
        if first["kind"] != KIND:
            return None
        there = {path.name for path in partial_of(target).iterdir()}
        return first, {line["file"]: line["tensors"] for line in rest if line["file"] in there}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def kept(target: Path) -> int:
    """How many files of an interrupted export into `target` are complete."""
    said = read_journal(target)
    return len(said[1]) if said else 0


def kept_statistics(target: Path) -> dict[str, Tensor] | None:
    """The statistics of an interrupted export into `target`, None if there is none that any file was completed with."""
    said = read_journal(target)
    try:
        return load_file(journal_of(target) / STATISTICS) if said and said[1] else None
    except (OSError, SafetensorError):
        return None


def exchange(one: Path, other: Path) -> None:
    """Let two folders change names in one step (Linux 3.15); where the file system cannot, in two."""
    if _swapped(one, other):
        return
    aside = one.with_suffix(".old")
    shutil.rmtree(aside, ignore_errors=True)
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


def sync(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def start_writeback(descriptor: int, start: int, nbytes: int) -> None:
    """Have the system begin to write a part of a file to disk, so that little is left when all is to be there (Linux)."""
    ctypes.CDLL(None).sync_file_range(
        descriptor, ctypes.c_int64(start), ctypes.c_int64(nbytes), _SYNC_FILE_RANGE_WRITE
    )  # a hint: where it fails, fsync does all the work


@contextmanager
def naming(target: Path) -> Iterator[None]:
    """The system's own errors seldom say which folder they are about."""
    try:
        yield
    except OSError as error:
        raise ExportError(f"cannot write {target} ({error}). Make room there, or give another --output") from error


def _locked(target: Path, journal: Path) -> int:
    """A descriptor that holds the lock of `target`; it is free again when it is closed or its process is gone."""
    path = journal / "lock"
    while True:
        journal.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ExportError(
                f"another export into {target} is running. Wait for it, or give another --output"
            ) from None
        if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
            return descriptor
        os.close(descriptor)  # its last owner removed the folder in this moment
