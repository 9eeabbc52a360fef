"""How one Megatron tensor is cut into HF tensors, and joined again. Pure functions; every layout is invertible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch

if TYPE_CHECKING:
    from torch import Tensor


class Layout(Protocol):
    """How one Megatron tensor is made of HF parts. A part's name fills `{part}` in the rule's HF name.

    A shard is number `index` of `count` equal cuts of the rows; the whole tensor is shard 0 of 1.
    """

    parts: tuple[str, ...]
    views: ClassVar[bool] = True  # parts of a shard are views of it

    def split(self, shard: Tensor, index: int, count: int) -> dict[str, Tensor]:
        """HF part -> its rows that the shard holds."""

    def part_rows(self, rows: int, index: int, count: int) -> dict[str, int]:
        """HF part -> how many of its rows a shard of so many rows holds: those that `split` gives."""
        return dict.fromkeys(self.parts, rows)

    def join(self, parts: dict[str, Tensor], rows: int) -> Tensor:
        """The shard of `rows` rows from its HF parts: the inverse of `split`."""

    def source(self, part_rows: int, index: int, count: int, shard_rows: int) -> slice:
        """Which rows of an HF part the shard holds, so that a reader fetches only those."""
        return even_cut(part_rows, index, count)

    def rows(self, size: int, index: int, count: int, shard_rows: int) -> tuple[slice, ...]:
        """Which rows of the whole tensor, of `size` rows, the shard holds, in its order."""
        return (even_cut(size, index, count),)

    def splits(self, rows: int) -> bool:
        """Whether a shard of so many rows holds whole parts, so that it can be split by itself."""
        return True

    def gathered(self, shards: Tensor, count: int) -> Tensor:
        """The whole tensor from `count` shards that lie one after the other."""
        return shards

    def real(self, shard: Tensor, index: int, count: int) -> Tensor:
        """A shard without rows that pad it."""
        return shard


def even_cut(size: int, index: int, count: int) -> slice:
    """What shard `index` of `count` equal cuts holds of an axis of `size`."""
    return slice(index * size // count, (index + 1) * size // count)


def chunk(size: int, index: int, count: int) -> slice:
    """What chunk `index` of `count` has of an axis of `size`, as `torch.chunk` cuts it: all are as long, but for the last."""
    step = -(-size // count)
    return slice(min(index * step, size), min((index + 1) * step, size))


def stacked(parts: list[Tensor], woven: bool) -> Tensor:
    """One expert's rows of all its parts: one part after the other, or rows of the parts in turn if `woven`."""
    return torch.cat([part.unsqueeze(1) for part in parts], 1).flatten(0, 1) if woven else torch.cat(parts)


def stacked_rows(rows: slice, size: int, part: int, parts: int, woven: bool) -> slice:
    """Where the last dim of an expert's slice of such a tensor has `rows` of part number `part` of `parts`, of `size` rows each."""
    if woven:
        return slice(rows.start * parts + part, rows.stop * parts, parts)
    return slice(part * size + rows.start, part * size + rows.stop)


@dataclass(frozen=True)
class Identity(Layout):
    """The same tensor under another name."""

    parts: tuple[str, ...] = ("",)

    def split(self, shard: Tensor, index: int, count: int) -> dict[str, Tensor]:
        return {"": shard}

    def join(self, parts: dict[str, Tensor], rows: int) -> Tensor:
        return parts[""]


@dataclass(frozen=True)
class Copies(Layout):
    """The same tensor, once for each part."""

    parts: tuple[str, ...]

    def split(self, shard: Tensor, index: int, count: int) -> dict[str, Tensor]:
        return dict.fromkeys(self.parts, shard)

    def join(self, parts: dict[str, Tensor], rows: int) -> Tensor:
        return parts[self.parts[0]]


@dataclass(frozen=True)
class Vocab(Layout):
    """Rows that Megatron pads to a multiple of its choice; HF has the first `vocab` rows, perhaps several times."""

    vocab: int
    parts: tuple[str, ...] = ("",)

    def split(self, shard: Tensor, index: int, count: int) -> dict[str, Tensor]:
        return {part: shard[:rows] for part, rows in self.part_rows(shard.shape[0], index, count).items()}

    def part_rows(self, rows: int, index: int, count: int) -> dict[str, int]:
        real = self.source(self.vocab, index, count, rows)
        return dict.fromkeys(self.parts, real.stop - real.start)

    def join(self, parts: dict[str, Tensor], rows: int) -> Tensor:
        return pad_rows(parts[""], rows)

    def source(self, part_rows: int, index: int, count: int, shard_rows: int) -> slice:
        start = min(index * shard_rows, self.vocab)
        return slice(start, min(start + shard_rows, self.vocab))

    def rows(self, size: int, index: int, count: int, shard_rows: int) -> tuple[slice, ...]:
        return (self.source(self.vocab, index, count, shard_rows),)

    def real(self, shard: Tensor, index: int, count: int) -> Tensor:
        return self.split(shard, index, count)[self.parts[0]]


@dataclass(frozen=True)
class Split(Layout):
    """Equal blocks of rows, one per part: gate over up. Each rank holds its rows of every part, stacked."""

    parts: tuple[str, ...]

    def split(self, shard: Tensor, index: int, count: int) -> dict[str, Tensor]:
        return dict(zip(self.parts, shard.chunk(len(self.parts)), strict=True))

    def part_rows(self, rows: int, index: int, count: int) -> dict[str, int]:
        cuts = ((part, chunk(rows, n, len(self.parts))) for n, part in enumerate(self.parts))
        return {part: cut.stop - cut.start for part, cut in cuts}

    def join(self, parts: dict[str, Tensor], rows: int) -> Tensor:
        return torch.cat([parts[part] for part in self.parts])

    def gathered(self, shards: Tensor, count: int) -> Tensor:
        of_ranks = [shard.chunk(len(self.parts)) for shard in shards.chunk(count)]
        return torch.cat([part for parts in zip(*of_ranks, strict=True) for part in parts])

    def rows(self, size: int, index: int, count: int, shard_rows: int) -> tuple[slice, ...]:
        own = even_cut(part_rows := size // len(self.parts), index, count)
        return tuple(slice(n * part_rows + own.start, n * part_rows + own.stop) for n in range(len(self.parts)))


@dataclass(frozen=True)
class QKV(Layout):
    """Rows grouped by query group: the group's queries, its key, its value, each `head_dim` rows; then the next group.

    If `gated`, a gate for each query lies behind the queries of a group; HF has it behind its own query, in q.
    """

    queries_per_group: int
    head_dim: int
    gated: bool = False
    parts: tuple[str, ...] = ("q", "k", "v")
    views: ClassVar[bool] = False

    @property
    def _q_rows(self) -> int:
        """Of a group, with the gates."""
        return self.queries_per_group * self.head_dim * (1 + self.gated)

    def split(self, shard: Tensor, index: int, count: int) -> dict[str, Tensor]:
        rest = shard.shape[1:]
        groups = shard.view(-1, self._q_rows + 2 * self.head_dim, *rest)  # [groups, (queries + 2) * head_dim, ...]
        blocks = dict(zip(self.parts, groups.split((self._q_rows, self.head_dim, self.head_dim), dim=1), strict=True))
        if self.gated:  # [groups, queries or gates, query, row, ...]
            two = blocks["q"].unflatten(1, (2, self.queries_per_group, self.head_dim))
            blocks["q"] = two.transpose(1, 2)
        return {part: block.reshape(-1, *rest) for part, block in blocks.items()}

    def part_rows(self, rows: int, index: int, count: int) -> dict[str, int]:
        each = (self._q_rows, self.head_dim, self.head_dim)
        return {part: rows // sum(each) * size for part, size in zip(self.parts, each, strict=True)}

    def join(self, parts: dict[str, Tensor], rows: int) -> Tensor:
        groups, rest = parts["k"].shape[0] // self.head_dim, parts["k"].shape[1:]
        blocks = {part: parts[part].reshape(groups, -1, *rest) for part in self.parts}
        if self.gated:
            two = blocks["q"].unflatten(1, (self.queries_per_group, 2, self.head_dim))
            blocks["q"] = two.transpose(1, 2).reshape(groups, -1, *rest)
        return torch.cat(list(blocks.values()), dim=1).reshape(-1, *rest)

    def splits(self, rows: int) -> bool:
        """With more ranks than query groups, Megatron cuts within a group."""
        return rows % (self._q_rows + 2 * self.head_dim) == 0

    def first_queries(self, values: Tensor) -> Tensor:
        """From one value per row of all queries, those of each group's first query: as many as v has rows."""
        return values.view(-1, self.queries_per_group, self.head_dim)[:, 0].reshape(-1)

    def same_in_group(self, values: Tensor) -> Tensor:
        """One value per row of all queries, each replaced by the mean over the queries of its group."""
        groups = values.view(-1, self.queries_per_group, self.head_dim)
        return groups.mean(dim=1, keepdim=True).expand_as(groups).reshape(-1)


def pad_rows(tensor: Tensor, rows: int) -> Tensor:
    """A tensor with zeros behind it, so that it has so many rows; itself if it has them: an embedding is no small thing to copy."""
    if tensor.shape[0] == rows:
        return tensor
    return torch.nn.functional.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, rows - tensor.shape[0]))


@dataclass(frozen=True)
class Fused(Layout):
    """One HF tensor of `sizes` rows of each part of another layout, one part after the other (Phi)."""

    inner: Layout
    sizes: tuple[int, ...]
    parts: tuple[str, ...] = ("",)
    views: ClassVar[bool] = False

    def split(self, shard: Tensor, index: int, count: int) -> dict[str, Tensor]:
        return {"": torch.cat(list(self.inner.split(shard, 0, 1).values()))}

    def join(self, parts: dict[str, Tensor], rows: int) -> Tensor:
        return self.inner.join(dict(zip(self.inner.parts, parts[""].split(self.sizes), strict=True)), rows)

    def rows(self, size: int, index: int, count: int, shard_rows: int) -> tuple[slice, ...]:
        return self.inner.rows(size, index, count, shard_rows)

    def splits(self, rows: int) -> bool:
        """Only who has all rows can put them into HF's order."""
        return rows == sum(self.sizes)

    def gathered(self, shards: Tensor, count: int) -> Tensor:
        return self.inner.gathered(shards, count)
