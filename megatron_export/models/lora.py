"""LoRA adapters, and the weights that they are merged into.

The product is taken in float64 from whole factors. Float64 holds products and sums of bfloat16 numbers without rounding, unless
they differ by more than 2^30, so every topology merges to the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..common.strips import row_strips

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter of one linear as a rank holds it: `scale * second @ first` is added to its weight.

    first [rank, in] and second [out, rank] are whole, or shards along `in` and `out`.
    """

    first: Tensor
    second: Tensor
    rank: int
    scale: float


def merged(weight: Tensor, adapters: list[Adapter]) -> Tensor:
    """The weight [out, in], or a shard of it, plus scale * second @ first of each adapter; in the weight's dtype."""
    made = torch.empty_like(weight)
    exact = {"device": weight.device, "dtype": torch.float64}
    factors = [(adapter.scale, adapter.second.to(**exact), adapter.first.to(**exact)) for adapter in adapters]
    for rows in row_strips(weight, 1):
        total = weight[rows].double()
        for scale, second, first in factors:
            total += scale * (second[rows] @ first)
        made[rows] = total.to(weight.dtype)
    return made


def misfits(name: str, weight: Sequence[int], rank: int, second: Sequence[int], first: Sequence[int]) -> list[str]:
    """What is wrong with the shapes of an adapter's factors for a [out, in] weight or shard; [] if they fit."""
    fits, sizes = ((weight[0], rank), (rank, weight[1])), (tuple(second), tuple(first))
    found = f"the adapter of {name} is {sizes[0]} times {sizes[1]}"
    return [] if sizes == fits else [f"{found}, and a product of {fits[0]} and {fits[1]} was expected"]
