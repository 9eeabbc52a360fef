"""The first look at activations: their largest magnitudes, and for AWQ their maxima and means by input channel.

Neither depends on the order of samples, batches or ranks: float64 holds the sums of bfloat16 magnitudes without rounding.
"""

from collections.abc import Iterable
from math import inf, isfinite

import torch
from torch import Tensor

from ..common.errors import ExportError
from ..common.piece import Axis
from ..distributed.collectives import everyone, maximum, spread, total, whole
from ..distributed.topology import ProcessGroup, Topology
from ..models import HEAD, cut_of, is_expert, pooled, vector_home
from ..models.statistic_names import channels, input_key, kv_keys, tokens_key


class Maxima:
    """Observes linears and attentions of this rank; with `by_channel`, channel by channel too, and on whole sequences, so that
    every tensor-parallel rank has the same mean of a micro-batch.

    experts  the global numbers of this rank's experts
    repeats  how many ranks of the stage are shown the same token of an expert
    groups   the query groups of the whole model
    """

    def __init__(
        self, here: Topology, by_channel: bool, experts: Iterable[int] = (), repeats: int = 1, groups: int = 0
    ) -> None:
        self.here = here
        self.whole_sequences = self.by_channel = by_channel
        self.numbers = torch.tensor(list(experts), dtype=torch.int64)
        self.repeats = repeats
        self.groups = groups
        self.amaxes: dict[str, Tensor] = {}  # [] on the device: nothing is waited for until all has been seen
        self.inputs: dict[str, Tensor] = {}  # float32 [in] of this rank's shard
        self.values: dict[str, Tensor] = {}  # float32 [rows of v] of this rank's shard
        self.sums: dict[str, Tensor] = {}  # float64 [in]: sum of the means of micro-batches, or over an expert's tokens
        self.counts: dict[str, int] = {}  # of what was summed
        self.tokens: dict[str, Tensor] = {}  # int64 [experts]

    def linear(self, name: str, weight: Tensor, inputs: Tensor) -> None:
        """Note the input of a linear, [tokens..., in]; the experts of a layer are noted as one."""
        name, expert = pooled(name), is_expert(name)
        inputs = inputs.flatten(0, -2)
        tokens = inputs.shape[0]
        if not tokens:  # of an expert: zeros change neither a maximum nor a sum
            inputs = inputs.new_zeros(1, inputs.shape[1])
        self._note_amax(input_key(name), inputs)
        if not self.by_channel or f"{name}.weight" == HEAD:
            return
        size = inputs.to(torch.bfloat16).abs()
        _note(self.inputs, name, size.amax(dim=0).float())
        if vector_home(name) == name:
            sums = size.sum(dim=0, dtype=torch.float64)
            sums = sums if expert else (sums / tokens).to(torch.bfloat16).double()
            self.sums[name] = self.sums.get(name, 0) + sums
            self.counts[name] = self.counts.get(name, 0) + (tokens if expert else 1)

    def attention(self, name: str, key: Tensor, value: Tensor) -> None:
        """Note keys and values, [sequence, batch, groups, head_dim]."""
        for amax, values in zip(kv_keys(name), (key, value), strict=True):
            self._note_amax(amax, values)
        if self.by_channel:
            rows = value.flatten(2).flatten(0, 1).to(torch.bfloat16)
            _note(self.values, name, rows.abs().amax(dim=0).float())

    def experts(self, name: str, tokens: Tensor) -> None:
        """Note how many tokens each of this rank's experts was given."""
        self.tokens[name] = self.tokens.get(name, 0) + tokens.to(torch.int64)

    def agreed(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The statistics over all ranks, and the mean |input| by channel of every smoothing vector, float32 [in].

        Collective. `ExportError` for NaN and Inf, naming the module.
        """
        statistics = _merged(everyone(self.here, self._scalars()))
        mine, means = {}, {}
        for name, vector in sorted(self.values.items()):
            rows = maximum(whole(self.here.cut(False), vector, 0), self.here.dp_group)
            mine[channels(kv_keys(name)[1])] = self._once(rows)
        for name, vector in sorted(self.inputs.items()):
            mine[channels(input_key(name))] = maximum(self._whole(name, vector), self._sharing(name))
        for name, sums in sorted(self.sums.items()):
            count = total(torch.tensor(self.counts[name], device=sums.device), self._sharing(name))
            means[name] = (total(self._whole(name, sums), self._sharing(name)) / count).float()
        for name, tokens in sorted(self.tokens.items()):
            counts = torch.zeros(len(self.numbers) * self.here.ep_size, dtype=torch.int64)
            counts[self.numbers] = tokens.cpu()
            counts = total(counts.to(self.here.device), self.here.stage_group)
            mine[tokens_key(name)] = counts // self.repeats
        return dict(sorted((statistics | spread(self.here, mine)).items())), spread(self.here, means)

    def _note_amax(self, name: str, values: Tensor) -> None:
        """Note the largest magnitude of some values, in one pass over them; NaN and Inf stay visible."""
        low, high = torch.aminmax(values)
        _note(self.amaxes, name, torch.maximum(-low, high))

    def _scalars(self) -> dict[str, float]:
        """The largest magnitudes that this rank has seen, fetched from the device at once."""
        seen = [amax.float() for amax in self.amaxes.values()]
        return dict(zip(self.amaxes, torch.stack(seen).tolist(), strict=True)) if seen else {}

    def _once(self, rows: Tensor) -> Tensor:
        """The rows of v of all ranks without repetition: with more ranks than query groups, several see the same group."""
        same = max(self.here.tp_size // self.groups, 1) if self.groups else 1
        return rows.view(-1, same, rows.shape[0] // self.here.tp_size).amax(dim=1).flatten() if same > 1 else rows

    def _sharing(self, name: str) -> ProcessGroup:
        """The ranks that saw other inputs of what has this name: replicas, and for experts all ranks of the stage."""
        return self.here.stage_group if is_expert(f"{name}.") else self.here.dp_group

    def _whole(self, name: str, shard: Tensor) -> Tensor:
        """A vector of inputs over all tensor-parallel ranks: those of row-parallel linears are cut."""
        cut = self.here.cut(is_expert(f"{name}."))
        return whole(cut, shard, 0) if cut_of(f"{name}.weight") is Axis.IN else shard


def _note(noted: dict[str, Tensor], name: str, seen: Tensor) -> None:
    noted[name] = torch.maximum(noted[name], seen) if name in noted else seen


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
