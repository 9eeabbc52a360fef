"""Files of torch.save, or parts of files: zip archives without compression. `data.pkl` describes the object, and is read as
`safe_pickle.py` reads; the tensors' bytes lie beside it.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..common.safe_files import reason_of, shown
from .safe_pickle import MOST_BYTES, Inert, Name, check_size, clear_errors, is_sizes, unpickled

_MOST_AT_ONCE = 1 << 20  # of what describes an archive
_DTYPES = {  # what `data.pkl` calls the numbers of a tensor
    "BFloat16Storage": "bfloat16",
    "HalfStorage": "float16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "ByteStorage": "uint8",
    "LongStorage": "int64",
}


@dataclass(frozen=True)
class Numbers:
    """Where a file holds the numbers of a tensor that torch.save wrote: from byte `start` on, `strides` apart."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int


def read_saved(path: Path, way_out: str) -> Any:
    """The object of a file that torch.save wrote, its tensors as `Inert`."""
    with clear_errors(path, way_out), path.open("rb") as file:
        return saved(file, 0, os.fstat(file.fileno()).st_size)


def saved(file: BinaryIO, start: int, length: int) -> Any:
    """The object that torch.save wrote into a part of a file, its tensors as `Inert`; `ValueError` if it wrote none."""
    with _archive(file, start, length) as archive:
        return _described(archive)


def saved_tensor(file: BinaryIO, start: int, length: int) -> Numbers:
    """Where the numbers lie of the tensor that torch.save wrote into a part of a file; `ValueError` if it wrote none."""
    with _archive(file, start, length) as archive:
        found = _described(archive)
        found = found[0] if isinstance(found, list) and len(found) == 1 else found
        if not isinstance(found, Inert) or found.name != "torch._utils._rebuild_tensor_v2" or len(found.args) < 4:
            raise ValueError(f"{shown(found)} is no tensor")
        storage, offset, shape, strides, *_ = found.args
        if not isinstance(storage, tuple) or len(storage) != 5 or storage[0] != "storage":
            raise ValueError("a tensor without numbers")
        _, named, key, *_ = storage
        if not isinstance(named, Name) or not isinstance(key, str):
            raise ValueError("a tensor without numbers")
        kind = named.name.removeprefix("torch.")
        if kind not in _DTYPES:
            raise ValueError(f"a tensor of {shown(kind)}, not one of {', '.join(_DTYPES)}")
        dtype = getattr(torch, _DTYPES[kind])
        if not all(is_sizes(sizes) for sizes in ((offset,), shape, strides)) or len(shape) != len(strides):
            raise ValueError("a tensor without sizes")
        reach = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
        member = archive.getinfo(_prefix(archive) + f"data/{key}")
        if 0 in shape or reach * dtype.itemsize > member.file_size:
            raise ValueError(f"a tensor {shape} in {member.file_size:,} bytes")
        begin = _begin(file, start, member)
        if begin + member.file_size > start + length:
            raise ValueError("its numbers go beyond its end")
        return Numbers(dtype, shape, strides, begin + offset * dtype.itemsize)


class _Window(io.RawIOBase):
    """A part of a file, as a file of its own, that reads at most `_MOST_AT_ONCE` bytes at a time."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self.file, self.start, self.length, self.at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.length}[whence]
        if self.at < 0:
            raise zipfile.BadZipFile("it points before its start")
        return self.at

    def read(self, size: int = -1) -> bytes:
        size = max(0, min(size if size >= 0 else self.length, self.length - self.at))
        if size > _MOST_AT_ONCE:
            raise ValueError(f"it describes itself in more than {_MOST_AT_ONCE:,} bytes")
        self.file.seek(self.start + self.at)
        found = self.file.read(size)
        self.at += len(found)
        return found


@contextmanager
def _archive(file: BinaryIO, start: int, length: int) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(_Window(file, start, length)) as archive:
            yield archive
    except (zipfile.BadZipFile, KeyError, NotImplementedError, EOFError, struct.error) as error:
        raise ValueError(f"no archive of torch.save: {reason_of(error)}") from error


def _prefix(archive: zipfile.ZipFile) -> str:
    names = [name for name in archive.namelist() if name.endswith("data.pkl")]
    if len(names) != 1:
        raise ValueError("no archive of torch.save: it has no data.pkl")
    return names[0].removesuffix("data.pkl")


def _described(archive: zipfile.ZipFile) -> Any:
    prefix = _prefix(archive)
    if "little" not in (_small(archive, f"{prefix}byteorder") or b"little").decode():
        raise ValueError("its numbers are big-endian")
    found = unpickled(_small(archive, f"{prefix}data.pkl"))
    check_size(found)
    return found


def _small(archive: zipfile.ZipFile, name: str) -> bytes:
    if name not in archive.namelist():
        return b""
    member = archive.getinfo(name)
    if member.compress_type != zipfile.ZIP_STORED or member.file_size > MOST_BYTES:
        raise ValueError(f"{shown(name)} is compressed, or too large")
    return archive.read(member)


def _begin(file: BinaryIO, start: int, member: zipfile.ZipInfo) -> int:
    """Where the bytes of an archive's member begin in the file around the archive, whose first byte is `start`."""
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{shown(member.filename)} is compressed")
    file.seek(start + member.header_offset)
    header = file.read(30)
    if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
        raise ValueError(f"{shown(member.filename)} is not where it should be")
    name, extra = struct.unpack("<HH", header[26:30])
    return start + member.header_offset + 30 + name + extra
