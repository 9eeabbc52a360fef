"""The value that keeps formats and ranks apart: a tensor, and the weight axis that each of its dims follows."""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class Axis(Enum):
    """An axis of a linear weight `[OUT, IN]`, as `torch.nn.Linear.weight` has them."""

    OUT = "out"
    IN = "in"


@dataclass(frozen=True)
class Piece:
    """A tensor made from a (shard of a) weight, and the weight axis that each of its dims follows; () for a scalar."""

    data: Tensor
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Amax:
    """The absolute maxima that a linear is quantized with: float32 scalars, the same on every rank.

    `weight` is taken over the whole fused linear (q+k+v, gate+up), `input` over all calibration tokens.
    """

    weight: Tensor
    input: Tensor


def join(shards: list[Piece], cut: Axis | None) -> Piece:
    """Put one tensor back together from its shards, in rank order, that were cut along `cut`.

    A piece that does not follow the cut axis is the same on every rank, so the first stands for all.
    """
    axes = shards[0].axes
    if cut not in axes or len(shards) == 1:
        return shards[0]
    return Piece(torch.cat([shard.data for shard in shards], dim=axes.index(cut)), axes)
