"""`.metadata` of a folder that torch.distributed.checkpoint wrote, such as `torch_dist`: every tensor, its parts, and their places
in `.distcp` files. All of it is untrusted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from math import prod
from pathlib import Path

import torch

from ..common.errors import ExportError
from ..common.safe_files import check_name, inside, shown
from .safe_pickle import WAY_OUT, Inert, clear_errors, is_sizes, read_pickle

METADATA = ".metadata"
MOST_SLOTS = 20_000_000  # of all parts of a tensor: the entries of its first axes that each lies in


@dataclass(frozen=True)
class Extent:
    """Where an object lies: `length` bytes of a file from `start` on."""

    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor, from `offsets` on, and where it lies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Extent


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint; `key` as it is on disk."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]
    _slots: dict[int, dict] = field(default_factory=dict, repr=False, compare=False)

    def at(self, lead: tuple[int, ...]) -> list[Chunk]:
        """The parts that hold something of entry `lead` of its first axes."""
        axes = len(lead)
        if axes not in self._slots:
            if sum(prod(chunk.sizes[:axes]) for chunk in self.chunks) > MOST_SLOTS:
                raise ExportError(f"{shown(self.key)} has parts in more than {MOST_SLOTS:,} entries. {WAY_OUT}")
            self._slots[axes] = found = {}
            for chunk in self.chunks:
                spans = zip(chunk.offsets[:axes], chunk.sizes, strict=False)
                for one in product(*(range(offset, offset + size) for offset, size in spans)):
                    found.setdefault(one, []).append(chunk)
        return self._slots[axes].get(lead, [])


def read_metadata(
    folder: Path, passed_over: tuple[str, ...], named: Callable[[str], str] = lambda key: key
) -> tuple[dict[str, Stored], dict[str, Extent]]:
    """Name -> tensor, and name -> place of another object, but for names that begin with one of `passed_over`; or `ExportError`.

    named  key on disk -> name
    """
    path = inside(folder, METADATA)
    found = read_pickle(path)
    with clear_errors(path):
        places = _places(found.get("storage_data") if isinstance(found, Inert) else None)
        described = found.get("state_dict_metadata")
        if not isinstance(described, dict) or not all(isinstance(key, str) for key in described):
            raise ValueError("it is no list of tensors")
        kept: dict[str, str] = {}
        for key in described:
            name = named(key)
            if name.startswith(passed_over):
                continue
            check_name(key)
            if kept.setdefault(name, key) != key:
                raise ValueError(f"{shown(key)} and {shown(kept[name])} are both {shown(name)}")
        tensors = {
            name: _stored(key, described[key], places) for name, key in kept.items() if _is(described[key], "Tensor")
        }
        objects = {
            name: places[key, "None"]
            for name, key in kept.items()
            if _is(described[key], "Bytes") and (key, "None") in places
        }
        return tensors, objects


def _is(said: object, kind: str) -> bool:
    return isinstance(said, Inert) and said.name.endswith(f".{kind}StorageMetadata")


def _places(found: object) -> dict[tuple[str, str], Extent]:
    """(key, offsets) -> where it lies, from `storage_data`. Offsets as text: hashes of tuples can be chosen to be all the same."""
    if not isinstance(found, dict):
        raise ValueError("it does not say where tensors lie")
    places = {}
    for index, info in found.items():
        if not isinstance(index, Inert) or not isinstance(info, Inert) or not isinstance(index.state, dict):
            raise ValueError("it does not say where tensors lie")
        key, offsets = index.get("fqn"), index.state.get("offset")
        name, start, length = (info.get(what) for what in ("relative_path", "offset", "length"))
        if not isinstance(name, str) or not is_sizes((start, length)) or not (offsets is None or is_sizes(offsets)):
            raise ValueError(f"{shown(key)} lies nowhere")
        if info.state.get("transform_descriptors"):
            raise ValueError(f"{shown(key)} is compressed")
        if isinstance(key, str):
            places[key, str(offsets)] = Extent(name, start, length)
    return places


def _stored(key: str, said: Inert, places: dict) -> Stored:
    properties, shape, parts = (said.get(what) for what in ("properties", "size", "chunks"))
    state = getattr(properties, "state", None)
    dtype = state[0] if isinstance(state, tuple) and state else None
    if not isinstance(dtype, torch.dtype) or not is_sizes(shape) or not isinstance(parts, list):
        raise ValueError(f"{shown(key)} is no tensor")
    chunks = []
    for part in parts:
        offsets, sizes = (part.get(what) if isinstance(part, Inert) else None for what in ("offsets", "sizes"))
        if not is_sizes(offsets) or not is_sizes(sizes) or not len(offsets) == len(sizes) == len(shape):
            raise ValueError(f"a part of {shown(key)} has no place in it")
        if any(o + n > whole for o, n, whole in zip(offsets, sizes, shape, strict=True)):
            raise ValueError(f"a part of {shown(key)} is larger than it")
        if (key, str(offsets)) not in places:
            raise ValueError(f"a part of {shown(key)} lies nowhere")
        if 0 not in sizes:
            chunks.append(Chunk(offsets, sizes, places[key, str(offsets)]))
    if sum(prod(chunk.sizes) for chunk in chunks) != prod(shape):
        raise ValueError(f"the parts of {shown(key)} do not make it whole")
    return Stored(key, shape, dtype, tuple(chunks))
