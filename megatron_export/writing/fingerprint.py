"""Short answers to "is it the same?": of a model's weights, whatever their topology, of statistics, of settings, of files."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.storage import bytes_of
from ..common.strips import survey_strips
from ..common.threads import each

THREADS = 8  # files whose sha256 is made at a time
_WORD = 4  # bfloat16 numbers in 64 bits
_MASK = (1 << 64) - 1


class Checksum:
    """Sum modulo 2^64 over a shard's bfloat16 numbers as unsigned 16-bit ones, each times 2^(16 * (its column mod 4)) and times the
    sum of an odd number that its row decides and an even one that its column div 4 does. Those of all shards add up to that of the
    tensor.

    rows    which rows of the tensor it has, in its order; None: all of them
    column  which column of the tensor its first is

    On a CPU numpy adds them up, for several threads that work on strips of rows: after every operation of torch a thread waits for
    its turn of Python, and a few more of them take half of the speed.
    """

    def __init__(self, shard: Tensor, rows: tuple[range, ...] | None = None, column: int = 0) -> None:
        matrix = shard.detach().flatten(1) if shard.dim() > 1 else shard.detach().reshape(-1, 1)
        bits = matrix.contiguous().view(torch.int16)
        height, width = bits.shape
        words = range(column // _WORD, -(-(column + width) // _WORD))
        of_rows = _mixed(rows or (range(height),), bits.device) | 1
        of_columns = _mixed((words,), bits.device) << 1
        if width % _WORD == column % _WORD == bits.stride(0) % _WORD == bits.data_ptr() % 8 == 0:
            numbers = bits.view(torch.int64)
        else:
            columns = torch.arange(column, column + width, device=bits.device)
            numbers = (bits.to(torch.int64) & 0xFFFF) << (16 * (columns % _WORD))
            of_columns = of_columns[columns // _WORD - words.start]
        made = numbers, of_rows, of_columns
        self.numbers, self.of_rows, self.of_columns = made if bits.is_cuda else (one.numpy() for one in made)

    def of_strip(self, rows: slice) -> tuple[Any, Any]:
        """What some rows, and columns over them, add to the checksum, of int64; of a GPU, which is not waited for, tensors []."""
        mine = self.numbers[rows]
        return (mine.sum(1) * self.of_rows[rows]).sum(), (mine.sum(0) * self.of_columns).sum()

    def total(self, strips: Iterable[tuple[Any, Any]]) -> Tensor:
        """The checksum, from what `of_strip` says of all rows; int64 [] on the shard's device."""
        found = [one for pair in strips for one in pair]
        return torch.stack(found).sum() if isinstance(found[0], Tensor) else torch.tensor(np.array(found).sum())


def checksum(shard: Tensor, rows: tuple[range, ...] | None = None, column: int = 0) -> int:
    """The `Checksum` of all rows of a shard."""
    made = Checksum(shard, rows, column)
    return added([int(made.total(each(made.of_strip, survey_strips(shard))))]) if shard.numel() else 0


@lru_cache(maxsize=64)  # layers are alike
def _mixed(numbers: tuple[range, ...], device: torch.device) -> Tensor:
    """A number for each whose bits are well mixed, int64, much as splitmix64 mixes them."""
    mixed = torch.cat([torch.arange(part.start + 1, part.stop + 1) for part in numbers])
    mixed = mixed * -7046029254386353131
    mixed = (mixed ^ (mixed >> 30)) * -4658895280553007687
    mixed = (mixed ^ (mixed >> 27)) * -7723592293110705685
    return (mixed ^ (mixed >> 31)).to(device)


@contextmanager
def forgetting() -> Iterator[None]:
    """Give back at the end what is kept for shards that are alike: a GPU has nothing to spare for later."""
    try:
        yield
    finally:
        _mixed.cache_clear()


def added(checksums: Iterable[int]) -> int:
    """The checksum of a tensor from those of its shards."""
    return sum(checksums) & _MASK


def of_file(path: Path) -> str:
    """sha256 of the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(paths: Iterable[Path]) -> dict[str, str]:
    """File name -> sha256, of several files at a time."""
    with ThreadPoolExecutor(THREADS, thread_name_prefix="sha256") as pool:
        made = [(path.name, pool.submit(of_file, path)) for path in paths]
        return {name: one.result() for name, one in made}


def of_settings(settings: object) -> str:
    """sha256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def of_statistics(statistics: dict[str, Tensor]) -> str:
    """sha256 of the names, types, shapes and bytes of tensors on the CPU."""
    digest = hashlib.sha256()
    for name, tensor in sorted(statistics.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(bytes_of(tensor).numpy().data)
    return digest.hexdigest()
