"""The process that writes what an export in the background has kept in memory; it needs neither Megatron nor other ranks.

python -m megatron_export.export.async_writer FD    does the `Handover` that its parent left in the file with that descriptor

There is one for each rank that writes. That of rank 0 opens the staging folder, tells the others to begin, hears what they wrote,
and publishes. They have a connection to it, over which each side hears when the other ends: then it ends too, and nothing is
published. What was written is said there in a line of JSON.
"""

import json
import os
import pickle  # what this process is told by its own parent, through memory that nobody else sees
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from ..common.errors import ExportError, message_of
from ..planning.contents import Contents
from ..writing.journal import Checks, sync
from ..writing.publish import Destination, open_staging, publish
from ..writing.read_back import ReadBack, Verified, checks_of
from ..writing.staging import Claim, Guest, Noting, Staging

CHUNK = 64 << 20
_BEGIN = b"begin\n"


@dataclass(frozen=True)
class Handover:
    """What this process is told: what to publish and where, the topology's sizes, file -> descriptor of its memory.

    claim   of the target, on rank 0
    links   rank -> descriptor of the connection to its process: of the other writers, on rank 0; of rank 0, on these
    rank    whose files it writes
    beside  a folder that is removed at the end
    """

    contents: Contents
    place: Destination
    sizes: dict[str, int]
    files: dict[str, int]
    claim: Claim | None = None
    links: dict[int, int] = field(default_factory=dict)
    rank: int = 0
    beside: str | None = None


def _opened(job: Handover) -> Staging:
    try:
        return open_staging(job.place, job.claim)
    except BaseException as error:
        job.claim.leave(type(error))
        raise


def _write(job: Handover) -> None:
    """On rank 0: write its files, hear of those of others, publish."""
    with _opened(job) as staging, _told(job) as others:
        found = _copied(job, staging)
        theirs = [future.result() for future in as_completed(others)]
        publish(job.contents, staging, job.place, job.sizes, [found, *theirs])


def _copied(job: Handover, desk: Noting) -> dict[str, Verified]:
    """Write the files of a rank; what was read back, by file."""
    with ReadBack(job.contents) as back, ThreadPoolExecutor(len(job.files) or 1) as pool:
        writing = {
            file: pool.submit(_copy, desk.path(file), descriptor, job.contents, job.place.sync)
            for file, descriptor in job.files.items()
        }
        for file, copied in writing.items():
            checks = copied.result()
            back.follow(desk.path(file), job.contents.files[file])
            desk.finish(file, checks)
        return back.found(desk.finished)


@contextmanager
def _told(job: Handover) -> Iterator[list]:
    """Tell the other processes to begin; yields what they will have written. If this fails, they end before it is left."""
    links = {rank: socket.socket(fileno=descriptor) for rank, descriptor in job.links.items()}
    with ThreadPoolExecutor(len(links) or 1, thread_name_prefix="hear") as pool:
        try:
            yield [pool.submit(_heard, rank, link) for rank, link in links.items()]
        finally:
            for link in links.values():
                with suppress(OSError):  # it is gone
                    link.shutdown(socket.SHUT_WR)


def _heard(rank: int, link: socket.socket) -> dict[str, Verified]:
    """What the process of a rank wrote; returns when that process has ended, or said what it did."""
    line = b""
    with suppress(OSError):
        link.sendall(_BEGIN)
        line = link.makefile("rb").readline()
    if not line.endswith(b"\n"):
        raise ExportError(f"the process that writes the files of rank {rank} is gone")
    said = json.loads(line)
    if "failure" in said:
        raise ExportError(f"rank {rank} failed to write in the background: {said['failure']}")
    lists = ("damages", "problems")
    return {file: Verified(**one | {name: tuple(one[name]) for name in lists}) for file, one in said.items()}


def _write_as_guest(job: Handover) -> None:
    """On another rank: write its files when rank 0's process has opened the staging folder, and tell it what was written."""
    link = socket.socket(fileno=job.links[0])
    lines = link.makefile("rb")
    if lines.readline() != _BEGIN:
        raise ExportError("rank 0's process ended before it opened the staging folder")
    ended = threading.Thread(target=_end_with, args=(lines,), daemon=True)
    ended.start()
    try:
        found = _copied(job, Guest(job.place.folder, job.rank, {}, job.place.sync))
        said = {file: asdict(one) for file, one in found.items()}
    except Exception as error:  # noqa: BLE001 - rank 0's process must hear of it
        said = {"failure": message_of(error)}
    link.sendall(json.dumps(said).encode() + b"\n")


def _end_with(lines: IO[bytes]) -> None:
    """End this process when the other end of a connection is closed: nothing that it still writes would be published."""
    with suppress(OSError):
        lines.read()
    os._exit(1)


def _copy(path: Path, descriptor: int, contents: Contents, to_disk: bool) -> Checks:
    """Write one file to disk, then free its memory; returns the checksums of what was there."""
    checks = checks_of(descriptor, contents.files[path.name], contents.slices)
    size, offset = os.fstat(descriptor).st_size, 0
    with path.open("wb") as file:
        while offset < size:
            offset += os.sendfile(file.fileno(), descriptor, offset, min(CHUNK, size - offset))
    os.close(descriptor)
    if to_disk:
        sync(path)
    return checks


def main() -> int:
    """Run as a process; what goes wrong is one message on standard error, and status 1."""
    try:
        with os.fdopen(int(sys.argv[1]), "rb") as file:
            file.seek(0)
            job = pickle.load(file)
        with ExitStack() as stack:
            if job.beside:
                stack.callback(shutil.rmtree, job.beside, ignore_errors=True)
            (_write if job.claim else _write_as_guest)(job)
    except Exception as error:  # noqa: BLE001 - whoever waits for this process must hear of it
        sys.stderr.write(message_of(error))
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
