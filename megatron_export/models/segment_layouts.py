"""Layouts of linear attention and Mamba: a tensor of segments that are cut each by itself, and a norm with another zero."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, islice
from typing import TYPE_CHECKING, ClassVar

import torch

from .layouts import Layout, even_cut

if TYPE_CHECKING:
    from torch import Tensor


def segment_rows(sizes: tuple[int, ...], index: int, count: int) -> tuple[slice, ...]:
    """Which rows shard `index` of `count` has of a tensor of segments, each of which is cut by itself."""
    ends = tuple(accumulate(sizes))
    own = ((end - size, even_cut(size, index, count)) for end, size in zip(ends, sizes, strict=True))
    return tuple(slice(start + cut.start, start + cut.stop) for start, cut in own)


@dataclass(frozen=True)
class Segments(Layout):
    """Rows of several segments, of `sizes` rows each: every rank holds its rows of the first, then of the second, and so on.

    HF has whole segments, as many in each part as `held` says.
    """

    sizes: tuple[int, ...]
    held: tuple[int, ...]
    parts: tuple[str, ...] = ("",)

    def split(self, shard: Tensor, index: int, count: int) -> dict[str, Tensor]:
        sizes = self.part_rows(shard.shape[0], index, count)
        return dict(zip(self.parts, shard.split(list(sizes.values())), strict=True))

    def part_rows(self, rows: int, index: int, count: int) -> dict[str, int]:
        sizes = iter(self.sizes)
        own = [sum(islice(sizes, many)) * rows // sum(self.sizes) for many in self.held]
        return dict(zip(self.parts, own, strict=True))

    def join(self, parts: dict[str, Tensor], rows: int) -> Tensor:
        return torch.cat([parts[part] for part in self.parts])

    def rows(self, size: int, index: int, count: int, shard_rows: int) -> tuple[slice, ...]:
        return segment_rows(self.sizes, index, count)

    def splits(self, rows: int) -> bool:
        """A part of several segments is no row of shards: only who has all of it can take it apart."""
        return rows == sum(self.sizes) or set(self.held) == {1}

    def gathered(self, shards: Tensor, count: int) -> Tensor:
        rows = [size // count for size in self.sizes]
        of_ranks = [shard.split(rows) for shard in shards.chunk(count)]
        return torch.cat([torch.cat(segment) for segment in zip(*of_ranks, strict=True)])


@dataclass(frozen=True)
class Heads(Layout):
    """Segments of a row of heads: Megatron has the first segment of all heads of a rank, then their second, and so on; HF has all
    segments of the first head, of so many rows each, then those of the second.
    """

    widths: tuple[int, ...]
    parts: tuple[str, ...] = ("",)
    views: ClassVar[bool] = False

    def split(self, shard: Tensor, index: int, count: int) -> dict[str, Tensor]:
        heads, rest = shard.shape[0] // sum(self.widths), shard.shape[1:]
        segments = shard.split([heads * width for width in self.widths])
        return {"": torch.cat([one.reshape(heads, -1, *rest) for one in segments], dim=1).reshape(-1, *rest)}

    def join(self, parts: dict[str, Tensor], rows: int) -> Tensor:
        rest = parts[""].shape[1:]
        segments = parts[""].reshape(-1, sum(self.widths), *rest).split(self.widths, dim=1)
        return torch.cat([one.reshape(-1, *rest) for one in segments])

    def rows(self, size: int, index: int, count: int, shard_rows: int) -> tuple[slice, ...]:
        heads = size // sum(self.widths)
        return segment_rows(tuple(heads * width for width in self.widths), index, count)


@dataclass(frozen=True)
class OneMore(Layout):
    """The same numbers plus 1; sums in float32, which bfloat16 may round."""

    parts: tuple[str, ...] = ("",)
    views: ClassVar[bool] = False

    def split(self, shard: Tensor, index: int, count: int) -> dict[str, Tensor]:
        numbers = shard.is_floating_point()  # those of rows are as they are
        return {"": (shard.float() + 1).to(shard.dtype) if numbers else shard}

    def join(self, parts: dict[str, Tensor], rows: int) -> Tensor:
        return (parts[""].float() - 1).to(parts[""].dtype)
