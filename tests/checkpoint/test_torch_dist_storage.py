"""Parts of tensors that lie in pieces in several files: what is asked for is put together, and little else is read."""

import pickle
from itertools import product
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_export import ExportError
from megatron_export.checkpoint import torch_dist_storage
from megatron_export.checkpoint.torch_dist_storage import Storage

KEY = "decoder.layers.mlp.linear_fc1.weight"
WHOLE = torch.arange(2 * 3 * 8 * 12).view(2, 3, 8, 12).bfloat16()  # layers, experts, rows, columns


def lay(folder: Path, whole: Tensor, sizes: tuple[int, ...], transposed: bool = False) -> None:
    """Save a tensor in chunks of these sizes, each file with two of them, as torch.distributed.checkpoint would."""
    chunks, places = [], {}
    for number, offsets in enumerate(product(*(range(0, n, s) for n, s in zip(whole.shape, sizes, strict=True)))):
        part = whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].clone()
        part = part.mT.contiguous().mT if transposed else part
        path = folder / f"__{number // 2}_0.distcp"
        with path.open("ab") as file:
            start = file.tell()
            torch.save(part, file)
            places[metadata.MetadataIndex(KEY, offsets)] = _StorageInfo(path.name, start, file.tell() - start)
        chunks.append(metadata.ChunkStorageMetadata(torch.Size(offsets), part.shape))
    said = metadata.TensorStorageMetadata(metadata.TensorProperties(dtype=whole.dtype), whole.shape, chunks)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata.Metadata({KEY: said}, storage_data=places)))


def opened(folder: Path) -> Storage:
    storage = Storage(folder)
    storage.check(storage.tensors.values())
    return storage


def read(storage: Storage, lead: tuple[int, ...], rows: slice, columns: slice | None) -> Tensor:
    """A part of the tensor, in a tensor of its own."""
    sizes = [cut.stop - cut.start for cut in (rows, columns) if cut]
    into = torch.full(sizes, -1.0, dtype=storage.tensors[KEY].dtype)
    storage.read(storage.tensors[KEY], lead, (rows, columns) if columns else (rows,), into)
    return into


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", [(2, 3, 8, 12), (1, 1, 8, 12), (1, 3, 4, 12), (2, 1, 8, 6), (1, 1, 3, 5)], ids=str)
def test_any_part_of_any_entry_is_read(sizes: tuple, transposed: bool, tmp_path: Path) -> None:
    lay(tmp_path, WHOLE, sizes, transposed)
    storage = opened(tmp_path)
    for layer, expert in product(range(2), range(3)):
        for rows, columns in product(
            (slice(0, 8), slice(2, 5), slice(7, 8)), (slice(0, 12), slice(6, 12), slice(4, 5))
        ):
            with mock.patch.object(torch_dist_storage, "_STRIP", 2 * 12 * 2):  # two rows
                found = read(storage, (layer, expert), rows, columns)
            assert torch.equal(found, WHOLE[layer, expert, rows, columns])


def test_no_more_is_read_than_whole_rows_of_what_is_asked_for(tmp_path: Path) -> None:
    lay(tmp_path, WHOLE, (2, 3, 8, 12))
    storage = opened(tmp_path)
    read(storage, (1, 2), slice(3, 5), slice(0, 12))
    assert storage.nbytes == 2 * 12 * 2


def test_numbers_of_another_kind_than_asked_for_are_converted(tmp_path: Path) -> None:
    lay(tmp_path, WHOLE[0, 0], (4, 12))
    storage, into = opened(tmp_path), torch.empty(8, 12)
    storage.read(storage.tensors[KEY], (), (slice(0, 8), slice(0, 12)), into)
    assert torch.equal(into, WHOLE[0, 0].float())


def test_vectors_are_read(tmp_path: Path) -> None:
    lay(tmp_path, WHOLE[0, 0], (3, 12))
    storage = opened(tmp_path)
    assert torch.equal(read(storage, (4,), slice(2, 9), None), WHOLE[0, 0, 4, 2:9])


@pytest.mark.parametrize("at", [0, 2])
def test_chunks_that_overlap_are_refused(at: int, tmp_path: Path) -> None:
    """Two at one place, or partly so, and none at another: together as many numbers as the tensor has."""
    lay(tmp_path, WHOLE[0, 0], (4, 12))
    held = pickle.loads((tmp_path / ".metadata").read_bytes())
    held.state_dict_metadata[KEY].chunks[1] = metadata.ChunkStorageMetadata(torch.Size((at, 0)), torch.Size((4, 12)))
    held.storage_data[metadata.MetadataIndex(KEY, (at, 0))] = held.storage_data.pop(metadata.MetadataIndex(KEY, (4, 0)))
    (tmp_path / ".metadata").write_bytes(pickle.dumps(held))
    storage = opened(tmp_path)
    with pytest.raises(ExportError, match="do not make it whole, or overlap"):
        read(storage, (), slice(0, 8), slice(0, 12))


def test_a_file_that_ends_early_is_refused(tmp_path: Path) -> None:
    lay(tmp_path, WHOLE[0, 0], (8, 12))
    storage = opened(tmp_path)
    (path,) = tmp_path.glob("*.distcp")
    read(storage, (), slice(0, 8), slice(0, 12))
    with path.open("r+b") as file:
        file.truncate(700)
    storage._files[path.name] = (path, path.stat())
    with pytest.raises(ExportError, match="it ends before byte"):
        read(storage, (), slice(0, 8), slice(0, 12))


def test_numbers_of_another_type_or_size_than_announced_are_refused(tmp_path: Path) -> None:
    lay(tmp_path, WHOLE[0, 0], (8, 12))
    held = pickle.loads((tmp_path / ".metadata").read_bytes())
    held.state_dict_metadata[KEY].properties.dtype = torch.float32
    (tmp_path / ".metadata").write_bytes(pickle.dumps(held))
    storage = opened(tmp_path)
    with pytest.raises(
        ExportError, match=r"is torch.bfloat16 \(8, 12\) there, but torch.float32 \(8, 12\) in .metadata"
    ):
        read(storage, (), slice(0, 8), slice(0, 12))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_numbers_that_are_no_weights_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    lay(tmp_path, WHOLE[0, 0].to(dtype), (8, 12))
    with pytest.raises(ExportError, match="quantized already"):
        opened(tmp_path)


@given(st.integers(0, 1000), st.binary(min_size=1, max_size=8))
@settings(max_examples=300, deadline=None)
def test_metadata_damaged_anywhere_is_refused_or_describes_tensors(
    damage: tuple[Path, bytes], at: int, noise: bytes
) -> None:
    folder, good = damage
    at = at * len(good) // 1000
    (folder / ".metadata").write_bytes(good[:at] + noise + good[at + len(noise) :])
    try:
        storage = opened(folder)
        for tensor in storage.tensors.values():
            if len(tensor.shape) == 2:
                whole = torch.empty(tensor.shape, dtype=tensor.dtype)
                storage.read(tensor, (), tuple(slice(0, size) for size in tensor.shape), whole)
    except ExportError as error:
        assert str(error)


@pytest.fixture(scope="module")
def damage(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A folder, and its metadata as it was."""
    folder = tmp_path_factory.mktemp("damage")
    lay(folder, WHOLE[0, 0], (4, 12))
    return folder, (folder / ".metadata").read_bytes()
