"""The staging folder: who may use it, what an interrupted export leaves, and when that can go on."""

import json
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from megatron_export import staging
from megatron_export.errors import ExportError
from megatron_export.plan import Plan, assumed, make_plan
from megatron_export.staging import Staging, exchange, kept, kept_statistics

from ..models import EXAMPLE, assert_same, read_json, tensors
from .test_writer import IDENTITY, content, exporting, publish

CONFIG = read_json(EXAMPLE / "config.json")


@pytest.fixture
def plan() -> Plan:
    return make_plan(CONFIG, assumed(CONFIG, 1), format="nvfp4", max_shard_bytes=1_000_000)


def interrupted(target: Path, plan: Plan, files: int) -> None:
    """An export that failed with so many files complete and one begun."""
    names = list(plan.files)
    wanted = {output.name for file in names[:files] for output in plan.files[file]}
    begun = {output.name for output in plan.files[names[files]][1:]}
    with pytest.raises(OSError, match="no more"), exporting(target, plan) as writer:
        writer.staging.keep({"a": torch.arange(3)})
        writer.write((o, t) for o, t in content(plan) if o.name in wanted | begun)
        raise OSError("no more")


def test_an_interrupted_export_goes_on_where_it_was_and_ends_with_the_same_bytes(plan: Plan, tmp_path: Path) -> None:
    with exporting(tmp_path / "whole", plan) as writer:
        writer.write(content(plan))
        publish(writer)
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
    journal = staging.journal_of(tmp_path / "out") / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-5])
    assert kept(tmp_path / "out") == 1


@pytest.mark.parametrize("damage", [b"", b"\x00\xff", b"[]\n", b'{"kind": "another"}\n', b'{"kind": 3}\n{}\n'])
def test_a_journal_that_is_none_counts_for_nothing(damage: bytes, plan: Plan, tmp_path: Path) -> None:
    interrupted(tmp_path / "out", plan, 2)
    (staging.journal_of(tmp_path / "out") / "journal.jsonl").write_bytes(damage)
    assert kept(tmp_path / "out") == 0
    with exporting(tmp_path / "out", plan, resume=True) as writer:
        assert not writer.staging.finished


def test_a_journal_cannot_name_a_file_elsewhere(plan: Plan, tmp_path: Path) -> None:
    interrupted(tmp_path / "out", plan, 2)
    (tmp_path / "precious").write_text("mine")
    with (staging.journal_of(tmp_path / "out") / "journal.jsonl").open("a") as journal:
        journal.write(json.dumps({"file": "../precious", "tensors": {}}) + "\n")
    assert kept(tmp_path / "out") == 2


def test_a_complete_file_that_vanished_is_written_again(plan: Plan, tmp_path: Path) -> None:
    interrupted(tmp_path / "out", plan, 2)
    next(staging.partial_of(tmp_path / "out").glob("*00001-of*")).unlink()
    assert kept(tmp_path / "out") == 1


def hold(target: Path, plan: Plan, held: object, done: object) -> None:
    with exporting(target, plan):
        held.set()
        done.wait()


def test_two_exports_into_one_target_do_not_meet(plan: Plan, tmp_path: Path) -> None:
    context = get_context("fork")
    held, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "out", plan, held, done))
    other.start()
    held.wait()
    try:
        with (
            pytest.raises(ExportError, match="another export into .*out is running"),
            exporting(tmp_path / "out", plan),
        ):
            pass
    finally:
        done.set()
        other.join()
    with exporting(tmp_path / "out", plan) as writer:
        writer.write(content(plan))
        publish(writer)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_lock_of_a_killed_export_is_free(plan: Plan, tmp_path: Path) -> None:
    context = get_context("fork")
    held = context.Event()
    other = context.Process(target=hold, args=(tmp_path / "out", plan, held, context.Event()))
    other.start()
    held.wait()
    other.kill()
    other.join()
    with exporting(tmp_path / "out", plan) as writer:
        writer.write(content(plan))
        publish(writer)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("atomic", [True, False])
def test_two_folders_change_names(atomic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not atomic:  # a file system that cannot
        monkeypatch.setattr(staging, "_swapped", lambda one, other: False)
    exchange(tmp_path / "one", tmp_path / "other")
    assert {(path.parent.name, path.name) for path in tmp_path.glob("*/*")} == {("one", "other"), ("other", "one")}
    assert len(list(tmp_path.iterdir())) == 2
