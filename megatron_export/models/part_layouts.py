"""The layout of tensors whose HF parts are cut over ranks one by one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from .layouts import Layout, chunk

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ByPart(Layout):
    """The parts of a whole of `size` rows one after the other, each cut by itself into chunks of rows, as FSDP2 and the DTensors of
    tensor parallelism cut HF's tensors. A shard has a chunk of every part; a chunk that is shorter is padded.

    whole  how Megatron's tensor is made of the parts
    """

    whole: Layout
    size: int

    @property
    def parts(self) -> tuple[str, ...]:
        return self.whole.parts

    def split(self, shard: Tensor, index: int, count: int) -> dict[str, Tensor]:
        found, start = {}, 0
        for part, size in self._sizes.items():
            own = chunk(size, index, count)
            found[part] = shard[start : start + own.stop - own.start]
            start += -(-size // count)
        return found

    def part_rows(self, rows: int, index: int, count: int) -> dict[str, int]:
        cuts = ((part, chunk(size, index, count)) for part, size in self._sizes.items())
        return {part: cut.stop - cut.start for part, cut in cuts}

    @property
    def _sizes(self) -> dict[str, int]:
        """Part -> its rows, of the whole."""
        return self.whole.part_rows(self.size, 0, 1)

    def join(self, parts: dict[str, Tensor], rows: int) -> Tensor:
        return torch.cat([parts[part] for part in self.parts])

    def shard_rows(self, count: int) -> int:
        """The rows of each of `count` shards."""
        return sum(-(-size // count) for size in self._sizes.values())

    def source(self, part_rows: int, index: int, count: int, shard_rows: int) -> slice:
        return chunk(part_rows, index, count)

    def rows(self, size: int, index: int, count: int, shard_rows: int) -> tuple[slice, ...]:
        return _runs(self.whole, self.size, index, count)

    def real(self, shard: Tensor, index: int, count: int) -> Tensor:
        return torch.cat(list(self.split(shard, index, count).values()))

    @property
    def queries_per_group(self) -> int:
        """Of q, k and v."""
        return self.whole.queries_per_group

    def first_queries(self, values: Tensor) -> Tensor:
        """From one value per row of all queries, those of each group's first query."""
        return self.whole.first_queries(values)


@cache
def _runs(whole: Layout, size: int, index: int, count: int) -> tuple[slice, ...]:
    """Which rows of a whole chunk `index` of each of its parts has, in the order of the parts."""
    numbers = [rows[chunk(len(rows), index, count)] for rows in whole.split(torch.arange(size), 0, 1).values()]
    held = torch.cat(numbers)
    ends = [*(torch.nonzero(held.diff() != 1).flatten() + 1).tolist(), len(held)]
    return tuple(slice(int(held[a]), int(held[b - 1]) + 1) for a, b in pairwise([0, *ends]) if b > a)
