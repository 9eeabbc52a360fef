"""What is read back: a damaged file, a wrong number or a wrong exclude list stops publication."""

import hashlib
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_export.common.errors import ExportError
from megatron_export.common.file_names import MANIFEST
from megatron_export.planning.contents import contents_of
from megatron_export.planning.plan import Plan
from megatron_export.planning.tensor_spec import Output
from megatron_export.writing import read_back as reading
from megatron_export.writing.byte_sink import OnDisk
from megatron_export.writing.fingerprint import added, checksum, of_statistics, sha256_of
from megatron_export.writing.journal import kept
from megatron_export.writing.manifest import identity_of, manifest
from megatron_export.writing.read_back import ReadBack, Verified, check_read_back
from megatron_export.writing.safetensors_file import SafetensorsFile, header_of
from megatron_export.writing.staging import Staging
from megatron_export.writing.writer import complete, write_json

from ..support.models import EXAMPLE, read_json
from ..support.plans import plan_of
from .test_staging import longer, shorter
from .test_writer import exporting

CONFIG = read_json(EXAMPLE / "config.json")
NAME = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of(CONFIG, format="nvfp4", exclude=("model.layers.1.mlp.down_proj",))


def sound(plan: Plan) -> dict[str, Tensor]:
    """A tensor for every name: ones, and zeros for codes."""
    outputs = (output for item in plan.items for output in item.outputs)
    return {o.name: (torch.zeros if o.dtype == "U8" else torch.ones)(o.shape).to(o.torch_dtype) for o in outputs}


def read_back(staging: Staging, plan: Plan) -> dict[str, Verified]:
    """What is found in the files of a staging folder, against the checksums of what was written."""
    contents = contents_of(plan)
    with ReadBack(contents) as back:
        for file, outputs in contents.files.items():
            back.follow(staging.folder / file, outputs)
        return check_read_back(staging, contents, back.found(staging.finished))


def verified(
    plan: Plan, folder: Path, tensors: dict[str, Tensor], damage: Callable[[Path], None]
) -> dict[str, Verified]:
    with exporting(folder / "out", plan) as writer:
        writer.write((o, tensors[o.name]) for item in plan.items for o in item.outputs)
        writer.flush()
        complete(contents_of(plan), writer.staging, [])
        damage(writer.staging.folder)
        return read_back(writer.staging, plan)


def at(plan: Plan, folder: Path, name: str) -> tuple[Path, int]:
    """The file that a tensor is in, and where in it."""
    file = next(file for file, outputs in plan.files.items() if name in {o.name for o in outputs})
    return folder / file, header_of(plan.files[file])[1][name]


def test_a_sound_folder_is_described_file_by_file(plan: Plan, tmp_path: Path) -> None:
    found = verified(plan, tmp_path, sound(plan), lambda folder: shutil.copytree(folder, tmp_path / "published"))
    held = {path.name: path.read_bytes() for path in (tmp_path / "published").iterdir()}
    sums = sha256_of((tmp_path / "published").iterdir())
    said = manifest(contents_of(plan), found, sums, {"model": "a"}, {"topology": {"tp": 1}})
    assert said["files"] == {
        name: {"bytes": len(data), "crc32": f"{zlib.crc32(data):08x}", "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in held.items()
    }
    assert said["tensors"].keys() == {output.name for output in plan.files["model.safetensors"]}
    assert said["tensors"][f"{NAME}.input_scale"] == {
        "file": "model.safetensors", "dtype": "F32", "shape": [], "crc32": f"{zlib.crc32(struct.pack('<f', 1.0)):08x}",
    }  # fmt: skip
    assert set(said["run"]["versions"]) >= {"python", "torch", "megatron_export", "megatron-core"}
    write_json(tmp_path / "published" / MANIFEST, said)
    assert identity_of(tmp_path / "published") == {"model": "a"}
    assert identity_of(tmp_path / "nowhere") is None
    (tmp_path / "published" / "config.json").write_text("{}")
    assert identity_of(tmp_path / "published") is None


@pytest.mark.parametrize("chunk, block", [(4096, 1000), (8 << 20, 8192), (1000, 4096)])
def test_checksums_do_not_depend_on_how_a_file_is_cut_to_be_read(
    chunk: int, block: int, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = sound(plan)
    expected = verified(plan, tmp_path / "whole", tensors, lambda folder: None)
    monkeypatch.setattr(reading, "CHUNK", chunk)
    monkeypatch.setattr(reading, "BLOCK", block)
    found = verified(plan, tmp_path / "cut", tensors, lambda folder: None)
    assert found["model.safetensors"] == expected["model.safetensors"]
    name = f"{NAME}.weight_scale"
    tensors[name].view(torch.uint8)[-1, -1] = 0x7F
    with pytest.raises(ExportError, match=f"{name} holds NaN"):
        verified(plan, tmp_path / "wrong", tensors, lambda folder: None)


def flip(path: Path, place: int) -> None:
    """Turn one bit, at a place from the start of a file, or from its end."""
    with path.open("r+b") as file:
        file.seek(place, os.SEEK_END if place < 0 else os.SEEK_SET)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def other_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"BF16"', b'"F16" ', 1))


def test_only_files_that_are_as_written_count_as_complete_afterwards(tmp_path: Path) -> None:
    """Whatever an export that goes on finds damaged, it writes again; an error of values would come again."""
    plan = plan_of(CONFIG, format="nvfp4", max_shard_size=1_000_000)
    tensors = sound(plan)
    tensors["model.norm.weight"][0] = torch.nan
    target, damaged = tmp_path / "out", next(iter(plan.files))

    with pytest.raises(ExportError, match=f"{damaged}.* is not what was written(.|\n)*--resume writes these") as found:
        verified(plan, tmp_path, tensors, lambda folder: flip(folder / damaged, -1))
    assert "NaN" not in str(found.value)  # what a damaged file holds says nothing of the model
    assert kept(target) == len(plan.files) - 1
    with exporting(target, plan, resume=True) as writer:
        again = [(o, tensors[o.name]) for item in plan.items for o in item.outputs if writer.wants(o)]
        assert {writer.homes[o.name] for o, _ in again} == {damaged}
        writer.write(again)
        writer.flush()
        complete(contents_of(plan), writer.staging, [])
        with pytest.raises(ExportError, match=r"model.norm.weight holds NaN or Inf$"):
            read_back(writer.staging, plan)
        assert len(writer.staging.finished) == len(plan.files)


@pytest.mark.parametrize("name", [f"{NAME}.weight", f"{NAME}.weight_scale", "model.norm.weight"])
def test_one_bit_that_turned_on_the_way_to_the_disk_is_found(name: str, plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"{name} is not what was written"):
        verified(plan, tmp_path, sound(plan), lambda folder: flip(*at(plan, folder, name)))


def test_every_byte_that_turned_in_a_small_file_is_found(tmp_path: Path) -> None:
    outputs = (Output("a.weight_scale", "F32", (3,)), Output("b.weight", "U8", (2, 5)))
    contents = SimpleNamespace(copied=frozenset(), slices={"a.weight_scale": 1, "b.weight": 2})
    path = tmp_path / "small.safetensors"
    file = SafetensorsFile(path.name, lambda nbytes: OnDisk(path, nbytes, False), outputs, contents.slices, True)
    file.write(outputs[0], 0, memoryview(torch.ones(3).numpy()).cast("B"))
    for index in range(2):
        file.write(Output("b.weight", "U8", (5,), index=index, count=2), 0, memoryview(b"abcde"))

    def damages() -> tuple[str, ...]:
        with ReadBack(contents) as back:
            back.follow(path, outputs)
            return back.found({path.name: file.checks()})[path.name].damages

    assert damages() == ()
    for place in range(path.stat().st_size):
        flip(path, place)
        assert damages(), f"byte {place} was turned"
        flip(path, place)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: longer(folder / "model.safetensors"), "longer than its header"),
        (lambda folder: shorter(folder / "model.safetensors"), "is not what was written"),
        (other_header, "its header is not"),
    ],
)
def test_files_of_another_length_or_header_are_found(
    damage: Callable, message: str, plan: Plan, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        verified(plan, tmp_path, sound(plan), damage)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{NAME}.weight_scale", 0.0, "a scale that is not above zero"),
        (f"{NAME}.weight_scale", torch.nan, "NaN or Inf"),
        (f"{NAME}.weight_scale_2", -1.0, "a scale that is not above zero"),
        (f"{NAME}.input_scale", torch.inf, "NaN or Inf"),
        ("model.norm.weight", torch.nan, "NaN or Inf"),
        ("model.layers.1.mlp.down_proj.weight", -torch.inf, "NaN or Inf"),
    ],
)
def test_numbers_that_no_engine_can_use_are_found(
    name: str, value: float, message: str, plan: Plan, tmp_path: Path
) -> None:
    tensors = sound(plan)
    tensors[name].view(-1)[-1] = value
    with pytest.raises(ExportError, match=f"{name} holds {message}"):
        verified(plan, tmp_path, tensors, lambda folder: None)


def test_e8m0_has_a_nan_and_no_number_that_is_not_above_zero(tmp_path: Path) -> None:
    powers = plan_of(CONFIG, format="mxfp8")
    tensors = sound(powers)
    assert tensors[f"{NAME}.weight_scale"].dtype is torch.uint8
    verified(powers, tmp_path / "zeros", tensors, lambda folder: None)
    tensors[f"{NAME}.weight_scale"].view(-1)[-1] = 0xFF
    with pytest.raises(ExportError, match=f"{NAME}.weight_scale holds NaN"):
        verified(powers, tmp_path / "nan", tensors, lambda folder: None)


def excluding(change: Callable[[list[str]], None], file: str, *keys: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        said = read_json(folder / file)
        inner = said
        for key in keys:
            inner = inner[key]
        change(inner)
        (folder / file).write_text(json.dumps(said))

    return damage


LISTS = {"config.json": ("quantization_config", "ignore"), "hf_quant_config.json": ("quantization", "exclude_modules")}


@pytest.mark.parametrize("file", LISTS)
def test_an_exclude_list_that_says_something_else_than_the_files_is_found(
    file: str, plan: Plan, tmp_path: Path
) -> None:
    more = excluding(lambda found: found.append("model.layers.2.*"), file, *LISTS[file])
    with pytest.raises(ExportError, match=f"{file} excludes model.layers.2.mlp.down_proj, which is quantized"):
        verified(plan, tmp_path / "more", sound(plan), more)
    less = excluding(lambda found: found.remove("model.layers.1.mlp.down_proj"), file, *LISTS[file])
    with pytest.raises(ExportError, match=f"{file} does not exclude model.layers.1.mlp.down_proj, which is not"):
        verified(plan, tmp_path / "less", sound(plan), less)


@pytest.mark.parametrize("shape", [(6, 8), (5, 7), (3, 12), (9,), (4, 130)])
@pytest.mark.parametrize("dim", [0, 1])
def test_the_checksums_of_shards_add_up_to_that_of_the_tensor(shape: tuple, dim: int) -> None:
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    dim = min(dim, len(shape) - 1)
    for cuts in (1, 2, 3):
        numbers = torch.arange(shape[dim]).tensor_split(cuts)
        held = [range(int(part[0]), int(part[-1]) + 1) for part in numbers]
        shards = zip(whole.tensor_split(cuts, dim), held, strict=True)
        sums = [checksum(shard, None, part[0]) if dim else checksum(shard, (part,)) for shard, part in shards]
        assert added(sums) == checksum(whole)
    assert checksum(whole[:0], (range(5, 5),)) == 0


def test_a_checksum_tells_any_bit_and_what_changed_places() -> None:
    whole = torch.randn(8, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
    for place in range(8 * 16):
        for bit in (*(1 << n for n in range(15)), -(1 << 15)):
            other = whole.clone()
            other.view(torch.int16).view(-1)[place] ^= bit
            assert checksum(other) != checksum(whole)
    for columns in ([1, 0, *range(2, 16)], [*range(4, 8), *range(4), *range(8, 16)]):
        assert checksum(whole[:, columns]) != checksum(whole)
    for rows in ([1, 0, *range(2, 8)], [*range(4, 8), *range(4)], [7, *range(1, 7), 0]):
        assert checksum(whole[rows]) != checksum(whole)


def test_statistics_have_a_fingerprint_of_their_names_and_numbers() -> None:
    one = {"a": torch.ones(2), "b": torch.zeros(())}
    assert of_statistics(one) == of_statistics(dict(reversed(one.items())))
    others = [
        {},
        {"a": one["a"]},
        one | {"b": torch.ones(())},
        {"a": one["b"], "b": one["a"]},
        one | {"a": torch.ones(2, 1)},
    ]
    assert len({of_statistics(found) for found in [one, *others]}) == 6
