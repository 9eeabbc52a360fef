"""Files are read back while they grow, and judged before the folder gets its name.

In every file the header must be the plan's, and the checksum of every tensor that of what was written; there must be no NaN and no
Inf (e4m3 codes: no NaN), and scales must be above zero. `quantized_modules.py` judges all files together.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..common.dtypes import SIZES
from ..common.errors import report
from ..common.progress import Progress, quiet
from ..planning.contents import Contents
from ..planning.shard_files import LANES
from ..planning.tensor_spec import Output
from .crc32 import crc32, crc32_of_file, joined_crc32
from .journal import Checks
from .quantized_modules import is_scale, module_problems
from .safetensors_file import header_of

if TYPE_CHECKING:
    from .staging import Staging

CHUNK = 8 << 20  # what is read and judged at a time
BLOCK = 4 << 20  # of it, what is looked at twice while it is in a cache
THREADS = LANES  # files that are read at a time: all that grow
JUDGES = 8  # threads that read and judge their chunks
BUFFERS = 3  # chunks of one file that are read at a time
FILE_BYTES = BLOCK * BUFFERS  # of memory for each file that is read


@dataclass(frozen=True)
class Verified:
    """One file: bytes, crc32, that of each tensor; `damages`: where it is not what was written; `problems`: what is wrong with it
    if it is.
    """

    nbytes: int
    crc32: int
    tensors: dict[str, int] = field(default_factory=dict)
    damages: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


class _Span(NamedTuple):
    """A tensor, or a slice of one, and where it starts in its file."""

    start: int
    output: Output
    index: int
    nbytes: int


_Found = tuple[Verified, Checks]  # one file, read, and the checksums of its slices by tensor


class _Judged(NamedTuple):
    """Of a chunk of a file, the checksums of what it has of each span (tensor, slice, crc32, length), and what is wrong."""

    crcs: list[tuple[str, int, int, int]]
    problems: list[str]


class ReadBack:
    """Use as a context. Reads the files that it is told to follow, `THREADS` at a time."""

    def __init__(self, contents: Contents) -> None:
        self.copied = contents.copied
        self.slices = contents.slices
        self.reading: dict[str, Future[_Found]] = {}

    def __enter__(self) -> ReadBack:
        self.readers = ThreadPoolExecutor(THREADS, thread_name_prefix="read")
        self.judges = ThreadPoolExecutor(JUDGES, thread_name_prefix="judge")
        return self

    def __exit__(self, *error: object) -> None:
        self.readers.shutdown(cancel_futures=True)
        self.judges.shutdown()

    def follow(self, path: Path, outputs: tuple[Output, ...], ready: Callable[[int], bool] = lambda end: True) -> None:
        """Read a file with these tensors; `ready` waits until all before a place in it is there, and says whether it is."""
        spans, header = list(_spans(outputs, self.slices)), header_of(outputs)[0]
        self.reading[path.name] = self.readers.submit(_read, path, spans, header, ready, self.judges, self.copied)

    def found(self, checks: dict[str, Checks], progress: Progress = quiet) -> dict[str, Verified]:
        """What was read, by file; `checks` are the checksums of what was written."""
        verified = {}
        for file in progress("verify", list(self.reading)):
            found, slices = self.reading[file].result()
            written = checks[file] if slices else {}
            other = (f"{file}: {n} is not what was written" for n, sums in written.items() if slices[n] != sums)
            verified[file] = replace(found, damages=(*found.damages, *other))
        return verified


def check_read_back(staging: Staging, contents: Contents, found: dict[str, Verified]) -> dict[str, Verified]:
    """What was found in all files of a folder, after the recipe was checked too.

    Raises one `ExportError` with all that is wrong. Files that are not what was written count as complete no more.
    """
    folder = staging.folder
    if damaged := [file for file, one in found.items() if one.damages]:
        staging.forget(damaged)
        lost = "another program writes there, or the disk loses data. The same command with --resume writes these files again"
        report([*(damage for file in damaged for damage in found[file].damages), f"{folder}: {lost}"])
    report([problem for one in found.values() for problem in one.problems] + module_problems(folder, contents))
    others = sorted(path for path in folder.iterdir() if path.name not in found)
    found = {file: found[file] for file in contents.files}
    return found | {path.name: Verified(path.stat().st_size, crc32_of_file(path)) for path in others}


def checks_of(descriptor: int, outputs: tuple[Output, ...], slices: dict[str, int]) -> Checks:
    """The checksums of the tensors in an open file, as they are now."""
    checks, buffer = defaultdict(list), memoryview(bytearray(CHUNK))
    for span in _spans(outputs, slices):
        crc = 0
        for offset in range(span.start, span.start + span.nbytes, CHUNK):
            chunk = buffer[: min(CHUNK, span.start + span.nbytes - offset)]
            crc = crc32(chunk[: os.preadv(descriptor, [chunk], offset)], crc)
        checks[span.output.name].append(crc)
    return dict(checks)


def _spans(outputs: tuple[Output, ...], slices: dict[str, int]) -> Iterator[_Span]:
    """In the order of the file."""
    starts = header_of(outputs)[1]
    for output in sorted(outputs, key=lambda o: starts[o.name]):
        nbytes = output.nbytes // slices[output.name]
        for index in range(slices[output.name]):
            yield _Span(starts[output.name] + index * nbytes, output, index, nbytes)


def _read(
    path: Path,
    spans: list[_Span],
    header: bytes,
    ready: Callable[[int], bool],
    judges: ThreadPoolExecutor,
    copied: frozenset[str],
) -> _Found:
    """Read one file, several chunks of it at a time."""
    starts, end = [span.start for span in spans], spans[-1].start + spans[-1].nbytes
    buffers = [memoryview(bytearray(min(BLOCK, end - len(header)))) for _ in range(BUFFERS)]
    chunks: list[_Judged] = []
    reading: deque[Future[_Judged]] = deque()

    with path.open("rb", buffering=0) as file:
        if file.read(len(header)) != header:
            return Verified(0, 0, damages=(f"{path.name}: its header is not what was written",)), {}
        for number, offset in enumerate(range(len(header), end, CHUNK)):
            size = min(CHUNK, end - offset)
            if not ready(offset + size):
                return Verified(0, 0, damages=(f"{path.name}: it was not written to its end",)), {}
            if len(reading) == BUFFERS:
                chunks.append(reading.popleft().result())  # now its buffer is free
            buffer, mine = buffers[number % BUFFERS], spans[bisect_right(starts, offset) - 1 :]
            where = range(offset, offset + size)
            reading.append(judges.submit(_judge, file.fileno(), path.name, mine, where, buffer, copied))
        chunks += [one.result() for one in reading]
        damages = (f"{path.name}: longer than its header says",) if os.pread(file.fileno(), 1, end) else ()
    problems: list[str] = []
    whole = [(crc32(header), len(header))]
    parts: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
    for one in chunks:
        problems += one.problems
        for name, index, crc, length in one.crcs:
            parts[name, index].append((crc, length))
            whole.append((crc, length))
    slices, crcs = defaultdict(list), defaultdict(list)
    for span in spans:
        found = parts[span.output.name, span.index]
        slices[span.output.name].append(joined_crc32(found))
        crcs[span.output.name] += found
    sums = {name: joined_crc32(found) for name, found in crcs.items()}
    found = Verified(path.stat().st_size, joined_crc32(whole), sums, damages, tuple(dict.fromkeys(problems)))
    return found, slices


def _judge(
    descriptor: int, file: str, spans: list[_Span], where: range, buffer: memoryview, copied: frozenset[str]
) -> _Judged:
    """Read a chunk of a file, whose first byte is in the first span, block by block."""
    found: dict[tuple[str, int], tuple[int, int]] = {}
    problems, first = [], 0
    for offset in where[:: len(buffer)]:
        block = buffer[: where.stop - offset]
        block = block[: os.preadv(descriptor, [block], offset)]
        for number in range(first, len(spans)):
            span = spans[number]
            start, end = max(span.start - offset, 0), min(span.start + span.nbytes - offset, len(block))
            if start >= len(block):
                break
            first = number  # where the next block begins, if not behind it
            if end == start:
                continue
            part, key = block[start:end], (span.output.name, span.index)
            crc, length = found.get(key, (0, 0))
            found[key] = crc32(part, crc), length + len(part)
            problems += [] if span.output.name in copied else _wrong_values(file, span.output, part)
    return _Judged([(*key, *one) for key, one in found.items()], problems)


_EXPONENTS = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}


def _wrong_values(file: str, output: Output, chunk: memoryview) -> list[str]:
    """What no engine can use of the numbers in a chunk. Compared as integers: numpy knows neither bfloat16 nor float8."""
    if output.dtype == "U8" and is_scale(output.name):  # e8m0, whose zero is a power of two
        return [f"{file}: {output.name} holds NaN or Inf"] if 0xFF in np.frombuffer(chunk, dtype=np.uint8) else []
    if output.dtype in ("U8", "I64") or len(chunk) < SIZES[output.dtype]:
        return []
    codes = output.dtype == "F8_E4M3"  # which has NaN, and no Inf
    signs = 1 << 8 * SIZES[output.dtype] - 1
    whole = len(chunk) // SIZES[output.dtype]  # of a file that was cut off, half a number may be left
    bits = np.frombuffer(chunk, dtype=f"<u{SIZES[output.dtype]}", count=whole)
    least = 0x7F if codes else _EXPONENTS[output.dtype]  # what is no number begins here, but for its sign
    wrong = int(bits.view(f"<i{bits.itemsize}").max()) >= least or int(bits.max()) >= signs + least
    problems = [f"{file}: {output.name} holds NaN or Inf"] if wrong else []
    if is_scale(output.name) and (int(bits.min()) == 0 or int(bits.max()) >= signs):
        problems.append(f"{file}: {output.name} holds a scale that is not above zero")
    return problems
