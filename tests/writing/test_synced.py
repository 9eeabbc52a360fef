"""What a machine that fails leaves: a file is on disk before the folder that names it, both before the journal that counts on them,
and all of it before the folder gets its name. The calls of the system are recorded here, in their order.
"""

import json
import os
import threading
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from megatron_export.planning.contents import contents_of
from megatron_export.planning.plan import Plan
from megatron_export.writing import file_systems
from megatron_export.writing.staging import Guest, Staging
from megatron_export.writing.writer import CheckpointWriter, complete

from ..support.models import EXAMPLE, read_json
from ..support.plans import plan_of
from .test_writer import IDENTITY, content, exporting

CONFIG = read_json(EXAMPLE / "config.json")
PARTIAL, JOURNAL = ".out.partial", ".out.journal"


class Call(NamedTuple):
    """write, sync or rename; paths begin at the folder that holds the target, which is `.`."""

    what: str
    path: str
    to: str = ""


class Record:
    """Every such call since it was made, and what a file held when it was synced, by the number of the call."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place, self.noting = place, threading.Lock()
        self.calls: list[Call] = []
        self.held: dict[int, bytes] = {}
        kinds = {"fsync": self._synced, "rename": self._renamed, "replace": self._renamed, "pwrite": self._written}
        for name, noted in kinds.items():
            monkeypatch.setattr(os, name, partial(noted, getattr(os, name)))
        monkeypatch.setattr(file_systems, "_swapped", partial(self._renamed, file_systems._swapped))

    def _note(self, what: str, *paths: Path, held: bytes = b"") -> None:
        with self.noting:
            self.held[len(self.calls)] = held
            self.calls.append(Call(what, *(str(Path(path).relative_to(self.place)) for path in paths)))

    def _synced(self, real: Any, descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        real(descriptor)
        self._note("sync", path, held=path.read_bytes() if path.is_file() else b"")

    def _renamed(self, real: Any, one: Path, other: Path) -> Any:
        done = real(one, other)
        if done is not False:  # of a file system that cannot exchange
            self._note("rename", one, other)
        return done

    def _written(self, real: Any, descriptor: int, *given: Any) -> int:
        count = real(descriptor, *given)
        self._note("write", Path(f"/proc/self/fd/{descriptor}").readlink())
        return count

    def after(self, start: int, *call: str) -> int:
        """The number of the first such call after number `start`."""
        return self.calls.index(Call(*call), start + 1)

    def last(self, *call: str) -> int:
        """The number of the last such call."""
        return len(self.calls) - 1 - self.calls[::-1].index(Call(*call))

    def noted(self, number: int) -> set[str]:
        """The files that a journal counted as complete when it was synced by that call."""
        lines = [json.loads(line.partition(b" ")[2]) for line in self.held[number].splitlines()]
        return {said["file"] for said in lines if "file" in said}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of(CONFIG, format="nvfp4", max_shard_size=1_000_000)


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Record:
    return Record(tmp_path, monkeypatch)


def assert_in_order(record: Record, files: set[str], journal: str) -> None:
    """Each file: its last byte, then itself on disk, then its name, then the line of a journal that says so."""
    syncs = [number for number, call in enumerate(record.calls) if call == Call("sync", journal)]
    lines = {number: record.noted(number) for number in syncs}
    assert set().union(*lines.values()) == files
    for file in files:
        written = record.last("write", f"{PARTIAL}/{file}")
        synced = record.after(written, "sync", f"{PARTIAL}/{file}")
        named = record.after(synced, "sync", PARTIAL)
        assert named < min(number for number, noted in lines.items() if file in noted)


def test_a_journal_counts_on_a_file_when_it_and_its_name_are_on_disk(
    plan: Plan, record: Record, tmp_path: Path
) -> None:
    with exporting(tmp_path / "out", plan) as writer:
        writer.write(content(plan))
        writer.flush()
    assert len(plan.files) > 3
    assert_in_order(record, set(plan.files), f"{JOURNAL}/journal.jsonl")


def test_so_does_the_journal_of_another_rank_that_writes(plan: Plan, record: Record, tmp_path: Path) -> None:
    target = tmp_path / "out"
    with (
        Staging(target, IDENTITY, overwrite=False, resume=False),
        CheckpointWriter(plan, Guest(target, 3, {})) as writer,
    ):
        writer.write(content(plan))
        writer.flush()
    assert_in_order(record, set(plan.files), f"{JOURNAL}/journal-3.jsonl")


def test_an_export_begins_with_a_journal_that_is_on_disk(plan: Plan, record: Record, tmp_path: Path) -> None:
    with exporting(tmp_path / "out", plan) as writer:
        writer.staging.keep({"a": torch.ones(1)})
        begun = list(record.calls)
    assert begun == [
        Call("sync", f"{JOURNAL}/new"),
        Call("rename", f"{JOURNAL}/new", f"{JOURNAL}/journal.jsonl"),
        Call("sync", PARTIAL),
        Call("sync", JOURNAL),
        Call("sync", "."),
        Call("sync", f"{JOURNAL}/statistics.safetensors"),
        Call("sync", JOURNAL),
    ]
    assert json.loads(record.held[0].partition(b" ")[2])["kind"] == "megatron_export journal 2"


@pytest.mark.parametrize("way", ["new", "exchanged", "in three steps"])
def test_the_folder_gets_its_name_when_all_in_it_is_on_disk_and_then_the_name_is(
    way: str, plan: Plan, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    renames = [Call("rename", PARTIAL, "out")]
    if way != "new":
        target.mkdir()
        (target / "old").touch()
    if way == "in three steps":
        monkeypatch.setattr(file_systems, "_swapped", lambda one, other: False)
        renames = [Call("rename", "out", ".out.old"), *renames, Call("rename", ".out.old", PARTIAL)]
    with exporting(target, plan, overwrite=way != "new") as writer:
        writer.write(content(plan))
        writer.flush()
        complete(contents_of(plan), writer.staging, [EXAMPLE / "tokenizer.json"])
        record.calls.clear()
        writer.staging.publish()
        published = list(record.calls)
    files = [path.name for path in target.iterdir()]
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json", *plan.files} <= set(files)
    synced, after = published[: len(files)], published[len(files) :]
    assert set(synced) == {Call("sync", f"{PARTIAL}/{name}") for name in files}
    assert after == [Call("sync", PARTIAL), *renames, Call("sync", ".")]


def test_without_fsync_nothing_is_waited_for(plan: Plan, record: Record, tmp_path: Path) -> None:
    staging = Staging(tmp_path / "out", IDENTITY, overwrite=False, resume=False, sync=False)
    with staging, CheckpointWriter(plan, staging) as writer:
        staging.keep({"a": torch.ones(1)})
        writer.write(content(plan))
        writer.flush()
        staging.publish()
    assert (tmp_path / "out").is_dir()
    assert {call.what for call in record.calls} == {"write", "rename"}
