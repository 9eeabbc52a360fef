"""Whatever goes wrong, wherever: the target is as before or complete, every rank leaves within seconds with one message, and
--resume ends with the bytes of an uninterrupted run.
"""

import os
import re
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ..support.faults import AT_WRITER, POINTS, Fault, export_with, flags_of
from ..support.models import contents

pytestmark = pytest.mark.whole

EVERYWHERE = [point for point in POINTS if point not in AT_WRITER]
AT_A_TENSOR = ("last bucket", "send")  # where others have been said before
BOTH = (0, 1)
FAULTS = [
    *(Fault("kill", point, (rank,)) for point in EVERYWHERE for rank in BOTH),
    *(Fault("kill", point, (0,)) for point in AT_WRITER),
    *(Fault("kill", point, BOTH) for point in ("calibrate", "last bucket")),
    *(Fault("raise", point, (rank,)) for rank, point in zip((0, 1) * 3, EVERYWHERE, strict=True)),
    *(Fault("raise", point, (0,)) for point in AT_WRITER if point not in ("published", "tidied")),
    *(Fault("no room", point, (0,)) for point in ("first file", "rename")),
    Fault("small files", "load", (0,)),
    *(Fault("SIGTERM", point, BOTH) for point in EVERYWHERE),
    *(Fault("SIGUSR1", point, BOTH) for point in ("calibrate", "last bucket")),
    *(Fault("SIGTERM", point, (0,)) for point in ("verify", "publish")),
    Fault("SIGTERM", "load", (1,)),
]
MORE = [  # the same at other points
    *(Fault("raise", point, (rank,)) for rank, point in zip((1, 0) * 3, EVERYWHERE, strict=True)),
    *(Fault("no room", point, (0,)) for point in ("last file", "publish")),
    Fault("small files", "last bucket", (0,)),
    *(Fault("SIGUSR1", point, BOTH) for point in EVERYWHERE if point not in ("calibrate", "last bucket")),
    *(Fault("SIGTERM", point, (0,)) for point in ("load", "first bucket", "send", "first file", "last file", "rename")),
]
OVER_AN_OLD_ONE = [
    *(Fault("kill", point, (0,)) for point in AT_WRITER),
    *(Fault("raise", point, (0,)) for point in ("first file", "verify", "rename")),
    Fault("no room", "rename", (0,)),
    Fault("SIGTERM", "verify", BOTH),
]
FROZEN_AT = {"load": 1, "calibrate": 0, "last bucket": 1, "verify": 0}
FROZEN = [Fault("freeze", point, (rank,)) for point, rank in FROZEN_AT.items()]
SLOW_AT = {"load": 1, "calibrate": 0, "first bucket": 1, "publish": 0}
SLOW = [Fault("slow", point, (rank,)) for point, rank in SLOW_AT.items()]


@pytest.fixture(scope="module")
def flags(models: dict) -> tuple:
    return flags_of(models)


@pytest.fixture(scope="module")
def whole(flags: tuple, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What an uninterrupted run writes."""
    folder = tmp_path_factory.mktemp("whole")
    statuses, said, _ = export_with(None, folder, *flags, "--output", folder / "out")
    assert statuses == [0, 0], said
    return contents(folder / "out")


@pytest.mark.parametrize(
    ("fault", "old"),
    [
        *((fault, False) for fault in FAULTS),
        *((fault, True) for fault in OVER_AN_OLD_ONE),
        *(pytest.param(fault, False, marks=pytest.mark.slow) for fault in MORE),
    ],
    ids=lambda value: {True: "over_an_old_one", False: ""}.get(value, str(value)),
)
def test_a_fault_leaves_the_target_as_before_or_complete_and_resume_finishes(
    fault: Fault, old: bool, flags: tuple, whole: dict, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    if old:
        target.mkdir()
        (target / "precious").write_text("an older checkpoint")
        flags = (*flags, "--overwrite")
    statuses, said, seconds = export_with(fault, tmp_path, *flags, "--output", target)
    complete = target.exists() and not (target / "precious").exists()
    assert target.exists() or not old
    assert contents(target) == whole if complete else not old or [p.name for p in target.iterdir()] == ["precious"]
    assert "Traceback" not in said
    if not complete or fault.action == "kill":
        assert 0 not in statuses, said
    for rank, status in enumerate(statuses):
        if fault.action.startswith("SIG"):
            assert status == (0 if complete else 75), said
        elif not complete and not (fault.action == "kill" and rank in fault.ranks):
            assert status == 1, said
    assert seconds < 12
    if fault.action == "kill" and len(fault.ranks) == 1 and not complete:
        assert f"rank {fault.ranks[0]} is gone" in said, said
        assert fault.point not in AT_A_TENSOR or re.search(r"It was at: .*, at (decoder|embedding|output)", said), said
    if fault.action == "raise":
        assert said.count("injected") == 1, said
    statuses, said, _ = export_with(None, tmp_path, *flags, "--output", target, "--resume")
    assert statuses == [0, 0], said
    assert contents(target) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "said.log"]


@pytest.mark.parametrize("fault", SLOW, ids=str)
def test_a_slow_rank_is_waited_for(fault: Fault, flags: tuple, whole: dict, tmp_path: Path) -> None:
    statuses, said, _ = export_with(fault, tmp_path, *flags, "--output", tmp_path / "out", "--timeout", 2)
    assert statuses == [0, 0], said
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("fault", FROZEN, ids=str)
def test_a_rank_that_says_nothing_more_is_missed(fault: Fault, flags: tuple, tmp_path: Path) -> None:
    statuses, said, _ = export_with(fault, tmp_path, *flags, "--output", tmp_path / "out", "--timeout", 3)
    [frozen] = fault.ranks
    assert statuses[1 - frozen] == 1, said
    assert f"rank {frozen} is gone" in said and said.count("error: ") == 1, said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("output", ["/proc/out", "/sys/out"])
def test_a_target_that_nobody_can_write_is_told_on_every_rank(output: str, flags: tuple, tmp_path: Path) -> None:
    statuses, said, seconds = export_with(None, tmp_path, *flags, "--output", output)
    assert statuses == [1, 1]
    assert said.count("error: ") == 1 and output in said and "--output" in said, said
    assert seconds < 12


def test_of_two_exports_into_one_target_at_once_one_is_refused_or_finds_it_taken(
    flags: tuple, whole: dict, tmp_path: Path
) -> None:
    slow = Fault("slow", "last bucket", (0,))
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(export_with, slow, folder, *flags, "--output", tmp_path / "out") for folder in folders]
        ends = sorted(run.result()[:2] for run in runs)
    assert [statuses for statuses, _ in ends] == [[0, 0], [1, 1]]
    assert "is running" in ends[1][1] or "is not empty" in ends[1][1]
    assert contents(tmp_path / "out") == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other", "out"]


def vanish(source: Path) -> None:
    """What was copied from it cannot be copied again."""
    (source / "tokenizer_config.json").unlink()


def change(source: Path) -> None:
    (source / "tokenizer_config.json").write_text('{"other": 1}')


def rewrite(source: Path) -> None:
    """By another with the same bytes, as a second download makes it."""
    file = source / "model.safetensors"
    shutil.copyfile(file, source / "new")
    (source / "new").rename(file)


def shorten(source: Path) -> None:
    """What is mapped and not there any more kills who reads it."""
    os.truncate(source / "model.safetensors", 50_000)


@pytest.mark.parametrize(
    ("how", "point"),
    [
        (shorten, "load"),
        (vanish, "first bucket"),
        (change, "calibrate"),
        (rewrite, "load"),
        (change, "verify"),
        (change, "publish"),
        (rewrite, "first bucket"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_source_that_changes_under_way_is_noticed(
    how: Callable, point: str, flags: tuple, models: dict, tmp_path: Path
) -> None:
    source = tmp_path / "model"
    shutil.copytree(models["llama31"], source)
    flags = tuple(source if flag == models["llama31"] else flag for flag in flags)
    fault = Fault(how.__name__, point, (0,), (how, source))
    statuses, said, _ = export_with(fault, tmp_path, *flags, "--output", tmp_path / "out")
    if how is shorten and -signal.SIGBUS in statuses:  # it was mapped, and cut off between the check and the read
        assert "is gone" in said or statuses == [-signal.SIGBUS] * 2, said
        assert set(statuses) <= {1, -signal.SIGBUS} and not (tmp_path / "out").exists(), statuses
        return
    assert statuses == ([0, 0] if point == "publish" else [1, 1]), said
    assert (tmp_path / "out").exists() == (point == "publish")
    assert point == "publish" or "changed while it was" in said and "Start again when nobody writes there" in said


def test_at_least_sixty_faults_are_tried(tell: Callable[[str], None]) -> None:
    count = len(FAULTS) + len(OVER_AN_OLD_ONE) + len(SLOW) + len(FROZEN) + 7 + 2 + 1
    tell(f"{count} faults tried ({len(MORE)} more with -m slow); all that are not reported as failures were survived")
    assert count >= 60
