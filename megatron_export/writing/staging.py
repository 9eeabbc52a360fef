"""The folders beside the target: an export grows in them, they are kept when it is interrupted, and one rename publishes it.

`.NAME.partial` holds the files that will be published. `.NAME.journal` holds what `journal.py` describes, and `lock`, which is
locked while an export runs. Where two folders cannot change names in one step, `.NAME.old` is the old one in between.
"""

import os
import shutil
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from safetensors.torch import save_file
from torch import Tensor

from ..common.errors import ExportError
from .byte_sink import OnDisk
from .file_systems import LOCK, exchange, locked
from .journal import (
    CALIBRATION,
    JOURNAL,
    KIND,
    OF_GUESTS,
    STATISTICS,
    Checks,
    about,
    journal_of,
    kept,
    naming,
    note,
    old_of,
    partial_of,
    read_journal,
    sync,
)
from .target import check_seen


class Noting(Protocol):
    """Files that grow in `folder`; those that are complete are noted in `notes` and, with checksums, in `finished`."""

    target: Path
    folder: Path
    notes: Path
    finished: dict[str, Checks]
    sync: bool
    noting: threading.Lock

    def path(self, file: str) -> Path:
        return self.folder / file

    def sheet(self, file: str, nbytes: int) -> OnDisk:
        return OnDisk(self.path(file), nbytes, self.sync)

    def finish(self, file: str, checks: Checks) -> None:
        """Note that a file is complete; it must be synced already. `ExportError` where the note cannot be written."""
        with naming(self.target), self.noting:
            if self.sync:
                sync(self.folder)
            note(self.notes, about(self.folder, file, checks), sync_too=self.sync)
            self.finished[file] = checks


@dataclass(frozen=True)
class Claim:
    """A target that no other export can claim until all processes that have the descriptor `lock` have closed it, or are gone.

    `made` are the folders that were made around it.
    """

    target: Path
    made: tuple[Path, ...]
    lock: int

    def leave(self, failure: type | None = None, *error: object) -> None:
        """Close the lock in this process; after a failure, where nobody else has it, remove it too."""
        if failure:
            with suppress(OSError):  # something is kept there
                (journal_of(self.target) / LOCK).unlink()
                journal_of(self.target).rmdir()
        os.close(self.lock)
        for folder in self.made:
            with suppress(OSError):  # not empty: there is a checkpoint in it, or what is kept beside one
                folder.rmdir()


def claimed(target: Path) -> Claim:
    """Claim a target. `ExportError` if another export has it, or if it cannot be written."""
    for folder in (partial_of(target), journal_of(target), old_of(target)):
        if folder.is_symlink():
            raise ExportError(f"{folder} is a symbolic link, through which no export writes. Remove it")
    with naming(target):
        made = tuple(folder for folder in target.parents if not folder.exists())
        target.parent.mkdir(parents=True, exist_ok=True)
        return Claim(target, made, locked(target, journal_of(target)))


class Staging(Noting):
    """Use as a context. Leaving it by an exception keeps what a later run can go on with, if any file is complete.

    `finished` begins with the files that an interrupted run completed, where `resume` goes on with it. `fingerprint` says which
    export it is. `claim`: the target is claimed already.
    """

    def __init__(
        self,
        target: Path,
        fingerprint: dict[str, str],
        *,
        overwrite: bool,
        resume: bool,
        sync: bool = True,
        claim: Claim | None = None,
    ) -> None:
        self.target = target
        self.folder = partial_of(target)
        self.journal = journal_of(target)
        self.notes = self.journal / JOURNAL
        self.fingerprint = fingerprint
        self.overwrite = overwrite
        self.resume = resume
        self.sync = sync
        self.claim = claim
        self.finished: dict[str, Checks] = {}
        self.noting = threading.Lock()

    def __enter__(self) -> "Staging":
        self.claim = self.claim or claimed(self.target)
        leave = self._leave
        try:
            with naming(self.target):
                self._restore()
                said = self._to_go_on_with() if self.resume else {}
                leave = partial(self.__exit__, ExportError)
                self._open(said)
        except BaseException:
            leave()
            raise
        return self

    def _restore(self) -> None:
        """Give a folder its name back that was to be replaced in two steps when an export was killed between them."""
        old = old_of(self.target)
        if not old.is_dir():
            return
        if self.target.exists() and any(self.target.iterdir()):
            shutil.rmtree(old, ignore_errors=True)
            return
        old.rename(self.target)  # over an empty folder too
        if not self.overwrite:
            said = f"{self.target} was about to be replaced and is as it was again. Give --overwrite to replace it"
            raise ExportError(said)

    def _to_go_on_with(self) -> dict[str, Checks]:
        """The files that an interrupted export completed; it must have been of the same."""
        said = read_journal(self.target)
        if said is None:
            return {}
        first, finished = said
        if other := [key for key, value in self.fingerprint.items() if first.get(key) != value]:
            raise ExportError(
                f"{self.folder} holds an interrupted export with another {' and another '.join(other)}: it cannot be continued. "
                "Repeat the command that was interrupted, or leave --resume out to start anew"
            )
        return finished

    def _open(self, finished: dict[str, Checks]) -> None:
        self.finished = finished
        if not finished:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
            (self.journal / STATISTICS).unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.name not in finished:
                path.unlink()
        self._begin_journal()
        if self.sync:
            sync(self.target.parent)

    def forget(self, files: Iterable[str]) -> None:
        """Note that these files of any rank are damaged, so that a run that goes on with this one writes them again."""
        with naming(self.target), self.noting:
            said = read_journal(self.target)
            found = said[1] if said else {}
            self.finished = {file: checks for file, checks in found.items() if file not in set(files)}
            self._begin_journal()

    def _begin_journal(self) -> None:
        """Write one new journal in place of those of all ranks, whose lines may be cut off or damaged."""
        new = self.journal / "new"
        new.unlink(missing_ok=True)
        lines = (about(self.folder, file, checks) for file, checks in self.finished.items())
        note(new, {"kind": KIND, **self.fingerprint}, *lines, sync_too=self.sync)
        new.rename(self.notes)
        for path in self.journal.glob(OF_GUESTS):
            path.unlink()
        if self.sync:
            sync(self.folder)
            sync(self.journal)

    def keep(self, statistics: dict[str, Tensor]) -> None:
        """Keep the statistics for a run that goes on with this one."""
        if statistics and not self.finished:
            with naming(self.target):
                save_file({n: t.clone() for n, t in statistics.items()}, self.journal / STATISTICS)
                if self.sync:
                    sync(self.journal / STATISTICS)
                    sync(self.journal)

    def publish(self) -> None:
        """Sync everything and give the folder its final name; what had it is removed when the context is left."""
        with naming(self.target):
            if self.sync:
                for path in self.folder.iterdir():
                    sync(path)
                sync(self.folder)
            self._replace()
            if self.sync:
                sync(self.target.parent)

    def _replace(self) -> None:
        if self.target.exists() and self.overwrite:
            exchange(self.folder, self.target)
            return
        if self.target.exists():
            self.target.rmdir()  # fails if somebody filled it since it was checked
        self.folder.rename(self.target)

    def __exit__(self, kind: type | None, *error: object) -> None:
        if kind is None or not (self.finished or kept(self.target)):
            with suppress(OSError):
                self.notes.unlink()  # first: the next folder is an old checkpoint, if it was replaced
            shutil.rmtree(self.folder, ignore_errors=True)
            if kind is None or not (self.journal / CALIBRATION).is_file():
                shutil.rmtree(self.journal, ignore_errors=True)
        self._leave()

    def _leave(self) -> None:
        self.claim.leave()


class Guest(Noting):
    """A rank that writes files into the folder that rank 0 has opened for an export into `target`."""

    def __init__(self, target: Path, rank: int, finished: dict[str, Checks], sync: bool = True) -> None:
        self.target = target
        self.folder = partial_of(target)
        self.notes = journal_of(target) / OF_GUESTS.replace("*", str(rank))
        self.finished = dict(finished)
        self.sync = sync
        self.noting = threading.Lock()
        check_seen(self.folder, rank)


def tidy(target: Path) -> None:
    """Remove what an export that was killed just after it published has left beside its target."""
    if any(folder.exists() for folder in (partial_of(target), journal_of(target), old_of(target))):
        with Staging(target, {}, overwrite=True, resume=False):
            pass
