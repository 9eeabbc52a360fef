"""The writer: files that safetensors reads, a target that appears whole or not at all, an old one that survives failure."""

import shutil
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from megatron_export.common.errors import ExportError
from megatron_export.planning.contents import contents_of
from megatron_export.planning.plan import Plan
from megatron_export.planning.tensor_spec import Output
from megatron_export.writing.safetensors_file import file_bytes, header_of
from megatron_export.writing.staging import Staging
from megatron_export.writing.target import check_target
from megatron_export.writing.writer import CheckpointWriter, complete

from ..support.configs import LLAMA4
from ..support.models import EXAMPLE, assert_same, read_json, same, tensors
from ..support.plans import plan_of

CONFIG = read_json(EXAMPLE / "config.json")


@pytest.fixture
def plan() -> Plan:
    return plan_of(CONFIG, format="nvfp4", kv_cache="fp8", max_shard_size=2_000_000)


def content(plan: Plan) -> list[tuple[Output, torch.Tensor]]:
    """Random bytes for all that the plan has somebody write."""
    generator = torch.Generator().manual_seed(0)
    outputs = [output for item in plan.items for output in item.outputs]
    bytes_of = (torch.randint(0, 255, (o.nbytes,), generator=generator, dtype=torch.uint8) for o in outputs)
    return [(o, found.view(o.torch_dtype).reshape(o.shape)) for o, found in zip(outputs, bytes_of, strict=True)]


IDENTITY = {"settings": "a", "model": "b"}


@contextmanager
def exporting(target: Path, plan: Plan, **options: bool) -> Iterator[CheckpointWriter]:
    """A writer in its staging folder."""
    staging = Staging(target, IDENTITY, **{"overwrite": False, "resume": False} | options)
    with staging, CheckpointWriter(plan, staging) as writer:
        yield writer


def publish(writer: CheckpointWriter, copies: tuple[Path, ...] = ()) -> None:
    writer.flush()
    complete(contents_of(writer.plan), writer.staging, list(copies))
    writer.staging.publish()


def export(target: Path, plan: Plan, **options: bool) -> None:
    """A whole export, or what another has left of one."""
    with exporting(target, plan, **options) as writer:
        writer.write((output, tensor) for output, tensor in content(plan) if writer.wants(output))
        publish(writer)


def test_a_file_has_the_bytes_that_are_forecast(plan: Plan) -> None:
    files = [
        *plan.files.values(),
        (Output('of "quotes" \u00e9', "U8", (3, 5)), Output("b", "F32", ()), Output("c", "BF16", (7,))),
    ]
    for outputs in files:
        header, starts = header_of(outputs)
        assert file_bytes(outputs) == len(header) + sum(output.nbytes for output in outputs)
        assert min(starts.values()) == len(header)


def test_a_file_to_copy_that_cannot_be_read_is_blamed_and_not_the_target(plan: Plan, tmp_path: Path) -> None:
    """The system gives an input/output error for the first byte of /proc/self/mem, as a disk that is broken does."""
    said = r"^/proc/self/mem: not read \(Input/output error\). Fetch it again$"
    with exporting(tmp_path / "out", plan) as writer, pytest.raises(ExportError, match=said):
        complete(contents_of(plan), writer.staging, [Path("/proc/self/mem")])


def test_tensors_written_in_any_order_are_read_back(plan: Plan, tmp_path: Path) -> None:
    written = content(plan)
    with exporting(tmp_path / "out", plan) as writer:
        for pair in reversed(written):
            writer.write([pair])
        assert not (tmp_path / "out").exists()
        publish(writer, (EXAMPLE / "tokenizer.json",))
    assert_same(tensors(tmp_path / "out"), {output.name: tensor for output, tensor in written})
    index = read_json(tmp_path / "out" / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(output.nbytes for output, _ in written)
    for file in {*index["weight_map"].values()}:
        with safe_open(tmp_path / "out" / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert {name for name, home in index["weight_map"].items() if home == file} == set(opened.keys())
        assert (tmp_path / "out" / file).stat().st_size <= 2_000_000 + 100_000  # the header
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


STACKED = LLAMA4 | {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
STACKED |= {"intermediate_size": 16, "intermediate_size_mlp": 32, "vocab_size": 64, "num_local_experts": 3}


def test_slices_of_a_tensor_meet_in_the_file_whatever_their_order(tmp_path: Path) -> None:
    """Of what is quantized, this model alone keeps stacks."""
    config = {"architectures": ["Llama4ForConditionalGeneration"], "text_config": STACKED}
    plan = plan_of(config, format="nvfp4")
    written = content(plan)
    with exporting(tmp_path / "out", plan) as writer:
        writer.write(reversed(written))
        publish(writer)
    found = tensors(tmp_path / "out")
    prefix = "language_model.model.layers.0.feed_forward.experts."
    assert {name.removeprefix(prefix): found[name].shape for name in found if name.startswith(prefix)} == {
        f"{stack}{suffix}": shape
        for stack, rows, columns in (("gate_up_proj", 32, 32), ("down_proj", 16, 32))
        for suffix, shape in (
            ("", (3, rows // 2, columns)),
            ("_weight_scale", (3, rows // 16, columns)),
            ("_weight_scale_2", ()),
            ("_input_scale", ()),
        )
    }
    for output, tensor in written:
        assert same(found[output.name][output.index] if output.count else found[output.name], tensor)


def test_a_slice_that_never_came_stops_publication(tmp_path: Path) -> None:
    plan = plan_of(STACKED, format="bf16")
    with exporting(tmp_path / "out", plan) as writer:
        writer.write((output, tensor) for output, tensor in content(plan) if output.index != 1)
        with pytest.raises(ExportError, match="2 tensors were never written, first .*experts.gate_up_proj"):
            publish(writer)


def test_a_failure_leaves_nothing_behind_and_the_old_folder_as_it_was(plan: Plan, tmp_path: Path) -> None:
    old = tmp_path / "out"
    old.mkdir()
    (old / "precious").write_text("old")
    with pytest.raises(OSError, match="no more"), exporting(old, plan) as writer:
        writer.write(content(plan)[:3])
        raise OSError("no more")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (old / "precious").read_text() == "old"


def test_publishing_replaces_the_old_folder_whole(plan: Plan, tmp_path: Path) -> None:
    old = tmp_path / "out"
    old.mkdir()
    (old / "stale.safetensors").write_text("old")
    export(old, plan, overwrite=True)
    assert not (old / "stale.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_was_filled_since_the_check_is_not_replaced(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot write .*not empty"), exporting(tmp_path / "out", plan) as writer:
        writer.write(content(plan))
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("another job's")
        publish(writer)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_a_tensor_that_never_came_stops_publication(plan: Plan, tmp_path: Path) -> None:
    written = [(output, tensor) for output, tensor in content(plan) if output.name != "model.norm.weight"]
    with exporting(tmp_path / "out", plan) as writer:
        writer.write(written)
        with pytest.raises(ExportError, match="1 tensors were never written, first model.norm.weight"):
            publish(writer)
    assert list(tmp_path.iterdir()) == []


def test_targets_are_checked_before_work_starts(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    with pytest.raises(ExportError, match="taken is not empty.*--overwrite"):
        check_target(taken, plan, overwrite=False)
    check_target(taken, plan, overwrite=True)
    with pytest.raises(ExportError, match="is a file"):
        check_target(taken / "file", plan, overwrite=True)
    with pytest.raises(ExportError, match="a mount point"):
        check_target(Path("/proc"), plan, overwrite=True)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, plan.nbytes))
    with pytest.raises(ExportError, match="bytes, but its disk has"):
        check_target(tmp_path / "new" / "deep", plan, overwrite=False)
