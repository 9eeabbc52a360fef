"""Short answers to "is it the same?": of a model's weights, whatever their topology, of statistics, of settings."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from .errors import ExportError

_WORD = 4  # bfloat16 numbers in 64 bits
_MASK = (1 << 64) - 1


def checksum(shard: Tensor, column: int = 0) -> int:
    """Sum modulo 2^64 over a shard's bfloat16 numbers as unsigned 16-bit ones, each times 2^(16 * (its column mod 4)), the
    shard's first column being number `column` of the tensor's: the sums of all shards add up to that of the tensor.
    """
    bits = shard.contiguous().view(torch.int16)
    width = bits.shape[-1] if bits.dim() else 1
    if bits.dim() == 2 and width % _WORD == column % _WORD == 0 and bits.data_ptr() % 8 == 0:
        return int(bits.view(torch.int64).sum()) & _MASK
    bits = bits.reshape(-1, width).to(torch.int64) & 0xFFFF
    sums = ((column + k) % _WORD for k in range(min(width, _WORD)))
    return sum(int(bits[:, k::_WORD].sum()) << (16 * place) for k, place in enumerate(sums)) & _MASK


def added(checksums: Iterable[int]) -> int:
    """The checksum of a tensor from those of its shards."""
    return sum(checksums) & _MASK


def of_folder(folder: Path) -> dict[str, tuple[int, int]]:
    """Sizes and times of the last change of the files in a folder, by name."""
    found = ((path.name, path.stat()) for path in folder.iterdir() if path.is_file())
    return {name: (state.st_size, state.st_mtime_ns) for name, state in found}


def check_unchanged(folder: Path, before: dict[str, tuple[int, int]]) -> None:
    """Raise if a file of the original model is not what it was before."""
    now = of_folder(folder)
    if changed := sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name)):
        raise ExportError(f"{folder / changed[0]} changed while it was exported. Start again when nobody writes there")


def of_settings(settings: object) -> str:
    """sha256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def of_statistics(statistics: dict[str, Tensor]) -> str:
    """sha256 of the names, types, shapes and bytes of tensors on the CPU."""
    digest = hashlib.sha256()
    for name, tensor in sorted(statistics.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
