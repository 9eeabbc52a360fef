"""Whether a folder can be exported into: it is free, on one file system, large enough, and not the original."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

from ..common.errors import ExportError
from ..common.file_names import MANIFEST
from ..planning.plan import Plan
from .file_systems import check_unlocked
from .journal import journal_of, naming, partial_of

SPARE_BYTES = 64 << 20


def check_empty(export_dir: Path, *, overwrite: bool) -> None:
    """`ExportError` for a target that is taken, or whose name is too long for the folders beside it."""
    _check_name(export_dir)
    if export_dir.is_file():
        raise ExportError(f"{export_dir} is a file; give a folder")
    if export_dir.is_dir() and any(export_dir.iterdir()) and not overwrite:
        raise ExportError(f"{export_dir} is not empty. Give another --output, or --overwrite to replace it when done")


def check_target(export_dir: Path, plan: Plan, *, overwrite: bool, resume: bool = False) -> None:
    """`ExportError` for a target that is taken or locked, cannot be written or replaced by a rename, or has too small a disk.

    A complete export may be what `resume` is to go on with; that is seen later.
    """
    _check_name(export_dir)
    if not (resume and (export_dir / MANIFEST).is_file()):
        check_empty(export_dir, overwrite=overwrite)
    if os.path.ismount(export_dir):
        raise ExportError(f"{export_dir} is a mount point, which cannot be replaced in one step; give a folder in it")
    parent = next(folder for folder in export_dir.parents if folder.exists())
    if not parent.is_dir():
        raise ExportError(f"{export_dir}: {parent} is a file, so no folder can be made in it. Give another --output")
    check_writable(parent, partial_of(export_dir).name, f"{export_dir}", "Give another --output")
    check_unlocked(export_dir, journal_of(export_dir))
    free = shutil.disk_usage(parent).free
    kept = partial_of(export_dir)  # is gone on with, or removed
    free += sum(path.stat().st_blocks * 512 for path in kept.iterdir()) if kept.is_dir() else 0
    if free < plan.nbytes + SPARE_BYTES:
        raise ExportError(
            f"{export_dir}: the checkpoint takes {plan.nbytes:,} bytes, but its disk has {free:,} free. Make room for "
            f"{plan.nbytes + SPARE_BYTES - free:,} more, or give an --output on another disk"
        )


def check_writable(folder: Path, name: str, asked: str, way_out: str = "Give another place") -> None:
    """Make and remove a file in a folder, with a name as long as `name`.

    `ExportError`, which begins with what was `asked` for, if the folder, its disk or the length of the name does not allow it.
    """
    tried = _tried(folder, name)
    try:
        tried.touch(exist_ok=False)
        tried.unlink()
    except OSError as error:
        raise ExportError(f"{asked}: cannot write in {folder} ({error.strerror}). {way_out}") from error


@contextmanager
def trial(export_dir: Path) -> Iterator[str]:
    """While it is open, a folder is where that of an export will grow; yields its path from `export_dir`."""
    folder = _tried(next(folder for folder in export_dir.parents if folder.exists()), partial_of(export_dir).name)
    with naming(export_dir):
        folder.mkdir()
    try:
        yield os.path.relpath(folder, export_dir)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def try_in_trial(export_dir: Path, place: str, rank: int) -> None:
    """Write into the folder of `trial` on another rank. `ExportError` where it is not there, or not writable."""
    folder = Path(os.path.normpath(export_dir / place))
    check_seen(folder, rank)
    with naming(export_dir):
        (folder / f"{rank}").touch()


def check_seen(folder: Path, rank: int) -> None:
    """`ExportError` if a rank that is to write does not see the folder that rank 0 has made."""
    if not folder.is_dir():
        raise ExportError(
            f"{folder}, which rank 0 has made, is not there on rank {rank}. Give an --output on a disk that all writers share, or "
            "--writers rank0"
        )


def _tried(folder: Path, name: str) -> Path:
    """What nobody has in a folder, under a hidden name of as many bytes as `name`."""
    return folder / f".{token_hex(4)}".ljust(len(os.fsencode(name)), "-")


def check_apart(export_dir: Path, *inputs: Path) -> None:
    """`ExportError` for a target that is, or holds, one of `inputs`: replacing it would delete what the export needs."""
    for path in inputs:
        if path.resolve().is_relative_to(export_dir.resolve()):
            raise ExportError(f"{export_dir} holds {path}, which this export needs. Give another --output")


def _check_name(export_dir: Path) -> None:
    """The folders in which an export grows, and its journal, are called like the target and lie beside it."""
    most = os.pathconf("/", "PC_NAME_MAX")
    longest = max(len(os.fsencode(part)) for part in (*export_dir.parent.parts, partial_of(export_dir).name))
    if longest > most:
        raise ExportError(
            f"{export_dir}: this, or the folder beside it that ends in .partial, has a name of {longest} bytes, more than {most}. "
            "Give a shorter --output"
        )
