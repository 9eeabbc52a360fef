"""The tensors of a `torch_dist` folder on disk, of which no more is read than is asked for: tensors with an axis for layers or
experts are read layer by layer, expert by expert. All of it is untrusted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from io import BytesIO
from itertools import combinations, pairwise
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..common.dtypes import UNQUANTIZED, dtype_names, torch_dtypes
from ..common.errors import ExportError, report
from ..common.safe_files import inside
from .safe_pickle import clear_errors
from .torch_dist_metadata import METADATA, Chunk, Extent, Stored, read_metadata
from .torch_save import Numbers, saved, saved_tensor

if TYPE_CHECKING:
    from torch import Tensor

_STRIP = 16 << 20  # bytes that are read at once where only some columns of them are wanted
_MOST_PARTS = 4096  # of a matrix: as many ranks as may have cut it
_MOST_BYTES = 16 << 20  # of an object in a tensor of bytes
_WAY_OUT = "Copy or save the checkpoint again"


class Storage:
    """What `.metadata` of a folder says, and the files beside it.

    tensors, objects  name -> tensor, name -> where another object lies; but for names that begin with one of `passed_over`
    nbytes            bytes read so far
    """

    def __init__(
        self, folder: Path, passed_over: tuple[str, ...] = (), named: Callable[[str], str] = lambda key: key
    ) -> None:
        """`named`: key on disk -> name."""
        self.folder = folder
        self.nbytes = 0
        self.tensors, self.objects = read_metadata(folder, passed_over, named)
        self._files: dict[str, tuple[Path, os.stat_result]] = {}
        self._numbers: dict[Extent, Numbers] = {}

    def check(self, tensors: Iterable[Stored]) -> None:
        """Raise `ExportError` unless these tensors are bfloat16, float16 or float32, in files that are there and long enough. A
        vector of whole numbers may be there too: it numbers the tokens of a draft.
        """
        tensors = list(tensors)
        kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in map(torch_dtypes().get, UNQUANTIZED))
        problems = [
            f"{self.folder}: tensor {tensor.key} is {str(tensor.dtype).removeprefix('torch.')}, not one of {kinds}: "
            "quantized already? Give a checkpoint of the original model"
            for tensor in tensors
            if dtype_names().get(tensor.dtype) not in UNQUANTIZED
            and (tensor.dtype, len(tensor.shape)) != (torch.int64, 1)
        ]
        self.check_files(tensors, problems)

    def check_files(self, tensors: Iterable[Stored], problems: Iterable[str] = ()) -> None:
        """Raise `ExportError`, with other `problems`, unless the files of these tensors are there and long enough."""
        report([*problems, *self._missing(chunk.place for tensor in tensors for chunk in tensor.chunks)])

    def object(self, key: str) -> Any:
        """An object that is no tensor, its own tensors as `Inert`."""
        place = self.objects[key]
        report(self._missing([place]))
        path, _ = self._files[place.file]
        with clear_errors(path), path.open("rb") as file:
            return saved(file, place.start, place.length)

    def object_in_bytes(self, key: str) -> Any:
        """The object that torch.save wrote into a tensor of bytes, which is stored as an object; None if there is none."""
        place = self.objects[key]
        report(self._missing([place]))
        path, _ = self._files[place.file]
        with clear_errors(path, _WAY_OUT), path.open("rb") as file:
            try:
                numbers = saved_tensor(file, place.start, place.length)
                if numbers.dtype is not torch.uint8 or numbers.strides != (1,) or numbers.shape[0] > _MOST_BYTES:
                    return None
                file.seek(numbers.start)
                return saved(BytesIO(file.read(numbers.shape[0])), 0, numbers.shape[0])
            except ValueError:  # what another library keeps there
                return None

    def _missing(self, places: Iterable[Extent]) -> list[str]:
        """Which files of these places are missing or too short, as sentences; the others are noted with their size and time."""
        ends: dict[str, int] = {}
        for place in places:
            ends[place.file] = max(ends.get(place.file, 0), place.start + place.length)
        problems = []
        for name, end in sorted(ends.items()):
            path = inside(self.folder, name)
            if not path.is_file():
                problems.append(f"{path} is missing. {_WAY_OUT}")
                continue
            self._files[name] = (path, path.stat())
            if (size := path.stat().st_size) < end:
                problems.append(f"{path} has {size:,} bytes, but {METADATA} means at least {end:,}. {_WAY_OUT}")
        return problems

    def entry(self, tensor: Stored, lead: tuple[int, ...]) -> Tensor:
        """The entry at index `lead` of the first axes of a tensor that was checked."""
        found = torch.empty(tensor.shape[len(lead) :], dtype=tensor.dtype)
        self.read(tensor, lead, tuple(slice(0, size) for size in found.shape), found)
        return found

    def read(self, tensor: Stored, lead: tuple[int, ...], where: tuple[slice, ...], into: Tensor) -> None:
        """Fill `into` with the rows and columns `where` of the entry at index `lead` of a tensor's first axes.

        The tensor must have been checked. `ExportError` if its parts do not cover `where`, overlap, or changed on disk.
        """
        boxes = {}
        for chunk in tensor.at(lead):
            spans = zip(where, chunk.offsets[len(lead) :], chunk.sizes[len(lead) :], strict=True)
            box = tuple(slice(max(cut.start, o), min(cut.stop, o + n)) for cut, o, n in spans)
            if all(cut.start < cut.stop for cut in box):
                boxes[chunk] = box
        if not _cover(list(boxes.values()), where):
            why = "do not make it whole, or overlap. Save the checkpoint again"
            raise ExportError(f"{self.folder}: the parts of {tensor.key} {why}")
        for chunk, box in boxes.items():
            entry = tuple(index - o for index, o in zip(lead, chunk.offsets, strict=False))
            part = into[_within(box, [cut.start for cut in where])]
            self._read_part(tensor, chunk, entry, _within(box, chunk.offsets[len(lead) :]), part)

    def _read_part(
        self, tensor: Stored, chunk: Chunk, entry: tuple[int, ...], where: tuple[slice, ...], into: Tensor
    ) -> None:
        """Fill `into` with what `where` selects of the entry at index `entry` of a chunk."""
        path, was = self._files[chunk.place.file]
        with clear_errors(path, _WAY_OUT), path.open("rb", buffering=0) as file:
            now = os.fstat(file.fileno())
            if (now.st_size, now.st_mtime_ns) != (was.st_size, was.st_mtime_ns):
                raise ExportError(f"{path} changed while it was exported. Start again when nobody writes there")
            if chunk.place not in self._numbers:
                self._numbers[chunk.place] = _found(file, tensor, chunk)
            numbers = self._numbers[chunk.place]
            ahead = sum(index * stride for index, stride in zip(entry, numbers.strides, strict=False))
            begin = numbers.start + ahead * tensor.dtype.itemsize
            sizes, strides = chunk.sizes[len(entry) :], numbers.strides[len(entry) :]
            if not where:  # one number, without axes
                self._span(file, begin, into)
                return
            width = prod(sizes[1:])
            if strides != (width, 1)[-len(sizes) :]:  # it was saved transposed
                reach = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) + 1
                whole = torch.empty(reach, dtype=tensor.dtype)
                self._span(file, begin, whole)
                into.copy_(whole.as_strided(sizes, strides)[where])
                return
            rows, columns, row_bytes = where[0], where[1:], width * tensor.dtype.itemsize
            if columns in ((), (slice(0, width),)) and into.is_contiguous() and into.dtype is tensor.dtype:
                self._span(file, begin + rows.start * row_bytes, into)
                return
            step = max(1, _STRIP // row_bytes)
            for first in range(rows.start, rows.stop, step):
                strip = torch.empty(min(step, rows.stop - first), *sizes[1:], dtype=tensor.dtype)
                self._span(file, begin + first * row_bytes, strip)
                into[first - rows.start : first - rows.start + len(strip)] = strip[:, *columns]

    def _span(self, file: Any, start: int, into: Tensor) -> None:
        """Fill a contiguous tensor with the bytes of a file from `start` on."""
        view, done = memoryview(into.view(-1).view(torch.uint8).numpy()), 0
        file.seek(start)
        while done < len(view):
            read = file.readinto(view[done:])
            if not read:
                raise ValueError(f"it ends before byte {start + len(view):,}")
            done += read
        self.nbytes += done


def _within(box: tuple[slice, ...], start: Iterable[int]) -> tuple[slice, ...]:
    """The same box, with `start` as its origin."""
    return tuple(slice(cut.start - o, cut.stop - o) for cut, o in zip(box, start, strict=True))


def _cover(boxes: list[tuple[slice, ...]], where: tuple[slice, ...]) -> bool:
    """Whether boxes inside `where` fill it without overlaps."""
    size, *sizes = (prod(cut.stop - cut.start for cut in box) for box in (where, *boxes))
    if sum(sizes) != size:
        return False
    if where and all(box[1:] == where[1:] for box in boxes):  # only rows are cut: as many parts as there are
        rows = sorted((box[0].start, box[0].stop) for box in boxes)
        return all(before[1] == after[0] for before, after in pairwise(rows))
    if len(boxes) > _MOST_PARTS:
        return False
    pairs = (zip(*pair, strict=True) for pair in combinations(boxes, 2))
    return not any(all(max(a.start, b.start) < min(a.stop, b.stop) for a, b in pair) for pair in pairs)


def _found(file: Any, tensor: Stored, chunk: Chunk) -> Numbers:
    numbers = saved_tensor(file, chunk.place.start, chunk.place.length)
    if (numbers.dtype, numbers.shape) != (tensor.dtype, chunk.sizes):
        there = f"a part of {tensor.key} is {numbers.dtype} {numbers.shape} there"
        raise ValueError(f"{there}, but {tensor.dtype} {chunk.sizes} in {METADATA}")
    return numbers
