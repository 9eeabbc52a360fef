"""Shards of a live model with its LoRA adapters merged, made when they are asked for: no second copy of the model is held."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from ..common.errors import ExportError, report
from ..common.shards import Shards
from ..distributed.collectives import everyone, together, whole
from ..distributed.topology import Topology
from ..models import is_expert
from ..models.lora import Adapter, merged, misfits
from .addons import adapters_of, is_quantized
from .model import Model


def adapted(here: Topology, model: Model, shards: Shards, merge: bool) -> Mapping[str, Tensor]:
    """The shards, with the adapters of the model merged if `merge`. Collective.

    `ExportError` if there are adapters and `merge` is not given, the reverse, and for adapters beside ModelOpt's quantizers.
    """
    with together(here, "read the model's adapters"):
        found = {
            name: [_read(here, name, adapter) for adapter in some]
            for name, some in adapters_of(model).items()
            if f"{name}.weight" in shards
        }
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
    shapes = shards.shapes
    made = {
        f"{name}.weight": [_whole(here, name, adapter, shapes[f"{name}.weight"][0]) for adapter in found[name]]
        for name in found
    }
    with together(here, "read the model's adapters"):
        factors = [(name, one) for name, some in made.items() for one in some]
        report([t for n, a in factors for t in misfits(n, shapes[n], a.rank, a.second.shape, a.first.shape)])
    return Merged(shards, made)


class Merged(Mapping[str, Tensor]):
    """Shards by canonical name, some of them with `adapters` merged: new tensors, every time."""

    def __init__(self, shards: Shards, adapters: dict[str, list[Adapter]]) -> None:
        self.shards = shards
        self.adapters = adapters

    def __getitem__(self, name: str) -> Tensor:
        return merged(self.shards[name], self.adapters[name]) if name in self.adapters else self.shards[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shards)

    def __len__(self) -> int:
        return len(self.shards)


def _read(here: Topology, name: str, adapter: Adapter) -> Adapter:
    """An adapter with factors that are plain tensors."""
    names = (f"the first factor of the adapter of {name}", f"the second factor of the adapter of {name}")
    factors = Shards(dict(zip(names, (adapter.first, adapter.second), strict=True))).readable(here.device)
    return replace(adapter, first=factors[names[0]], second=factors[names[1]])


def _whole(here: Topology, name: str, adapter: Adapter, rows: int) -> Adapter:
    """An adapter with what a shard of so many rows of the weight needs of it: all ranks, and as many rows. Collective."""
    cut = here.cut(is_expert(f"{name}."))
    first, second = adapter.first, adapter.second
    if first.shape[0] * cut.size == adapter.rank:
        first = whole(cut, first, 0)
    if second.shape[0] * cut.size == rows:
        second = whole(cut, second, 0)
    return replace(adapter, first=first, second=second)


def _said(names: Iterable[str]) -> str:
    some = list(names)
    return f"the model has LoRA adapters on {some[0]} ({len(some)} in all)"
