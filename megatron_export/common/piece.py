"""The value that keeps formats and ranks apart: a tensor, and the weight axis that each of its dims follows."""

from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor


class Axis(Enum):
    """An axis of a linear weight `[OUT, IN]`, as `torch.nn.Linear.weight` has them."""

    OUT = "out"
    IN = "in"


@dataclass(frozen=True)
class Piece:
    """A tensor made from a (shard of a) weight, and the weight axis that each of its dims follows; () for a scalar.

    None stands for a dim of size 1 that follows neither.
    """

    data: Tensor
    axes: tuple[Axis | None, ...]


@dataclass(frozen=True)
class Amax:
    """The absolute maxima that a linear is quantized with: float32 scalars, the same on every rank.

    `weight` is taken over the whole fused linear (q+k+v, gate+up), `input` over all calibration tokens. `clip` belongs to
    one (shard of a) weight and to formats with groups: uint8 [out, in/group] codes of the ratios that its groups' own
    maxima are clipped to, or None.
    """

    weight: Tensor
    input: Tensor
    clip: Tensor | None = None

    def strip(self, rows: slice) -> "Amax":
        """The same for some rows of the weight."""
        return replace(self, clip=self.clip[rows])


def join(shards: list[Piece], cut: Axis | None) -> Piece:
    """Put one tensor back together from its shards, in rank order, that were cut along `cut`.

    A piece that does not follow the cut axis is the same on every rank, so the first stands for all.
    """
    axes = shards[0].axes
    if cut is None or cut not in axes or len(shards) == 1:
        return shards[0]
    return Piece(torch.cat([shard.data for shard in shards], dim=axes.index(cut)), axes)
