"""The first look at activations: their largest magnitudes, and for AWQ their maxima and means by input channel.

A maximum does not depend on the order of samples, batches or ranks, nor does a mean here: what is added up are
bfloat16 magnitudes and means of micro-batches, in float64, which holds their sums without rounding.
"""

from math import inf, isfinite

import torch
from torch import Tensor

from .errors import ExportError
from .gather import everyone, whole
from .names import cut_of
from .piece import Axis
from .statistics import channels
from .topology import Topology


class Maxima:
    """Observes linears and attentions of this rank; with `by_channel`, channel by channel.

    Linears are then shown whole sequences, so that every tensor-parallel rank has the same mean of a micro-batch.
    """

    def __init__(self, here: Topology, by_channel: bool) -> None:
        self.here = here
        self.by_channel = by_channel
        self.largest: dict[str, Tensor] = {}  # float32 []
        self.by_name: dict[str, Tensor] = {}  # float32 [channels] of this rank's shard
        self.sums: dict[str, Tensor] = {}  # float64 [channels]: sum of the means of micro-batches
        self.batches: dict[str, int] = {}

    def linear(self, name: str, weight: Tensor, inputs: Tensor) -> None:
        """Note the input of a linear, [tokens..., in]."""
        if not self.by_channel:
            self._note(self.largest, f"{name}.input_amax", _largest(inputs))
            return
        size = inputs.flatten(0, -2).to(torch.bfloat16).abs()
        self._note(self.by_name, f"{name}.input_amax", size.amax(dim=0).float())
        mean = (size.sum(dim=0, dtype=torch.float64) / size.shape[0]).to(torch.bfloat16)
        self.sums[name] = self.sums.get(name, 0) + mean.double()
        self.batches[name] = self.batches.get(name, 0) + 1

    def attention(self, name: str, key: Tensor, value: Tensor) -> None:
        """Note keys and values, [sequence, batch, groups, head_dim]."""
        self._note(self.largest, f"{name}.k_amax", _largest(key))
        self._note(self.largest, f"{name}.v_amax", _largest(value))
        if self.by_channel:
            rows = value.flatten(2).flatten(0, 1).to(torch.bfloat16)
            self._note(self.by_name, f"{name}.v_amax", rows.abs().amax(dim=0).float())

    def _note(self, noted: dict[str, Tensor], name: str, seen: Tensor) -> None:
        noted[name] = torch.maximum(noted[name], seen) if name in noted else seen

    def agreed(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The statistics over all ranks, and the mean |input| by channel of every linear, float32 [in].

        Collective. `ExportError` for NaN and Inf, naming the module.
        """
        scalars = self.largest | {name: vector.amax() for name, vector in self.by_name.items()}
        vectors = {name: self._whole(name, vector).cpu() for name, vector in sorted(self.by_name.items())}
        sums = {name: self._whole(f"{name}.input_amax", vector).cpu() for name, vector in sorted(self.sums.items())}
        shared = (vectors, sums, self.batches) if self.here.tp_rank == 0 else ({}, {}, {})
        everywhere = everyone(self.here, ({name: value.item() for name, value in scalars.items()}, *shared))
        statistics = _merged([scalars for scalars, *_ in everywhere])
        by_channel: dict[str, Tensor] = {}
        totals: dict[str, Tensor] = {}
        batches: dict[str, int] = {}
        for _, vectors, sums, counts in everywhere:
            for name, vector in vectors.items():
                self._note(by_channel, channels(name), vector)
            for name, values in sums.items():
                totals[name] = totals.get(name, 0) + values
                batches[name] = batches.get(name, 0) + counts[name]
        means = {name: (values / batches[name]).float() for name, values in totals.items()}
        return dict(sorted((statistics | by_channel).items())), means

    def _whole(self, key: str, shard: Tensor) -> Tensor:
        """A vector over all tensor-parallel ranks: row-parallel inputs are cut, and so are the values."""
        cut = key.endswith(".v_amax") or cut_of(key.removesuffix("input_amax") + "weight") is Axis.IN
        return whole(self.here, shard, 0) if cut else shard


def _largest(values: Tensor) -> Tensor:
    low, high = torch.aminmax(values)
    return torch.maximum(-low, high).float()


def _merged(everywhere: list[dict[str, float]]) -> dict[str, Tensor]:
    """The maxima over all ranks: shards of one input, replicas' shares of the data, and stages' layers alike."""
    merged: dict[str, float] = {}
    for theirs in everywhere:
        for name, value in theirs.items():
            merged[name] = max(merged.get(name, 0.0), value if isfinite(value) else inf)
    if bad := list(dict.fromkeys(name.rpartition(".")[0] for name, value in merged.items() if value == inf)):
        others = f" and of {len(bad) - 1} other modules" if bad[1:] else ""
        raise ExportError(
            f"NaN or Inf in the activations of {bad[0]}{others}. Check the weights, and that the model runs on this "
            "data in bfloat16"
        )
    return {name: torch.tensor(value) for name, value in merged.items()}
