"""The value that keeps formats and ranks apart: a tensor, and the weight axis that each of its dims follows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


class Axis(Enum):
    """An axis of a linear weight `[OUT, IN]`, as `torch.nn.Linear.weight` has them."""

    OUT = "out"
    IN = "in"


@dataclass(frozen=True)
class Piece:
    """A tensor made from a (shard of a) weight, and the weight axis that each of its dims follows; () for a scalar.

    A dim of size 1 may follow none: its axis is None.
    """

    data: Tensor
    axes: tuple[Axis | None, ...]


@dataclass(frozen=True)
class Amax:
    """The absolute maxima that a linear is quantized with: float32 scalars, the same on every rank.

    `weight` is taken over the whole fused linear (q+k+v, gate+up), `input` over all calibration tokens. `clip` is for formats with
    groups: codes of the ratios that the maxima of the groups of one (shard of a) weight are clipped to, uint8 [out, in/group].
    `scales` are what the blocks of one (shard of a) weight have already, [out/tile, in/tile], in place of those of their maxima.
    """

    weight: Tensor
    input: Tensor
    clip: Tensor | None = None
    scales: Tensor | None = None

    def strip(self, rows: slice, tile: int) -> Amax:
        """The same for some rows of the weight, which are whole tiles of so many rows, but for the last."""
        scales = None if self.scales is None else self.scales[rows.start // tile : -(-rows.stop // tile)]
        return replace(self, clip=None if self.clip is None else self.clip[rows], scales=scales)


def join(shards: list[Piece], cut: Axis | None) -> Piece:
    """One tensor from its shards in rank order, cut along `cut`; pieces that do not follow this axis are all the same."""
    axes = shards[0].axes
    if cut is None or cut not in axes or len(shards) == 1:
        return shards[0]
    return Piece(torch.cat([shard.data for shard in shards], axes.index(cut)), axes)
