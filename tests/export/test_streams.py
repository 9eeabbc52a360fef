"""What training loops call: an export that they do not wait for, and tensors one by one; the same bytes as an export's."""

import os
import signal
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_export import (
    ExportError,
    export_hf_checkpoint,
    export_hf_checkpoint_async,
    iter_hf_tensors,
    plan_hf_tensors,
)
from megatron_export.export import async_export
from megatron_export.mcore.model import shards_of

from ..support.live import loaded, refusal
from ..support.models import assert_same, contents, same, tensors
from ..support.ranks import Ranks

pytestmark = pytest.mark.whole

SETTINGS = {"format": "fp8_pb", "exclude": ("lm_head",)}


def in_background(source: Path, out: Path, tp: int, pp: int) -> tuple[int, list[bool]]:
    """In a rank: export, then change the weights while another process writes; what `done` said meanwhile."""
    with loaded(source, tp, pp) as (model, _):
        export_hf_checkpoint(model, out / "waited", hf_model=source, max_shard_size="100KB", **SETTINGS)
        handle = export_hf_checkpoint_async(model, out / "kept", hf_model=source, max_shard_size="100KB", **SETTINGS)
        with torch.no_grad():
            for weight in model.parameters():
                weight.zero_()
        said = [handle.done()]
        handle.wait()
        handle.wait()  # a second time it knows
        assert (out / "kept").is_dir()
        return handle.nbytes, [*said, handle.done()]


def twice(source: Path, out: Path) -> list[int]:
    """In a rank: two exports with the memory of the first, of other weights; how much memory was found new for each."""
    found = []
    with loaded(source, 2) as (model, here):
        for name in ("first", "second"):
            with mock.patch.object(os, "memfd_create", wraps=os.memfd_create) as made:
                handle = export_hf_checkpoint_async(
                    model, out / name, hf_model=source, format="bf16", max_shard_size="100KB", keep_memory=True
                )
            found.append(len([call for call in made.call_args_list if "safetensors" in call.args[0]]))
            handle.wait()
            for weight in shards_of(model).values():
                weight.mul_(2)
        export_hf_checkpoint(model, out / "third", hf_model=source, format="bf16", max_shard_size="100KB")
    return found


def test_memory_that_is_kept_serves_the_next_export(ranks: Ranks, models: dict, tmp_path: Path) -> None:
    found = ranks.call(2, twice, models["llama31"], tmp_path)
    assert found[0][0] > 2 and found[0][1] == 0
    assert found[1] == [0, 0]
    first, second, third = (tensors(tmp_path / name) for name in ("first", "second", "third"))
    assert_same(second, {name: tensor * 2 for name, tensor in first.items()})
    assert_same(third, {name: tensor * 2 for name, tensor in second.items()})


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_an_export_in_the_background_writes_what_the_model_was(
    tp: int, pp: int, ranks: Ranks, models: dict, tmp_path: Path
) -> None:
    found = ranks.call(2, in_background, models["llama31"], tmp_path, tp, pp)
    assert found[0] == found[1]
    assert found[0][1][1] is True
    assert contents(tmp_path / "kept") == contents(tmp_path / "waited")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "waited"]
    assert found[0][0] == sum(tensor.nbytes for tensor in tensors(tmp_path / "kept").values())


def second(source: Path, out: Path) -> tuple[str, str, str]:
    """In a rank: what is said of a second export into a folder while the first one is written, and of one after it."""
    said = []

    def export(**more: object) -> object:
        try:
            return export_hf_checkpoint_async(model, out, hf_model=source, format="bf16", **more)
        except ExportError as error:
            said.append(str(error))

    with loaded(source, 2) as (model, _):
        handle = export()
        if handle.process:
            os.kill(handle.process.pid, signal.SIGSTOP)
        export()
        export(overwrite=True)
        if handle.process:
            os.kill(handle.process.pid, signal.SIGCONT)
        handle.wait()
        export()
        export(overwrite=True).wait()
    return tuple(said)


def test_a_second_export_into_one_folder_is_refused_at_its_call_on_all_ranks(
    ranks: Ranks, models: dict, tmp_path: Path
) -> None:
    first, other = ranks.call(2, second, models["llama31"], tmp_path / "deep" / "out")
    assert first == other
    running = f"another export into {tmp_path / 'deep' / 'out'} is running"
    assert [running in said for said in first] == [True, True, False]
    assert "is not empty" in first[2]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert_same(tensors(tmp_path / "deep" / "out"), tensors(models["llama31"]))


def told_of(source: Path, out: Path, how: str) -> str:
    """In a rank: what the handle raises when the other process cannot publish."""
    with loaded(source, 2) as (model, here):
        if how == "refused at once":
            out.mkdir(exist_ok=True)
            (out / "precious").touch()
        room = 1 << 30 if how == "no memory" else 1 << 40

        def wait() -> None:
            with mock.patch.object(async_export, "available", return_value=room):
                handle = export_hf_checkpoint_async(model, out, hf_model=source, format="bf16")
            if handle.process and how == "killed":
                os.kill(handle.process.pid, signal.SIGKILL)
            if handle.process and how == "taken meanwhile":
                out.mkdir()
                (out / "precious").touch()
            while not handle.done():
                time.sleep(0.1)

        return refusal(wait)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("killed", "ended with status -9"),
        ("taken meanwhile", "is not empty"),
        ("refused at once", "is not empty. Give another --output"),
        ("no memory", "of the memory of rank 0's host, and 1.07 GB are available there. Use export_hf_checkpoint"),
    ],
)
def test_what_fails_in_the_background_is_told_on_every_rank(
    how: str, message: str, ranks: Ranks, models: dict, tmp_path: Path
) -> None:
    said = ranks.call(2, told_of, models["llama31"], tmp_path / "out", how)
    assert said[0] == said[1]
    assert message in said[0]
    if how not in ("killed", "no memory"):
        assert [path.name for path in tmp_path.glob("out/*")] == ["precious"]


STREAMS = [  # model, format, ranks, sizes, everywhere
    ("llama31", "fp8_pb", 2, {"tp": 2}, False),
    ("llama32", "bf16", 2, {"pp": 2}, True),
    ("qwen3_moe", "fp8_pb", 4, {"tp": 2, "ep": 2, "etp": 1, "pp": 2}, True),
    ("llama4", "bf16", 2, {"ep": 2}, True),
]


def streamed(source: Path, out: Path, form: str, sizes: dict, everywhere: bool) -> list[dict[str, Tensor]]:
    """In a rank: what a plan gives for a model, and for the same model after a step of training; both exported too."""
    with loaded(source, length=1, **sizes) as (model, _):
        plan = plan_hf_tensors(model, hf_model=source, format=form, bucket_bytes=20_000)
        found = []
        for step in range(2):
            with torch.no_grad():
                for shard in shards_of(model).values():
                    shard.mul_(1 + step)
            pairs = list(iter_hf_tensors(model, plan=plan, everywhere=everywhere))
            assert len({name for name, _ in pairs}) == len(pairs)
            found.append(dict(pairs))
            export_hf_checkpoint(model, out / f"{step}", hf_model=source, format=form)
        return found


@pytest.mark.parametrize(("name", "form", "world", "sizes", "everywhere"), STREAMS, ids=str)
def test_the_stream_has_the_tensors_of_an_export(
    name: str, form: str, world: int, sizes: dict, everywhere: bool, ranks: Ranks, models: dict, tmp_path: Path
) -> None:
    found = ranks.call(world, streamed, models[name], tmp_path, form, sizes, everywhere)
    for step in range(2):
        written = tensors(tmp_path / f"{step}")
        for rank, streams in enumerate(found):
            assert_same(streams[step], written if everywhere or rank == 0 else {})
    weight = "model.embed_tokens.weight" if name != "llama4" else next(n for n in found[0][0] if "embed_tokens" in n)
    assert not same(found[0][0][weight], found[0][1][weight])


def refused(source: Path) -> list[str]:
    """In a rank: what is said of calls that cannot be."""
    with loaded(source, 2) as (model, _):
        plan = plan_hf_tensors(model, hf_model=source, format="fp8")
        asked = ({"plan": plan, "format": "fp8"}, {"plan": plan}, {"hf_model": source, "format": "fp9"})
        return [refusal(lambda settings: list(iter_hf_tensors(model, **settings)), settings) for settings in asked]


def test_a_stream_that_cannot_be_is_refused(ranks: Ranks, models: dict) -> None:
    for said in ranks.call(2, refused, models["llama31"]):
        both, uncalibrated, unknown = said
        assert "give either plan or format" in both
        assert "calibrat" in uncalibrated
        assert "unknown format 'fp9'. Did you mean 'fp8'?" in unknown
