"""Safetensors shards, index and JSON files, written beside the target and published by one rename.

A shard's header is known from the plan, so tensors are written at their final offsets as they arrive, in any order, and
host memory holds one bucket, never a shard. Source: safetensors file format 0.3 (8-byte header length, JSON, data).
"""

import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from secrets import token_hex

import torch
from torch import Tensor

from .errors import ExportError
from .item import Output
from .plan import Plan

SPARE_BYTES = 64 << 20
_DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
}


def check_target(export_dir: Path, plan: Plan, *, overwrite: bool) -> None:
    """Refuse, before any work, a target that is taken, cannot be replaced by a rename, or has too small a disk."""
    if export_dir.is_file():
        raise ExportError(f"{export_dir} is a file; give a folder")
    if export_dir.is_dir() and any(export_dir.iterdir()) and not overwrite:
        raise ExportError(f"{export_dir} is not empty. Give another --output, or --overwrite to replace it when done")
    if os.path.ismount(export_dir):
        raise ExportError(f"{export_dir} is a mount point, which cannot be replaced in one step; give a folder in it")
    parent = _existing(export_dir.parent)
    if not parent.is_dir():
        raise ExportError(f"{export_dir}: {parent} is a file, so no folder can be made in it. Give another --output")
    if not os.access(parent, os.W_OK):
        raise ExportError(f"{parent} is not writable. Give another --output")
    free = shutil.disk_usage(parent).free
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


class CheckpointWriter:
    """Use as a context: leaving it by an exception removes all it wrote; `publish` gives the folder its name."""

    def __init__(self, export_dir: Path, plan: Plan, *, overwrite: bool = False) -> None:
        self.target = export_dir
        self.plan = plan
        self.overwrite = overwrite
        self.staging = export_dir.parent / f".{export_dir.name}.{token_hex(4)}.partial"
        self.places: dict[str, tuple[int, int, Output]] = {}  # name -> file descriptor, offset, tensor
        self.written: set[tuple[str, int]] = set()  # name and index

    def __enter__(self) -> "CheckpointWriter":
        with ExitStack() as undo, _naming(self.target):
            for folder in reversed(self.target.parents):
                if not folder.exists():
                    undo.callback(_remove_empty, folder)
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.staging.mkdir()
            undo.callback(self._abandon)
            for file, outputs in self.plan.files.items():
                self._start(self.staging / file, outputs)
            self.undo = undo.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.undo.close()

    def write(self, tensors: Iterable[tuple[Output, Tensor]]) -> None:
        """Write tensors or slices of them, on any device, into the shards that the plan gave them."""
        for output, tensor in tensors:
            descriptor, offset, whole = self.places[output.name]
            assert (tensor.dtype, tuple(tensor.shape), output.whole) == (output.dtype, output.shape, whole), output
            assert (output.name, output.index) not in self.written, output
            offset += output.index * output.nbytes
            data = memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            while data:
                with _naming(self.target):
                    count = os.pwrite(descriptor, data, offset)
                data, offset = data[count:], offset + count
            self.written.add((output.name, output.index))

    def publish(self, jsons: dict[str, dict], copies: list[Path]) -> None:
        """Add the JSON files, copies of `copies`, and the index; sync all of it; give the folder its final name."""
        expected = {(o.name, o.index) for item in self.plan.items for o in item.outputs}
        expected |= {(output.name, 0) for output in self.plan.copied}
        if missing := sorted(expected - self.written):
            raise ExportError(f"{len(missing)} tensors were never written, first {missing[0][0]}")
        with _naming(self.target):
            self._finish(jsons, copies)
            self._replace()

    def _finish(self, jsons: dict[str, dict], copies: list[Path]) -> None:
        for path in copies:
            shutil.copyfile(path, self.staging / path.name)
        for name, content in jsons.items():
            (self.staging / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if len(self.plan.files) > 1:
            names = {output.name: file for file, outputs in self.plan.files.items() for output in outputs}
            index = {"metadata": {"total_size": self.plan.nbytes}, "weight_map": names}
            (self.staging / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        for path in [*self.staging.iterdir(), self.staging]:
            _sync(path)

    def _start(self, path: Path, outputs: tuple[Output, ...]) -> None:
        header: dict = {"__metadata__": {"format": "pt"}}
        offset = 0
        ordered = sorted(outputs, key=lambda o: (-o.dtype.itemsize, o.name))  # keeps every tensor aligned
        for output in ordered:
            header[output.name] = {
                "dtype": _DTYPES[output.dtype],
                "shape": list(output.shape),
                "data_offsets": [offset, offset + output.nbytes],
            }
            offset += output.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        for output in ordered:
            start = header[output.name]["data_offsets"][0] + 8 + len(text)
            self.places[output.name] = (descriptor, start, output)
        os.write(descriptor, struct.pack("<Q", len(text)) + text)
        os.truncate(path, 8 + len(text) + offset)

    def _replace(self) -> None:
        old = self.staging.with_suffix(".old")
        if self.target.exists() and not self.overwrite:
            self.target.rmdir()  # fails if somebody filled it since it was checked
        if self.target.exists():
            self.target.rename(old)
        try:
            self.staging.rename(self.target)
        except OSError:
            if old.exists():
                old.rename(self.target)
            raise
        _sync(self.target.parent)
        shutil.rmtree(old, ignore_errors=True)

    def _abandon(self) -> None:
        for descriptor in {descriptor for descriptor, _, _ in self.places.values()}:
            os.close(descriptor)
        self.places.clear()
        shutil.rmtree(self.staging, ignore_errors=True)


@contextmanager
def _naming(target: Path) -> Iterator[None]:
    """The system's own errors seldom say which folder they are about."""
    try:
        yield
    except OSError as error:
        raise ExportError(f"cannot write {target} ({error}). Make room there, or give another --output") from error


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # not empty: the checkpoint was published into it
        folder.rmdir()


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
