"""Shards with their LoRA adapters merged, made whenever they are asked for, so that no second copy of the model is held.

The product is taken in float64 from whole factors: those of bfloat16 have products and sums of ranks that float64 holds
without rounding, unless their sizes are more than 2^30 apart, so that every topology merges to the same bytes.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from .additions import Adapter, adapters_of, is_quantized
from .errors import ExportError, report
from .formats.form import row_strips
from .gather import everyone, together, whole
from .names import is_expert
from .topology import Topology


def adapted(
    here: Topology, model: nn.Module | list[nn.Module], shards: dict[str, Tensor], merge: bool
) -> Mapping[str, Tensor]:
    """The shards, with the adapters of the model merged if that is asked for. Collective.

    `ExportError` where a model has adapters and it is not, or the reverse.
    """
    with together(here, "read the model's adapters"):
        found = {name: some for name, some in adapters_of(model).items() if f"{name}.weight" in shards}
        if found and is_quantized(model):
            raise ExportError(
                f"{_said(found)}, and ModelOpt's quantizers, which were calibrated without them. Merge the adapters into the "
                "model, calibrate the quantizers again, and export that"
            )
    names = sorted({name for theirs in everyone(here, list(found)) for name in theirs})
    with together(here, "read the model's adapters"):
        if names and not merge:
            raise ExportError(f"{_said(names)}, which a checkpoint has no place for. Merge them with merge_lora=True")
        if merge and not names:
            raise ExportError("merge_lora has no effect: the model has no LoRA adapters. Leave it out")
    if not names:
        return shards
    made = {
        f"{name}.weight": [_whole(here, name, adapter, shards[f"{name}.weight"]) for adapter in found[name]]
        for name in found
    }
    with together(here, "read the model's adapters"):
        report([text for name, some in made.items() for one in some for text in _problems(name, shards[name], one)])
    return Merged(shards, made)


class Merged(Mapping[str, Tensor]):
    """Shards by canonical name, some of them with `adapters` merged: new tensors, every time."""

    def __init__(self, shards: dict[str, Tensor], adapters: dict[str, list[Adapter]]) -> None:
        self.shards = shards
        self.adapters = adapters

    def __getitem__(self, name: str) -> Tensor:
        return merged(self.shards[name], self.adapters[name]) if name in self.adapters else self.shards[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shards)

    def __len__(self) -> int:
        return len(self.shards)


def merged(weight: Tensor, adapters: list[Adapter]) -> Tensor:
    """weight + the sum of scale * second @ first over its adapters, of a [out, in] weight or a shard of one, in its dtype."""
    made = torch.empty_like(weight)
    exact = {"device": weight.device, "dtype": torch.float64}
    factors = [(adapter.scale, adapter.second.to(**exact), adapter.first.to(**exact)) for adapter in adapters]
    for rows in row_strips(weight, 1):
        total = weight[rows].double()
        for scale, second, first in factors:
            total += scale * (second[rows] @ first)
        made[rows] = total.to(weight.dtype)
    return made


def _whole(here: Topology, name: str, adapter: Adapter, weight: Tensor) -> Adapter:
    """An adapter with what this rank's shard of the weight needs of it: all ranks, and as many rows as the shard. Collective."""
    cut = here.cut(is_expert(f"{name}."))
    first, second = adapter.first.detach(), adapter.second.detach()
    if first.shape[0] * cut.size == adapter.rank:
        first = whole(cut, first, 0)
    if second.shape[0] * cut.size == weight.shape[0]:
        second = whole(cut, second, 0)
    return replace(adapter, first=first, second=second)


def _problems(name: str, weight: Tensor, adapter: Adapter) -> list[str]:
    """What is wrong with the sizes of an adapter."""
    fits = (weight.shape[0], adapter.rank), (adapter.rank, weight.shape[1])
    sizes = tuple(adapter.second.shape), tuple(adapter.first.shape)
    if sizes == fits:
        return []
    return [
        f"the adapter of {name} is {sizes[0]} times {sizes[1]}, and a product of {fits[0]} and {fits[1]} was expected"
    ]


def _said(names: Iterable[str]) -> str:
    some = list(names)
    return f"the model has LoRA adapters on {some[0]} ({len(some)} in all)"
