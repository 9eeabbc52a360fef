"""What an interrupted export leaves beside its target, for one that goes on with it.

`journal.jsonl` has a first line that says which export it is, then a line for every file that is complete and synced, with its size
and the checksums of its tensors; each line begins with a checksum of itself. Rank R, if it is not 0, notes its files in
`journal-R.jsonl`. `statistics.safetensors` is what the export quantized with. `calibration.safetensors` is a calibration file that
the command measured and has not used yet.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from ..common.errors import ExportError
from .crc32 import crc32

if TYPE_CHECKING:
    from torch import Tensor

JOURNAL, STATISTICS = "journal.jsonl", "statistics.safetensors"
CALIBRATION = "calibration.safetensors"
OF_GUESTS = "journal-*.jsonl"
KIND = "megatron_export journal 2"

Checks = dict[str, list[int]]  # tensor -> checksums of its slices, one if it is whole


def partial_of(target: Path) -> Path:
    """The folder that an export into `target` grows in."""
    return target.parent / f".{target.name}.partial"


def journal_of(target: Path) -> Path:
    """The folder of the journal of an export into `target`."""
    return target.parent / f".{target.name}.journal"


def old_of(target: Path) -> Path:
    """Where a folder that is being replaced in two steps is between them."""
    return partial_of(target).with_suffix(".old")


@contextmanager
def naming(target: Path) -> Iterator[None]:
    """Turn errors of the system into `ExportError`s that name the folder `target`."""
    try:
        yield
    except OSError as error:
        raise ExportError(f"cannot write {target} ({error}). Make room there, or give another --output") from error


def line_of(said: dict) -> bytes:
    """A line of a journal."""
    text = json.dumps(said, separators=(",", ":")).encode()
    return b"%08x %s\n" % (crc32(text), text)


def about(folder: Path, file: str, checks: Checks) -> dict:
    """What a line says of a file that is complete."""
    return {"file": file, "bytes": (folder / file).stat().st_size, "tensors": checks}


def note(path: Path, *lines: dict, sync_too: bool) -> None:
    """Add lines to a journal."""
    with path.open("ab") as journal:
        journal.write(b"".join(map(line_of, lines)))
        journal.flush()
        if sync_too:
            os.fsync(journal.fileno())


def sync(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_line(line: bytes) -> dict | None:
    """What a line of a journal says, None if it is damaged."""
    crc, _, text = line.partition(b" ")
    return json.loads(text) if crc == b"%08x" % crc32(text) else None


def read_journal(target: Path) -> tuple[dict, dict[str, Checks]] | None:
    """The first line of an interrupted export's journal, and the checksums of the files that it completed and that are
    there in the same size; None if there is none to go on with. Lines that were cut off or damaged count for nothing.
    """
    folder = journal_of(target)
    try:
        texts = [path.read_bytes() for path in (folder / JOURNAL, *sorted(folder.glob(OF_GUESTS)))]
        first, *rest = [_read_line(line) for text in texts for line in text.split(b"\n")]
        if first is None or first["kind"] != KIND:
            return None
        there = {path.name: path.lstat().st_size for path in partial_of(target).iterdir() if not path.is_symlink()}
        return first, {
            line["file"]: line["tensors"] for line in rest if line and there.get(line["file"]) == line["bytes"]
        }
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def kept(target: Path) -> int:
    """How many files of an interrupted export into `target` are complete."""
    with suppress(OSError):
        if said := read_journal(target):
            return len(said[1])
    return 0


def kept_statistics(target: Path) -> dict[str, Tensor] | None:
    """The statistics that an interrupted export into `target` completed files with, None if it completed none."""
    from safetensors.torch import load_file  # which imports torch

    with naming(target):
        said = read_journal(target)
        try:
            return load_file(journal_of(target) / STATISTICS) if said and said[1] else None
        except (FileNotFoundError, SafetensorError):
            return None
