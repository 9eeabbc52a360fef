"""A disk of its own that gets full under way: a small tmpfs, mounted for the test.

Mounting takes the right to: root has it, others get it in a namespace of their own, in which the same test runs once more. Where
the machine grants neither, files may not grow beyond a limit instead, which the test says.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from ..support.faults import Fault, export_with, flags_of
from ..support.models import contents

pytestmark = pytest.mark.whole

ALONE = "unshare", "--user", "--map-root-user", "--mount"
MIB = 1 << 20


@contextmanager
def disk(place: Path, nbytes: int) -> Iterator[Path]:
    """A file system of so many bytes."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", place], check=True, capture_output=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


@contextmanager
def made(place: Path) -> Iterator[Path]:
    """A folder in place of one."""
    place.mkdir()
    yield place


def mounts(place: Path) -> bool:
    """Whether this process may mount."""
    try:
        with disk(place, MIB):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def fill(given: tuple[Path, int]) -> None:
    """Another program takes all the room of a disk but so many bytes."""
    place, left = given
    with (place / "filler").open("wb") as file:
        while (room := shutil.disk_usage(place).free - left) > 0:
            with suppress(OSError):  # the export took some of it in this moment
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), room)


def flags(models: dict, target: Path) -> tuple:
    return (*flags_of(models), "--output", target)


@pytest.fixture(scope="module")
def whole(models: dict, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What is written where there is room."""
    folder = tmp_path_factory.mktemp("whole")
    statuses, said, _ = export_with(None, folder, *flags(models, folder / "out"))
    assert statuses == [0, 0], said
    return contents(folder / "out")


def means(test: pytest.FixtureRequest, place: Path) -> str:
    """Where a disk can be had: "here"; "there", in a namespace of its own, where the test has passed now; "nowhere"."""
    if mounts(place):
        return "here"
    if subprocess.run([*ALONE, "true"], capture_output=True).returncode:
        return "nowhere"
    line = [*ALONE, sys.executable, "-m", "pytest", "-q", test.node.nodeid]
    done = subprocess.run(line, cwd=test.config.rootpath, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return "there"


@pytest.mark.parametrize(
    ("point", "left", "old"),
    [
        ("load", 0, False),  # seen before anything is written
        ("first bucket", 130_000, True),  # for two of five files
        ("first file", 0, False),  # when it is noted in the journal
        ("last file", 8_192, True),  # when the files around the weights are written
        ("verify", 0, False),  # when the manifest is
    ],
)
def test_a_disk_that_gets_full_is_told_and_resume_finishes_when_there_is_room(
    point: str,
    left: int,
    old: bool,
    models: dict,
    whole: dict,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    tell: Callable[[str], None],
) -> None:
    how, place = means(request, tmp_path / "tried"), tmp_path / "disk"
    if how == "there":
        return
    fault = Fault("full disk", point, (0,), (fill, (place, left)))
    if how == "nowhere":
        fault = Fault("small files", "first bucket", (0,))
        tell("nothing can be mounted here: a limit on the size of files stands in for a full disk")
    with disk(place, 80 * MIB) if how == "here" else made(place):
        given = (*flags(models, place / "out"), *(["--overwrite"] if old else []))
        if old:
            (place / "out").mkdir()
            (place / "out" / "precious").write_text("an older checkpoint")
        statuses, said, _ = export_with(fault, tmp_path, *given)
        assert statuses == [1, 1], said
        assert said.count("error: ") == 1 and "Make room" in said and "Traceback" not in said, said
        assert f"{place / 'out'}" in said
        assert [path.name for path in place.glob("out/*")] == (["precious"] if old else [])
        (place / "filler").unlink(missing_ok=True)
        statuses, said, _ = export_with(None, tmp_path, *given, "--resume")
        assert statuses == [0, 0], said
        assert contents(place / "out") == whole
        assert [path.name for path in place.iterdir()] == ["out"]


def test_a_disk_that_is_too_small_is_refused_before_anything_is_done(
    models: dict, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """And so is a target that is a disk itself, which no rename can replace."""
    if means(request, tmp_path / "tried") != "here":
        return
    with disk(tmp_path / "disk", MIB // 4) as place:
        for target, message in (
            (place / "out", "its disk has 262,144 free. Make room for"),
            (place, "is a mount point"),
        ):
            statuses, said, _ = export_with(None, tmp_path, *flags(models, target))
            assert statuses == [1, 1]
            assert message in said, said
            assert list(place.iterdir()) == []


def test_a_target_behind_a_link_to_another_disk_is_replaced_there(
    models: dict, whole: dict, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Whether the link is the target or what it is in; staging folder and target are on one disk, and the link stays."""
    if means(request, tmp_path / "tried") != "here":
        return
    with disk(tmp_path / "disk", 80 * MIB) as place:
        (place / "out").mkdir()
        (place / "out" / "old").touch()
        (tmp_path / "link").symlink_to(place)
        (tmp_path / "out").symlink_to(place / "out")
        for target in (tmp_path / "link" / "out", tmp_path / "out"):
            statuses, said, _ = export_with(None, tmp_path, *flags(models, target), "--overwrite")
            assert statuses == [0, 0], said
            assert contents(target) == whole
            assert [path.name for path in place.iterdir()] == ["out"]
        assert (tmp_path / "link").is_symlink() and (tmp_path / "out").is_symlink()
