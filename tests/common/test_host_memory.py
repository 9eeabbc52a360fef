"""What a process may still take of memory, in systems that are folders."""

from pathlib import Path

import pytest

from megatron_export.common.host_memory import available

GB = 1 << 30
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A system with 64 GB left."""
    write(tmp_path / "proc/meminfo", f"MemTotal: {128 << 20} kB\nMemFree: 1000 kB\nMemAvailable: {64 << 20} kB\n")
    return tmp_path


def limited(folder: Path, names: tuple[str, str, str], most: int | str, used: int, cached: int) -> None:
    """A cgroup in a folder."""
    limit, usage, word = names
    write(folder / limit, f"{most}\n")
    write(folder / usage, f"{used}\n")
    write(folder / "memory.stat", f"anon 5\n{word} {cached}\n")


def test_without_cgroups_it_is_what_the_system_has_left(root: Path) -> None:
    assert available(root) == 64 * GB
    write(root / "proc/self/cgroup", "0::/\n")
    assert available(root) == 64 * GB


@pytest.mark.parametrize(("line", "mounted", "names"), [("0::", "", V2), ("4:cpu,memory:", "memory", V1)])
def test_the_tightest_of_its_cgroups_decides(line: str, mounted: str, names: tuple, root: Path) -> None:
    write(root / "proc/self/cgroup", f"3:cpuset:/elsewhere\n{line}/slurm/job_1\n")
    groups = root / "sys/fs/cgroup" / mounted
    limited(groups / "slurm/job_1", names, "max" if names is V2 else 1 << 62, 30 * GB, 0)
    assert available(root) == 64 * GB
    limited(groups / "slurm", names, 40 * GB, 30 * GB, 2 * GB)
    assert available(root) == 12 * GB
    limited(groups, names, 20 * GB, 15 * GB, 0)
    assert available(root) == 5 * GB


def test_a_container_sees_its_own_cgroup_as_the_root(root: Path) -> None:
    write(root / "proc/self/cgroup", "4:memory:/docker/abc\n")
    limited(root / "sys/fs/cgroup/memory", V1, 8 * GB, 3 * GB, GB)
    assert available(root) == 6 * GB
