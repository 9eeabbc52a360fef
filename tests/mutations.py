"""Breaks the code in one place at a time, and tells whether the tests that should notice do: `python tests/mutations.py`.

mutations.txt has the mutations, each of four lines and an empty one:

    # room/file.py: what is wrong then
    the tests that should notice, as arguments of pytest
    - text that is there once, its line breaks as \\n
    + text that takes its place

Works on a copy of the checkout. Ends with 0 if every mutation was caught, else with 1; a text that is not there once is an error.
`--only WORD` chooses the mutations whose first line has one of the words: `--only writing/ calibration/`.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_suffix(".txt")
SECONDS = 180  # of the tests of one mutation
MARKS = "not slow and not vllm and not sglang and not modelopt"
LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".pytest_cache", ".ruff_cache", "golden")
CAUGHT, SURVIVED, ERROR = "caught", "survived", "does not apply"
# What takes seconds to import, and is none of what is broken: tests run in forks of this process.
FOREIGN = (
    "torch",
    "transformers",
    "hypothesis",
    "pyarrow.parquet",
    "megatron.core.models.gpt",
    "megatron.core.pipeline_parallel",
)


@dataclass(frozen=True)
class Mutation:
    """Text `old` of a file of the package becomes `new`; `tests` are arguments of pytest."""

    title: str
    tests: tuple[str, ...]
    old: str
    new: str

    @property
    def file(self) -> Path:
        return Path("megatron_export") / self.title.partition(":")[0]


@dataclass(frozen=True)
class Result:
    """What became of a mutation, after how many seconds; `by` is the test that noticed first, or what is wrong."""

    mutation: Mutation
    verdict: str
    by: str
    seconds: float = 0.0

    @property
    def row(self) -> str:
        """A row of the table."""
        return f"| {self.verdict} | {self.mutation.title} | {self.by} | {self.seconds:.0f} |"


def mutations() -> Iterator[Mutation]:
    """Those of the table. `ValueError` for an entry that is none."""
    for entry in TABLE.read_text().strip().split("\n\n"):
        lines = entry.split("\n")
        if [line[:2] for line in (lines[0], *lines[2:])] != ["# ", "- ", "+ "]:
            raise ValueError(f"{TABLE.name} has an entry that is none:\n{entry}")
        old, new = (line[2:].replace("\\n", "\n") for line in lines[2:])
        yield Mutation(lines[0][2:], tuple(shlex.split(lines[1])), old, new)


def tried(mutation: Mutation, place: Path, sound: dict[tuple[str, ...], str]) -> Result:
    """Break the checkout in `place`, run the tests there, and mend it again; `sound` says what is wrong with tests without it."""
    path = place / mutation.file
    whole, was, started = path.read_text(), path.stat(), time.monotonic()
    if (count := whole.count(mutation.old)) != 1:
        return Result(mutation, ERROR, f"its text is there {count} times")
    if mutation.tests not in sound:
        status, said = run(place, mutation.tests)
        sound[mutation.tests] = "" if status == 0 else f"without it: {said}"
    if sound[mutation.tests]:
        return Result(mutation, ERROR, sound[mutation.tests], time.monotonic() - started)
    path.write_text(whole.replace(mutation.old, mutation.new))
    os.utime(path, (was.st_atime, was.st_mtime + 1 + time.time() % 1e6))  # by which Python tells compiled files apart
    status, said = run(place, mutation.tests)
    path.write_text(whole)
    os.utime(path, (was.st_atime, was.st_mtime))
    verdict = {0: SURVIVED, 1: CAUGHT, None: CAUGHT}.get(status, ERROR)  # others: no test was run, or it is no Python
    return Result(mutation, verdict, said, time.monotonic() - started)


def run(place: Path, tests: tuple[str, ...]) -> tuple[int | None, str]:
    """The status of pytest, None where it does not end, and the test that failed, or else the last thing that was said."""
    started, log, status = time.monotonic(), place.with_suffix(".log"), None
    child = os.fork()
    if not child:
        _test(place, tests, log)
    while status is None and time.monotonic() - started < SECONDS:
        time.sleep(0.05)
        done, found = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(found) if done else None
    with suppress(ProcessLookupError):  # ranks that it left
        os.killpg(child, signal.SIGKILL)
    said = log.read_text(errors="replace")
    failed = re.search(r"^(?:FAILED|ERROR) \S+?::(.+?)(?: - .*)?$", said, flags=re.MULTILINE)
    return status, failed[1] if failed else (said.strip().splitlines() or ["nothing was said"])[-1]


def _test(place: Path, tests: tuple[str, ...], log: Path) -> NoReturn:
    """In a process of its own: run tests in `place`, and leave with the status of pytest."""
    os.setsid()
    into = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
    os.dup2(into, 1)
    os.dup2(into, 2)
    os.chdir(place)
    os.environ["PYTHONPATH"] = str(place)
    sys.path[:] = [
        str(place),
        *(entry for entry in sys.path if entry and Path(entry).resolve() not in (ROOT, ROOT / "tests")),
    ]
    status = pytest.main(["-x", "-q", "-rfE", "-p", "no:cacheprovider", "-W", "ignore", "-m", MARKS, *tests])
    sys.stdout.flush()
    os._exit(status)


def in_turn(share: list[Mutation], found: object) -> None:
    """One after the other, in a copy of their own; what became of each is put into the queue `found`."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / ROOT.name
        shutil.copytree(ROOT, place, ignore=LEFT_OUT)
        (place / "tests" / "golden").symlink_to(ROOT / "tests" / "golden")  # large, and only read
        sound: dict[tuple[str, ...], str] = {}
        for mutation in share:
            found.put(tried(mutation, place, sound))


def main() -> int:
    parser = argparse.ArgumentParser(description="Break the code in one place at a time, and see whether tests notice.")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="mutations whose first line has one")
    parser.add_argument("--jobs", type=int, default=1, help="how many are tried at a time (default: 1)")
    asked = parser.parse_args()
    chosen = [one for one in mutations() if any(word in one.title for word in asked.only)]
    for name in FOREIGN:
        import_module(name)
    assert "megatron_export" not in sys.modules
    context, counts = get_context("fork"), Counter()
    found = context.SimpleQueue()
    for first in range(asked.jobs):
        context.Process(
            target=in_turn, args=(chosen[first :: asked.jobs], found)
        ).start()  # no daemon, which may have no ranks
    print("| | mutation | by | s |\n|---|---|---|---|", flush=True)
    for _ in chosen:
        result = found.get()
        counts[result.verdict] += 1
        print(result.row, flush=True)
    print("\n" + ", ".join(f"{counts[verdict]} {verdict}" for verdict in (CAUGHT, SURVIVED, ERROR)))
    return int(not chosen or counts[CAUGHT] < len(chosen))


if __name__ == "__main__":
    raise SystemExit(main())
