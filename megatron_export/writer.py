"""Safetensors shards, written tensor by tensor where they will stay, and the index over them.

A shard's header is known from the plan, so tensors are written at their final offsets as they arrive, in any order, and
host memory holds one bucket, never a shard. Source: safetensors file format 0.3 (8-byte header length, JSON, data).
"""

import json
import os
import shutil
import struct
import zlib
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from .errors import ExportError
from .item import Output
from .journal import naming, partial_of
from .plan import Plan
from .staging import Staging

SPARE_BYTES = 64 << 20
MANIFEST = "export_manifest.json"
INDEX = "model.safetensors.index.json"
DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
}


def check_empty(export_dir: Path, *, overwrite: bool) -> None:
    """Refuse a target that is taken."""
    if export_dir.is_file():
        raise ExportError(f"{export_dir} is a file; give a folder")
    if export_dir.is_dir() and any(export_dir.iterdir()) and not overwrite:
        raise ExportError(f"{export_dir} is not empty. Give another --output, or --overwrite to replace it when done")


def check_target(export_dir: Path, plan: Plan, *, overwrite: bool, resume: bool = False) -> None:
    """Refuse, before any work, a target that is taken, cannot be replaced by a rename, or has too small a disk.

    One that an export completed may be what `resume` is to go on with; that is seen later.
    """
    if not (resume and (export_dir / MANIFEST).is_file()):
        check_empty(export_dir, overwrite=overwrite)
    if os.path.ismount(export_dir):
        raise ExportError(f"{export_dir} is a mount point, which cannot be replaced in one step; give a folder in it")
    parent = _existing(export_dir.parent)
    if not parent.is_dir():
        raise ExportError(f"{export_dir}: {parent} is a file, so no folder can be made in it. Give another --output")
    if not os.access(parent, os.W_OK):
        raise ExportError(f"{parent} is not writable. Give another --output")
    free = shutil.disk_usage(parent).free
    kept = partial_of(export_dir)  # is gone on with, or removed
    free += sum(path.stat().st_blocks * 512 for path in kept.iterdir()) if kept.is_dir() else 0
    if free < plan.nbytes + SPARE_BYTES:
        raise ExportError(
            f"{export_dir}: the checkpoint takes {plan.nbytes:,} bytes, but its disk has {free:,} free. Make room for "
            f"{plan.nbytes + SPARE_BYTES - free:,} more, or give an --output on another disk"
        )


def check_apart(export_dir: Path, *inputs: Path) -> None:
    """Refuse a target that is, or holds, something that the export needs: replacing it would delete that."""
    for path in inputs:
        if path.resolve().is_relative_to(export_dir.resolve()):
            raise ExportError(f"{export_dir} holds {path}, which this export needs. Give another --output")


def header_of(outputs: Iterable[Output]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a shard that holds these tensors, and where each of them starts in the file."""
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for output in sorted(outputs, key=lambda o: (-o.dtype.itemsize, o.name)):  # keeps every tensor aligned
        header[output.name] = {
            "dtype": DTYPES[output.dtype],
            "shape": list(output.shape),
            "data_offsets": [offset, offset + output.nbytes],
        }
        offset += output.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    starts = {name: said["data_offsets"][0] + 8 + len(text) for name, said in header.items() if name != "__metadata__"}
    return struct.pack("<Q", len(text)) + text, starts


class Shard:
    """One file on its way: what of it was written, with which checksums."""

    def __init__(self, path: Path, outputs: tuple[Output, ...]) -> None:
        self.name = path.name
        self.outputs = {output.name: output for output in outputs}
        header, self.starts = header_of(outputs)
        self.descriptor = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o666)
        _write_at(self.descriptor, header, 0)
        os.truncate(path, len(header) + sum(output.nbytes for output in outputs))
        self.checks: dict[str, dict[int, int]] = {name: {} for name in self.outputs}  # by index of the slice

    def start_of(self, output: Output) -> int:
        return self.starts[output.name] + output.index * output.nbytes


class CheckpointWriter:
    """Use as a context, inside that of its `Staging`."""

    def __init__(self, plan: Plan, staging: Staging) -> None:
        self.plan = plan
        self.staging = staging
        self.homes = {output.name: file for file, outputs in plan.files.items() for output in outputs}
        self.slices = Counter(output.name for item in plan.items for output in item.outputs)
        self.slices.update(output.name for output in plan.copied)
        self.missing = {  # how many tensors or slices of files that are not complete
            file: sum(self.slices[output.name] for output in outputs)
            for file, outputs in plan.files.items()
            if file not in staging.finished
        }
        self.shards: dict[str, Shard] = {}

    def __enter__(self) -> "CheckpointWriter":
        self.pool = ThreadPoolExecutor(1)
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown()
        for shard in self.shards.values():
            os.close(shard.descriptor)
        self.shards.clear()

    def wants(self, output: Output) -> bool:
        """Whether a tensor is of a file that is not complete yet."""
        return self.homes[output.name] in self.missing

    def write(self, tensors: Iterable[tuple[Output, Tensor]]) -> None:
        """Write tensors or slices of them, on any device, into the shards that the plan gave them; those of files that are
        complete already are passed over.
        """
        for output, tensor in tensors:
            if not self.wants(output):
                continue
            with naming(self.staging.target):
                self._write(output, tensor)

    def _write(self, output: Output, tensor: Tensor) -> None:
        file = self.homes[output.name]
        if file not in self.shards:
            self.shards[file] = Shard(self.staging.folder / file, self.plan.files[file])
        shard = self.shards[file]
        assert (tensor.dtype, tuple(tensor.shape)) == (output.dtype, output.shape), (output, tensor.shape)
        assert output.whole == shard.outputs[output.name], output
        assert output.index not in shard.checks[output.name], output
        data = memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        check = self.pool.submit(zlib.crc32, data)
        _write_at(shard.descriptor, data, shard.start_of(output))
        shard.checks[output.name][output.index] = check.result()
        self.missing[file] -= 1
        if not self.missing[file]:
            self._finish(shard)

    def _finish(self, shard: Shard) -> None:
        os.fsync(shard.descriptor)
        os.close(self.shards.pop(shard.name).descriptor)
        checks = {name: [found[index] for index in sorted(found)] for name, found in shard.checks.items()}
        self.staging.finish(shard.name, checks)
        del self.missing[shard.name]

    def complete(self, jsons: dict[str, dict], copies: list[Path]) -> None:
        """Add the JSON files, copies of `copies`, and the index."""
        if self.missing:
            file = min(self.missing)
            written = self.shards[file].checks if file in self.shards else {}
            names = (output.name for output in self.plan.files[file])
            lacking = sorted(name for name in names if len(written.get(name, ())) < self.slices[name])
            raise ExportError(f"{sum(self.missing.values())} tensors were never written, first {lacking[0]}")
        folder = self.staging.folder
        with naming(self.staging.target):
            for path in copies:
                shutil.copyfile(path, folder / path.name)
            for name, content in jsons.items():
                write_json(folder / name, content)
            if len(self.plan.files) > 1:
                write_json(folder / INDEX, {"metadata": {"total_size": self.plan.nbytes}, "weight_map": self.homes})


def _write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """All of it: the system may write less than it is given, before it says that there is no more room."""
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def write_json(path: Path, content: dict) -> None:
    """The only form in which JSON files are written."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder
