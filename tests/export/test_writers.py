"""Who writes is not seen in what is written: rank 0 alone, a rank of every node, or all; and bytes travel once, to their writer."""

from pathlib import Path
from unittest import mock

import pytest

from megatron_export import export_hf_checkpoint
from megatron_export.distributed import collectives
from megatron_export.writing.journal import kept

from ..support.faults import Fault, export_with, flags_of
from ..support.live import loaded
from ..support.models import assert_same, contents, tensors
from ..support.ranks import Ranks

pytestmark = pytest.mark.whole

CASES = [  # model, format, ranks, sizes, nodes
    ("llama31", "fp8_pb", 4, {"tp": 2, "pp": 2}, (0, 0, 1, 1)),
    ("llama31", "bf16", 4, {"tp": 4}, (0, 0, 1, 1)),
    ("llama31", "bf16", 4, {"tp": 2}, (0, 0, 1, 1)),  # the second node holds replicas, and writes nothing
    ("qwen3_moe", "bf16", 4, {"tp": 2, "etp": 1, "ep": 2, "pp": 2}, (0, 1, 2, 2)),
    ("mixtral", "fp8_pb", 4, {"ep": 4}, (0, 0, 1, 1)),
    ("llama4_vision", "bf16", 2, {"ep": 2}, (0, 1)),
]


def written(source: Path, out: Path, form: str, sizes: dict, nodes: tuple[int, ...], mode: str) -> tuple:
    """In a rank: bytes sent, files by writer, and what of the checkpoint this rank holds and another writes, in bytes."""
    with loaded(source, length=1, **sizes) as (model, here):
        rank = here.rank
        with mock.patch.object(collectives, "nodes", lambda here: nodes):
            report = export_hf_checkpoint(
                model, out, hf_model=source, format=form, max_shard_size="60KB", writers=mode, sync=False
            )
    foreign = moved = 0
    for bucket in report.plan.buckets:
        for item in bucket.items:
            for index, holder in enumerate(item.ranks):
                foreign += sum(o.nbytes for o in item.message(index)) if rank == holder != bucket.writer else 0
                if item.gather_first and index and rank == holder:
                    moved += sum(o.nbytes for o in item.raw_message(index))
    return report.wire, report.plan.writers, foreign, moved


@pytest.mark.parametrize(("name", "form", "world", "sizes", "nodes"), CASES, ids=str)
def test_other_writers_write_the_same_files(
    name: str, form: str, world: int, sizes: dict, nodes: tuple, ranks: Ranks, models: dict, tmp_path: Path
) -> None:
    source = models[name]
    for mode in ("rank0", "node", "all"):
        found = ranks.call(world, written, source, tmp_path / mode, form, sizes, nodes, mode)
        wire, writers = found[0][:2]
        assert contents(tmp_path / mode) == contents(tmp_path / "rank0")
        assert len(writers) > 4
        holders = {"rank0": {0}, "node": {nodes.index(node) for node in nodes}, "all": set(range(world))}[mode]
        assert set(writers.values()) <= holders
        if mode != "rank0" and sizes != {"tp": 2}:
            assert set(writers.values()) == holders
        for rank, (_, _, foreign, moved) in enumerate(found):
            assert foreign + moved <= wire[rank] <= 1.02 * (foreign + moved) + 16 * 200  # padded to 16 bytes, a tensor
    assert_same(tensors(tmp_path / "all"), tensors(source)) if form == "bf16" else None


@pytest.fixture(scope="module")
def flags(models: dict) -> tuple:
    return flags_of(models)


@pytest.mark.parametrize("fault", [Fault("kill", "last bucket", (1,)), Fault("raise", "last bucket", (0,)),
                                   Fault("kill", "verify", (1,)), Fault("SIGTERM", "last bucket", (0, 1))], ids=str)  # fmt: skip
def test_what_several_writers_have_completed_goes_on_with_one(fault: Fault, flags: tuple, tmp_path: Path) -> None:
    statuses, said, _ = export_with(None, tmp_path, *flags, "--output", tmp_path / "whole")
    assert statuses == [0, 0], said
    statuses, said, _ = export_with(fault, tmp_path, *flags, "--output", tmp_path / "out", "--writers", "all")
    assert 0 not in statuses, said
    assert not (tmp_path / "out").exists()
    complete = kept(tmp_path / "out")
    assert complete > 0
    assert fault.action == "kill" or (tmp_path / ".out.journal" / "journal-1.jsonl").exists()
    statuses, said, _ = export_with(None, tmp_path, *flags, "--output", tmp_path / "out", "--resume")
    assert statuses == [0, 0], said
    assert f"{complete} of 5 files were complete already" in said
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "said.log", "whole"]


def elsewhere(source: Path, out: Path) -> None:
    """In a rank: rank 1 looks for the folder on a disk of its own."""
    with loaded(source, 2) as (model, here):
        target = out if here.first else out.parent / "other" / out.name
        export_hf_checkpoint(model, target, hf_model=source, format="bf16", max_shard_size="60KB", writers="all")


def test_a_writer_that_does_not_see_the_folder_is_told_on_all_ranks(ranks: Ranks, models: dict, tmp_path: Path) -> None:
    with pytest.raises(
        AssertionError, match="rank 1 failed to try to write: .*which rank 0 has made, is not there on rank 1"
    ):
        ranks.call(2, elsewhere, models["llama31"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
