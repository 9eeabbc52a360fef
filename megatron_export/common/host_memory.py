"""How much memory of this host a process may still take."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# Of a cgroup: its mount point, the files with its limit and its use, and the word in memory.stat for what it can give back.
_V1 = ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def available(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: what the system has left, or its cgroups (a container, a SLURM job) if that is less.

    Source: proc(5), cgroups(7); Linux's Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst.
    """
    return min([_words(root / "proc/meminfo")["MemAvailable:"] * 1024, *_left_by_cgroups(root)])


def _left_by_cgroups(root: Path) -> Iterator[int]:
    with suppress(FileNotFoundError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(",") or not controllers:
                mounted, *files = _V1 if controllers else _V2
                inner = Path(path.lstrip("/"))
                for folder in (inner, *inner.parents):
                    yield from _left(root / mounted / folder, *files)


def _left(folder: Path, limit: str, used: str, given_back: str) -> Iterator[int]:
    """Bytes that one cgroup has left; none if it has no limit, or cannot be seen from here."""
    with suppress(FileNotFoundError, ValueError):  # int("max")
        most = int((folder / limit).read_text())
        yield most - int((folder / used).read_text()) + _words(folder / "memory.stat").get(given_back, 0)


def _words(file: Path) -> dict[str, int]:
    """First word of each line -> the number after it."""
    return {line.split()[0]: int(line.split()[1]) for line in file.read_text().splitlines()}
