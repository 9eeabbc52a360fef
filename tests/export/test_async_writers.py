"""Exports in the background that several ranks write: the files of one that is waited for, or an error on every rank."""

import os
import signal
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_export import Handle, export_hf_checkpoint, export_hf_checkpoint_async
from megatron_export.export import async_start

from ..support.live import loaded, refusal
from ..support.models import contents
from ..support.ranks import Ranks
from .test_failures import on_rank, raising

pytestmark = pytest.mark.whole

SIZES = {"tp": 2}  # of four ranks, so that two hold replicas, and write nothing
HOW = {"format": "fp8_pb", "max_shard_size": "60KB", "sync": False}


def begun(source: Path, out: Path, model: object, **more: object) -> Handle:
    return export_hf_checkpoint_async(model, out, hf_model=source, writers="all", **HOW, **more)


def written(source: Path, base: Path) -> tuple[bool, bool]:
    """In a rank: export twice into memory that is kept, beside one that is waited for; whether it wrote, and has no child left."""
    with loaded(source, length=1, **SIZES) as (model, _):
        export_hf_checkpoint(model, base / "waited", hf_model=source, writers="all", **HOW)
        for name in ("first", "second"):
            handle = begun(source, base / name, model, keep_memory=True)
            handle.wait(timeout=100)
            assert handle.done()
            handle.wait(timeout=0)  # it has ended
    return handle.process is not None, handle.process is None or handle.process.returncode is not None


def test_several_writers_write_the_files_of_an_export_that_is_waited_for(
    ranks: Ranks, models: dict, tmp_path: Path
) -> None:
    found = ranks.call(4, written, models["llama31"], tmp_path)
    assert found == [(True, True)] * 2 + [(False, True)] * 2
    waited = contents(tmp_path / "waited")
    assert contents(tmp_path / "first") == waited == contents(tmp_path / "second")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second", "waited"]


def held(source: Path, out: Path) -> tuple[str, bool]:
    """In a rank: what is said while rank 0's process is stopped; whether it goes on afterwards."""
    with loaded(source, length=1, **SIZES) as (model, here):
        handle = begun(source, out, model)
        dist.barrier()
        if here.first:
            os.kill(handle.process.pid, signal.SIGSTOP)
        try:
            handle.wait(timeout=0.2)
            said = ""
        except TimeoutError as error:
            said = str(error)
        early = handle.done()
        if here.first:
            os.kill(handle.process.pid, signal.SIGCONT)
        handle.wait()
        return said, early


def test_a_wait_that_is_over_raises_on_every_rank_and_the_export_goes_on(
    ranks: Ranks, models: dict, tmp_path: Path
) -> None:
    said = f"{tmp_path / 'out'} is not written after 0.2 s of waiting. It goes on: wait again"
    assert ranks.call(4, held, models["llama31"], tmp_path / "out") == [(said, False)] * 4
    assert (tmp_path / "out" / "config.json").is_file()


def killed(source: Path, out: Path, victim: int) -> tuple[str, int | None]:
    """In a rank: what `wait` says when the process of one rank was killed; how this rank's process ended."""
    with loaded(source, length=1, **SIZES) as (model, here):
        handle = begun(source, out, model)
        if here.rank == victim:
            handle.process.kill()
        return refusal(handle.wait, 60), handle.process.wait(20) if handle.process else None


@pytest.mark.parametrize("victim", [0, 1])
def test_a_writer_that_is_killed_ends_the_others(victim: int, ranks: Ranks, models: dict, tmp_path: Path) -> None:
    found = ranks.call(4, killed, models["llama31"], tmp_path / "out", victim)
    whose = {0: "ended with status -9", 1: "the process that writes the files of rank 1 is gone"}[victim]
    assert all(whose in said for said, _ in found)
    assert len({said for said, _ in found}) == 1
    assert [status for _, status in found][victim] == -signal.SIGKILL
    assert all(status for _, status in found[:2])
    assert not (tmp_path / "out").exists()


def damaged(source: Path, out: Path) -> str:
    """In a rank: what is said where rank 1 cannot start its process."""
    with loaded(source, length=1, **SIZES) as (model, _):
        with on_rank(1, async_start.subprocess, "Popen", raising(OSError("no more processes"))):
            said = refusal(begun, source, out, model)
        export_hf_checkpoint(model, out, hf_model=source, **HOW)
        return said


def test_a_process_that_does_not_start_ends_all(ranks: Ranks, models: dict, tmp_path: Path) -> None:
    found = ranks.call(4, damaged, models["llama31"], tmp_path / "out")
    assert (
        len(set(found)) == 1
        and "rank 1 failed to start the process that writes: OSError: no more processes" in found[0]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
