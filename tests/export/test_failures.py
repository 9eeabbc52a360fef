"""Failures half way: both ranks stop with one message, what was there stays as it was, and the ranks can export again."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_export.common.errors import ExportError
from megatron_export.export import transport
from megatron_export.writing import file_systems

from ..support.models import read_json, tensors
from ..support.ranks import Ranks
from ..support.refusals import DOWN, assert_says, fp8, occupy, refused
from .test_topologies import export

pytestmark = pytest.mark.whole

# What can go wrong in the middle: each is open in every rank while the command runs.


@contextmanager
def on_rank(rank: int, target: Any, name: str, replacement: Callable) -> Iterator[None]:
    """Replace `target.name` in one rank only; the replacement is given the original."""
    if os.environ["RANK"] != str(rank):
        yield
        return
    with mock.patch.object(target, name, replacement(getattr(target, name))):
        yield


def raising(error: Exception, where: Callable[..., bool] = lambda *args: True, after: int = 0) -> Callable:
    """What replaces a function: it raises at the calls of which `where` holds, but for the first few of these."""

    def replacement(real: Callable) -> Callable:
        calls = iter(range(after))

        def called(*args: Any, **kwargs: Any) -> Any:
            if where(*args) and next(calls, None) is None:
                raise error
            return real(*args, **kwargs)

        return called

    return replacement


def failing(number: int, where: Callable[..., bool] = lambda *args: True, after: int = 0) -> Callable:
    """The same with an error of the system."""
    return raising(OSError(number, os.strerror(number)), where, after)


def is_partial(path: Path, *args: object) -> bool:
    return path.name.endswith(".partial")


def small_disk() -> AbstractContextManager:
    return on_rank(0, shutil, "disk_usage", lambda real: lambda path: SimpleNamespace(free=123_456))


def full_disk() -> AbstractContextManager:
    """Full after ten tensors."""
    return on_rank(0, os, "pwrite", failing(errno.ENOSPC, after=10))


def broken_disk() -> AbstractContextManager:
    return on_rank(0, os, "fsync", failing(errno.EIO))


def no_folder() -> AbstractContextManager:
    return on_rank(0, Path, "mkdir", failing(errno.EACCES, is_partial))


@contextmanager
def no_rename() -> Iterator[None]:
    """The new folder cannot take its name, nor the place of the old one."""
    never = on_rank(0, file_systems, "_swapped", lambda real: lambda *paths: False)
    with on_rank(0, Path, "rename", failing(errno.EBUSY, is_partial)), never:
        yield


def broken_encoder() -> AbstractContextManager:
    """Rank 1 fails when it has quantized half of its linears."""
    from megatron_export import formats

    error = RuntimeError("a broken encoder")
    return on_rank(1, formats, "encode", raising(error, lambda form, weight, amax: weight.device.type != "meta", 14))


def late_nan() -> AbstractContextManager:
    """Rank 1's part of the live model's last linear is NaN, which no activation shows."""
    from megatron_export.mcore import load_hf

    def replacement(real: Callable) -> Callable:
        def load(model: Any, *args: Any) -> int:
            read = real(model, *args)
            model.decoder.layers[-1].mlp.linear_fc2.weight.data[-1, -1] = torch.nan
            return read

        return load

    return on_rank(1, load_hf, "load_hf_weights", replacement)


def no_memory_to_send() -> AbstractContextManager:
    return on_rank(1, transport, "_packed", raising(MemoryError("no buffer to pack in")))


def no_memory_to_receive() -> AbstractContextManager:
    return on_rank(0, transport, "_unpack", raising(MemoryError("no room for whole tensors")))


FAULTS: dict[Callable[[], AbstractContextManager], tuple[str, ...]] = {
    small_disk: ("{output}: the checkpoint takes", "has 123,456 free", "Make room for", "another disk"),
    no_folder: ("rank 0 failed to start writing: cannot write {output} (", "Permission denied", "another --output"),
    late_nan: ("rank 1 failed to read the weights: NaN or Inf in " + DOWN.format(3),),
    no_memory_to_send: ("rank 1 failed to quantize: MemoryError: no buffer to pack in",),
    no_memory_to_receive: ("rank 0 failed to write: MemoryError: no room for whole tensors",),
    broken_encoder: ("rank 1 failed to quantize: RuntimeError: a broken encoder",),
    full_disk: ("rank 0 failed to finish the files: cannot write {output} (", "No space left", "another --output"),
    broken_disk: ("rank 0 failed to start writing: cannot write {output} (", "Input/output error"),
    no_rename: ("rank 0 failed to publish: cannot write {output} (", "busy", "1 of its files", "--resume"),
}


@pytest.mark.parametrize("place", ["deep", "old"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_failure_half_way_leaves_everything_as_it_was_and_the_ranks_able_to_export(
    fault: Callable, place: str, source: Path, output: Path, ranks: Ranks, tmp_path: Path
) -> None:
    if place == "old":
        occupy(output)
    else:
        output = output / "not" / "yet"
    flags = (*fp8(source, output), "--overwrite")
    said = refused(ranks, tmp_path, *flags, fault=fault)
    assert_says(said, *(word.format(output=output) for word in FAULTS[fault]))
    export(ranks, 2, *flags, *(("--resume",) if "--resume" in said else ()))
    assert "quantization_config" in read_json(output / "config.json")
    assert DOWN.format(3) in tensors(output)
    assert not (output / "deep").exists()
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_a_small_disk_is_noticed_before_any_work(source: Path, output: Path, ranks: Ranks, tmp_path: Path) -> None:
    (source / "model.safetensors").write_text("not read")
    said = refused(ranks, tmp_path, *fp8(source, output), fault=small_disk)
    assert_says(said, "rank 0 failed to check the settings", "has 123,456 free")


def message_during(fault: Callable[[], AbstractContextManager], *flags: object) -> str:
    """In a rank: the message of the `ExportError` that it raises while `fault()` is open."""
    from megatron_export.cli import export_command, run

    config = export_command.parse([str(flag) for flag in flags])
    with fault(), pytest.raises(ExportError) as refusal:
        run.run_export(config, export_command.EXAMPLE_MODEL, lambda stage, steps: steps)
    return str(refusal.value)


@pytest.mark.parametrize("fault", [late_nan, broken_encoder, full_disk], ids=lambda fault: fault.__name__)
def test_a_failure_on_one_rank_raises_the_same_message_on_every_rank(
    fault: Callable, source: Path, output: Path, ranks: Ranks
) -> None:
    first, second = ranks.call(2, message_during, fault, "--device", "cpu", *fp8(source, output), seconds=20)
    assert first == second
    assert_says(first, *(word.format(output=output) for word in FAULTS[fault]))
    assert not output.exists()
