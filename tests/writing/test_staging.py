"""The staging folder: who may use it, what an interrupted export leaves, and when that can go on."""

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.process import BaseProcess as Process
from pathlib import Path

import pytest
import torch

from megatron_export.common.errors import ExportError
from megatron_export.planning.plan import Plan
from megatron_export.writing import file_systems
from megatron_export.writing.file_systems import exchange
from megatron_export.writing.journal import JOURNAL, journal_of, kept, kept_statistics, line_of, old_of, partial_of
from megatron_export.writing.staging import Staging, tidy

from ..support.models import EXAMPLE, assert_same, read_json, tensors
from ..support.plans import plan_of
from .test_writer import IDENTITY, content, export, exporting, publish

CONFIG = read_json(EXAMPLE / "config.json")


@pytest.fixture
def plan() -> Plan:
    return plan_of(CONFIG, format="nvfp4", max_shard_size=1_000_000)


def interrupted(target: Path, plan: Plan, files: int, **options: bool) -> None:
    """An export that failed with so many files complete and one begun."""
    names = list(plan.files)
    wanted = {output.name for file in names[:files] for output in plan.files[file]}
    begun = {output.name for output in plan.files[names[files]][1:]}
    with pytest.raises(OSError, match="no more"), exporting(target, plan, **options) as writer:
        writer.staging.keep({"a": torch.arange(3)})
        writer.write((o, t) for o, t in content(plan) if o.name in wanted | begun)
        raise OSError("no more")


def test_an_interrupted_export_goes_on_where_it_was_and_ends_with_the_same_bytes(plan: Plan, tmp_path: Path) -> None:
    export(tmp_path / "whole", plan)
    interrupted(tmp_path / "out", plan, 2)
    assert kept(tmp_path / "out") == 2
    assert kept_statistics(tmp_path / "out")["a"].tolist() == [0, 1, 2]
    with exporting(tmp_path / "out", plan, resume=True) as writer:
        assert len(writer.staging.finished) == 2
        left = [(output, tensor) for output, tensor in content(plan) if writer.wants(output)]
        assert 0 < len(left) < len(content(plan))
        writer.write(left)
        publish(writer)
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "whole"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_without_resume_it_starts_anew(plan: Plan, tmp_path: Path) -> None:
    interrupted(tmp_path / "out", plan, 2)
    with exporting(tmp_path / "out", plan) as writer:
        assert not writer.staging.finished
        assert kept_statistics(tmp_path / "out") is None
        writer.write(content(plan))
        publish(writer)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_without_a_complete_file_leaves_nothing(plan: Plan, tmp_path: Path) -> None:
    interrupted(tmp_path / "out", plan, 0)
    assert list(tmp_path.iterdir()) == []


def test_another_model_or_other_settings_are_refused_and_what_is_there_stays(plan: Plan, tmp_path: Path) -> None:
    interrupted(tmp_path / "out", plan, 2)
    other = Staging(tmp_path / "out", IDENTITY | {"model": "c"}, overwrite=False, resume=True)
    with pytest.raises(ExportError, match="another model: it cannot be continued.*leave --resume out"), other:
        pass
    assert kept(tmp_path / "out") == 2


def test_a_journal_whose_last_line_was_cut_off_counts_without_it(plan: Plan, tmp_path: Path) -> None:
    interrupted(tmp_path / "out", plan, 2)
    journal = journal_of(tmp_path / "out") / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-5])
    assert kept(tmp_path / "out") == 1
    interrupted(tmp_path / "out", plan, 3, resume=True)  # what follows is not added to half a line
    assert kept(tmp_path / "out") == 3


def test_a_damaged_line_of_a_journal_counts_for_nothing_and_the_others_count(plan: Plan, tmp_path: Path) -> None:
    interrupted(tmp_path / "out", plan, 3)
    journal = journal_of(tmp_path / "out") / JOURNAL
    lines = journal.read_bytes().split(b"\n")
    lines[2] = lines[2].replace(b"1", b"2", 1)
    journal.write_bytes(b"\n".join(lines))
    assert kept(tmp_path / "out") == 2
    lines[0] = lines[0].replace(b"settings", b"sittings")
    journal.write_bytes(b"\n".join(lines))
    assert kept(tmp_path / "out") == 0


@pytest.mark.parametrize("damage", [b"", b"\x00\xff", b"[]\n", b'{"kind": "another"}\n', b'{"kind": 3}\n{}\n'])
def test_a_journal_that_is_none_counts_for_nothing(damage: bytes, plan: Plan, tmp_path: Path) -> None:
    interrupted(tmp_path / "out", plan, 2)
    (journal_of(tmp_path / "out") / "journal.jsonl").write_bytes(damage)
    assert kept(tmp_path / "out") == 0
    with exporting(tmp_path / "out", plan, resume=True) as writer:
        assert not writer.staging.finished


def test_a_journal_cannot_name_a_file_elsewhere(plan: Plan, tmp_path: Path) -> None:
    interrupted(tmp_path / "out", plan, 2)
    (tmp_path / "precious").write_text("mine")
    with (journal_of(tmp_path / "out") / JOURNAL).open("ab") as journal:
        journal.write(line_of({"file": "../precious", "bytes": 4, "tensors": {}}))
    assert kept(tmp_path / "out") == 2


def shorter(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def longer(file: Path) -> None:
    os.truncate(file, file.stat().st_size + 1)


def linked(file: Path) -> None:
    file.rename(file.parents[1] / "elsewhere")
    file.symlink_to(file.parents[1] / "elsewhere")


@pytest.mark.parametrize("damage", [Path.unlink, shorter, longer, linked], ids=lambda damage: damage.__name__)
def test_a_complete_file_that_is_gone_or_has_another_size_now_is_written_again(
    damage: Callable, plan: Plan, tmp_path: Path
) -> None:
    interrupted(tmp_path / "out", plan, 2)
    damage(next(partial_of(tmp_path / "out").glob("*00001-of*")))
    assert kept(tmp_path / "out") == 1
    export(tmp_path / "out", plan, resume=True)
    assert_same(tensors(tmp_path / "out"), {output.name: tensor for output, tensor in content(plan)})


@pytest.mark.parametrize("folder", [partial_of, journal_of, old_of], ids=lambda folder: folder.__name__)
@pytest.mark.parametrize("resume", [False, True])
def test_links_in_the_place_of_its_folders_are_refused(
    folder: Callable, resume: bool, plan: Plan, tmp_path: Path
) -> None:
    """Nothing is written or removed where they lead."""
    interrupted(tmp_path / "out", plan, 2)
    place = folder(tmp_path / "out")
    place.mkdir(exist_ok=True)
    (place / "precious").write_text("mine")
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    held = sorted(path.name for path in (tmp_path / "elsewhere").iterdir())
    with (
        pytest.raises(ExportError, match=f"{place.name} is a symbolic link.*Remove it"),
        exporting(tmp_path / "out", plan, resume=resume),
    ):
        pass
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == held


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_written_to(
    error: int, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(file_systems.fcntl, "flock", refuse)
    export(tmp_path / "out", plan)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@contextmanager
def another(target: Path, plan: Plan) -> Iterator[Process]:
    """Another process, which is in the middle of an export, and goes on when this is left."""
    context = get_context("fork")
    held, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(target, plan, held, done))
    process.start()
    held.wait()
    try:
        yield process
    finally:
        if process.is_alive():  # else nobody answers, and `set` would wait for ever
            done.set()
        process.join()


def hold(target: Path, plan: Plan, held: object, done: object) -> None:
    with exporting(target, plan):
        held.set()
        done.wait()


def test_two_exports_into_one_target_do_not_meet(plan: Plan, tmp_path: Path) -> None:
    running = pytest.raises(ExportError, match="another export into .*out is running")
    with another(tmp_path / "out", plan), running, exporting(tmp_path / "out", plan):
        pass
    export(tmp_path / "out", plan)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_lock_of_a_killed_export_is_free(plan: Plan, tmp_path: Path) -> None:
    with another(tmp_path / "out", plan) as process:
        process.kill()
        process.join()
    export(tmp_path / "out", plan)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("atomic", [True, False])
def test_two_folders_change_names(atomic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not atomic:  # a file system that cannot
        monkeypatch.setattr(file_systems, "_swapped", lambda one, other: False)
    exchange(tmp_path / "one", tmp_path / "other")
    assert {(path.parent.name, path.name) for path in tmp_path.glob("*/*")} == {("one", "other"), ("other", "one")}
    assert len(list(tmp_path.iterdir())) == 2


def killed_at(rename: int, target: Path, plan: Plan) -> None:
    """In a process of its own: an export onto a file system that cannot exchange names dies before one of its renames."""
    real, calls = Path.rename, itertools.count(1)

    def renamed(path: Path, other: Path) -> Path:
        if path.name != "new" and next(calls) == rename:
            os._exit(9)
        return real(path, other)

    file_systems._swapped, Path.rename = (lambda one, other: False), renamed
    export(target, plan, overwrite=True)


@pytest.mark.parametrize(("rename", "published"), [(1, False), (2, False), (3, True)])
@pytest.mark.parametrize("emptied", [False, True])
def test_an_old_folder_survives_a_kill_between_the_renames_that_replace_it(
    rename: int, published: bool, emptied: bool, plan: Plan, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").write_text("an older checkpoint")
    process = get_context("fork").Process(target=killed_at, args=(rename, target, plan))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert target.exists() == (rename != 2)
    if emptied:
        target.mkdir(exist_ok=True)  # as a job's script may do
    if published:
        tidy(target)
        assert_same(tensors(target), {output.name: tensor for output, tensor in content(plan)})
    else:
        if rename == 2:
            with pytest.raises(ExportError, match="is as it was again. Give --overwrite"), exporting(target, plan):
                pass
        assert (target / "precious").read_text() == "an older checkpoint"
        assert kept(target) == len(plan.files)
        with exporting(target, plan, overwrite=True, resume=True) as writer:
            assert not writer.missing
            publish(writer)
    assert not (target / "precious").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_export_left_beside_what_it_published_is_removed(plan: Plan, tmp_path: Path) -> None:
    interrupted(tmp_path / "out", plan, 2)
    partial_of(tmp_path / "out").rename(tmp_path / "out")
    partial_of(tmp_path / "out").mkdir()
    tidy(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    tidy(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
