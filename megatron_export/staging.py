"""The folders beside the target in which an export grows: one export at a time, kept when it is interrupted, published by
one rename.

`.NAME.partial` holds the files that will be published. `.NAME.journal` holds `statistics.safetensors`, what they are quantized
with; `journal.jsonl`, a first line that says which export it is, then one for every file that is complete and synced, with
the checksums of its tensors; and `lock`, which is locked while an export runs.
"""

import ctypes
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import ExportError

JOURNAL, STATISTICS = "journal.jsonl", "statistics.safetensors"
KIND = "megatron_export journal 1"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2

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

    def __init__(self, target: Path, fingerprint: dict[str, str], *, overwrite: bool, resume: bool) -> None:
        self.target = target
        self.folder = partial_of(target)
        self.journal = journal_of(target)
        self.fingerprint = fingerprint
        self.overwrite = overwrite
        self.resume = resume
        self.finished: dict[str, Checks] = {}

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
            for name in (JOURNAL, STATISTICS):
                (self.journal / name).unlink(missing_ok=True)
            self._note({"kind": KIND, **self.fingerprint})
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

    def finish(self, file: str, checks: Checks) -> None:
        """Note that a file is complete; it must be synced already."""
        with naming(self.target):
            self._note({"file": file, "tensors": checks})
        self.finished[file] = checks

    def keep(self, statistics: dict[str, Tensor]) -> None:
        """Keep the statistics for a run that goes on with this one."""
        if statistics and not self.finished:
            with naming(self.target):
                save_file({n: t.clone() for n, t in statistics.items()}, self.journal / STATISTICS)

    def _note(self, line: dict) -> None:
        sync(self.folder)
        with (self.journal / JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(line, separators=(",", ":")) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def publish(self) -> None:
        """Sync everything and give the folder its final name; what had it is removed afterwards."""
        with naming(self.target):
            for path in self.folder.iterdir():
                sync(path)
            sync(self.folder)
            self._replace()
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


def read_journal(target: Path) -> tuple[dict, dict[str, Checks]] | None:
    """The first line of an interrupted export's journal, and the checksums of the files that it completed and that are
    there; None if there is none to go on with. A last line that was cut off counts for nothing.
    """
    try:
        lines = (journal_of(target) / JOURNAL).read_text(encoding="utf-8").split("\n")[:-1]
        first, *rest = [json.loads(line) for line in lines]
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
