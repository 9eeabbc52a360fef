"""The process that writes what an export in the background has kept in memory; it needs neither Megatron nor other ranks.

python -m megatron_export.export.async_writer FD    does the `Handover` that its parent left in the file with that descriptor
"""

import os
import pickle  # what this process is told by its own parent, through memory that nobody else sees
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..common.errors import message_of
from ..planning.contents import Contents
from ..writing.journal import Checks, sync
from ..writing.publish import Destination, open_staging, publish
from ..writing.read_back import ReadBack, checks_of
from ..writing.staging import Claim, Staging

CHUNK = 64 << 20


@dataclass(frozen=True)
class Handover:
    """What this process is told: what to publish and where, the topology's sizes, file -> descriptor of its memory, the claim."""

    contents: Contents
    place: Destination
    sizes: dict[str, int]
    files: dict[str, int]
    claim: Claim


def _opened(job: Handover) -> Staging:
    try:
        return open_staging(job.place, job.claim)
    except BaseException as error:
        job.claim.leave(type(error))
        raise


def _write(job: Handover) -> None:
    contents = job.contents
    with _opened(job) as staging, ReadBack(contents) as back, ThreadPoolExecutor(len(job.files)) as pool:
        writing = {
            file: pool.submit(_copy, staging.path(file), descriptor, contents, job.place.sync)
            for file, descriptor in job.files.items()
        }
        for file, copied in writing.items():
            checks = copied.result()
            back.follow(staging.path(file), contents.files[file])
            staging.finish(file, checks)
        publish(contents, staging, job.place, job.sizes, [back.found(staging.finished)])


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
        _write(job)
    except Exception as error:  # noqa: BLE001 - whoever waits for this process must hear of it
        sys.stderr.write(message_of(error))
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
