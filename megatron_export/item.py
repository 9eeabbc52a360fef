"""One Megatron parameter on its way to HF tensors: split on the shard, encoded, sent, joined.

Shapes are not written down a second time: an item runs the real surgery and the real encoders on meta tensors to say
what each rank sends and what comes out.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from types import ModuleType

import torch
from torch import Tensor

from . import formats
from .formats import FORMATS, bf16
from .layout import Layout
from .names import Source
from .piece import Amax, Axis, Piece, join


@dataclass(frozen=True)
class Output:
    """One tensor of the checkpoint, or of a message between ranks."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    axes: tuple[Axis, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Item:
    """One canonical parameter and the HF tensors it becomes.

    `form` is the format it is quantized with, None for one that stays bfloat16; `kv` the format of the cache scales
    that go beside it. `gather_first`: a tile of the format straddles two shards, so the shards travel to the first
    rank in bfloat16 and are encoded there.
    """

    source: Source
    ranks: tuple[int, ...]
    shard_shape: tuple[int, ...]
    form: ModuleType | None
    kv: ModuleType | None
    gather_first: bool

    def split(self, shard: Tensor, index: int) -> dict[str, Piece]:
        """The bfloat16 part of every HF tensor that shard `index` holds, by HF tensor name."""
        parts = self.source.layout.split(shard, index, len(self.ranks))
        names = self.source.names()
        return {names[part]: bf16.encode(tensor)["weight"] for part, tensor in parts.items()}

    def encode(self, parts: dict[str, Piece], amax: Amax | None, kv_amax: tuple[Tensor, ...]) -> dict[str, Piece]:
        """HF parts (of one shard, or whole) -> the tensors of the checkpoint, by name."""
        encoded = {}
        for name, part in parts.items():
            if self.form is None:
                encoded[name] = part
                continue
            for suffix, piece in formats.encode(self.form, part.data, amax).items():
                encoded[name.removesuffix("weight") + suffix] = piece
        if self.kv is not None:
            attention = next(iter(parts)).rsplit(".", 2)[0]
            for name, scale in self.kv.encode(*kv_amax).items():
                encoded[f"{attention}.{name}"] = Piece(scale, ())
        return encoded

    def join(self, shards: list[dict[str, Piece]]) -> dict[str, Piece]:
        """Whole tensors from what the ranks sent, in shard order."""
        return {name: join([shard[name] for shard in shards if name in shard], self.source.cut) for name in shards[0]}

    def raw_message(self, index: int) -> tuple[Output, ...]:
        """What shard `index` sends to the first rank when the item is gathered first."""
        specs = _split_specs(self.source.layout, self.shard_shape, index, len(self.ranks))
        names = self.source.names()
        return tuple(Output(names[part], torch.bfloat16, shape, axes) for part, shape, axes in specs)

    def message(self, index: int) -> tuple[Output, ...]:
        """What shard `index` sends to the writer: tensors that do not follow the cut axis come from shard 0 alone."""
        if self.gather_first:
            return self.outputs if index == 0 else ()
        return tuple(o for o in self._encoded(self.raw_message(index)) if index == 0 or self.source.cut in o.axes)

    @cached_property
    def parts(self) -> tuple[Output, ...]:
        """The HF tensors of this item, whole, before they are encoded."""
        whole = self.join([_meta(self.raw_message(index)) for index in range(len(self.ranks))])
        return tuple(
            Output(name, piece.data.dtype, tuple(piece.data.shape), piece.axes) for name, piece in whole.items()
        )

    @cached_property
    def outputs(self) -> tuple[Output, ...]:
        """The tensors of the checkpoint that this item becomes."""
        return self._encoded(self.parts)

    def _encoded(self, parts: tuple[Output, ...]) -> tuple[Output, ...]:
        scalar = torch.empty((), device="meta")
        encoded: list[Output] = []
        kv = self.kv
        for part in parts if self.form else ():
            prefix = part.name.removesuffix("weight")
            encoded += [Output(prefix + suffix, *spec) for suffix, *spec in _encode_specs(self.form.NAME, part.shape)]
        encoded += parts if self.form is None else ()
        if kv is not None:
            attention = parts[0].name.rsplit(".", 2)[0]
            encoded += [Output(f"{attention}.{name}", s.dtype, (), ()) for name, s in kv.encode(scalar, scalar).items()]
        return tuple(encoded)


def _meta(outputs: tuple[Output, ...]) -> dict[str, Piece]:
    return {o.name: Piece(torch.empty(o.shape, dtype=o.dtype, device="meta"), o.axes) for o in outputs}


@cache
def _split_specs(layout: Layout, shape: tuple[int, ...], index: int, count: int) -> tuple:
    parts = layout.split(torch.empty(shape, dtype=torch.bfloat16, device="meta"), index, count)
    pieces = {part: bf16.encode(tensor)["weight"] for part, tensor in parts.items()}
    return tuple((part, tuple(piece.data.shape), piece.axes) for part, piece in pieces.items())


@cache
def _encode_specs(form: str, shape: tuple[int, ...]) -> tuple:
    tile = FORMATS[form].TILE
    if any(size % block for size, block in zip(shape, tile, strict=True)):
        return ()  # reported as a problem, or gathered first
    scalar = torch.empty((), device="meta")
    weight = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    pieces = formats.encode(FORMATS[form], weight, Amax(scalar, scalar))
    return tuple((suffix, p.data.dtype, tuple(p.data.shape), p.axes) for suffix, p in pieces.items())
