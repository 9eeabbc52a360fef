"""The second look at activations: AWQ's search for alpha, and with it for the smoothing vector.

Each linear is compared with itself as it is called: its output with a rounded weight against its output without; where it is called
with many tokens, by the square of its inputs (formats/awq_gram.py). Nothing is kept but losses. An alpha's loss is the mean squared
difference of the bfloat16 outputs of a micro-batch, rounded to float32 and summed over micro-batches in float64, which rounds
nothing: it does not matter which replica saw which. The first smallest loss wins. Linears that read one norm share their vector,
and so do the experts of a layer: the loss is that of all of them. An expert's loss is the mean over all tokens that it was given;
its squares add up in float64, nearly exactly.

Under tensor parallelism the loss is that of the whole linear. Column-parallel ranks add up the squares of their rows. Row-parallel
ranks add up partial products in float32, and only then round and square; for the square they gather the inputs, and each takes some
rows of the weight. If a group lies on two ranks, both gather weight and input. Vectors are made on the CPU. Only the order in which
products are summed depends on the topology.
Source: AWQ, arXiv 2306.00978; ModelOpt 0.47's awq_lite, there per rank.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.errors import ExportError
from ..common.piece import Axis
from ..distributed.collectives import everyone, maximum, spread, total, whole
from ..distributed.topology import Cut, Topology
from ..formats import awq, awq_gram
from ..formats.awq import ALPHAS, SHARED, search_of
from ..models import cut_of, is_expert, pooled, vector_home
from ..models.layouts import even_cut
from ..models.statistic_names import alpha_key, losses_key, vector_key
from .observer import Observer


@dataclass(frozen=True)
class LinearShard:
    """What this rank has of one linear: bfloat16 `weight` [out, in] and `inputs` [tokens, in], cut along `axis`."""

    cut: Cut
    axis: Axis | None
    weight: Tensor
    inputs: Tensor

    @classmethod
    def of(
        cls, cut: Cut, name: str, weight: Tensor, inputs: Tensor, group: int, held_whole: bool = False
    ) -> "LinearShard | None":
        """The shard, or the whole linear where a group of inputs lies on two shards; None where the inputs make no whole groups."""
        axis = cut_of(f"{name}.weight") if cut.size > 1 and not held_whole else None
        if weight.shape[1] * (cut.size if axis is Axis.IN else 1) % group:
            return None  # such a linear cannot be exported in the format, and may be left out of it
        weight, inputs = weight.detach().to(torch.bfloat16), inputs.flatten(0, -2).to(torch.bfloat16)
        if axis is Axis.IN and weight.shape[1] % group:
            return cls(cut, None, *_whole_inputs(cut, weight, inputs))
        return cls(cut, axis, weight, inputs)

    @property
    def rows(self) -> int:
        """Outputs of the whole linear."""
        return self.weight.shape[0] * (self.cut.size if self.axis is Axis.OUT else 1)

    @property
    def columns(self) -> int:
        """Inputs of the whole linear."""
        return self.weight.shape[1] * (self.cut.size if self.axis is Axis.IN else 1)

    def with_whole_inputs(self) -> "LinearShard":
        """The same linear, where ranks that had some of the inputs each have all for some of the rows, or for all."""
        if self.axis is not Axis.IN:
            return self
        weight, inputs = _whole_inputs(self.cut, self.weight, self.inputs)
        if len(weight) % self.cut.size:
            return LinearShard(self.cut, None, weight, inputs)
        return LinearShard(self.cut, Axis.OUT, weight.chunk(self.cut.size)[self.cut.rank].clone(), inputs)

    def importance(self, group: int) -> Tensor:
        """AWQ's |w| / largest |w| of its group, summed over the rows of the whole linear: float64 [in], exact."""
        sums = awq.importance(self.weight, group)
        if self.axis is Axis.OUT:
            return total(sums, self.cut.group)
        return whole(self.cut, sums, 0) if self.axis is Axis.IN else sums

    def mine_of(self, vectors: Tensor) -> Tensor:
        """What this shard has of vectors [..., in], on its device."""
        mine = even_cut(vectors.shape[-1], self.cut.rank, self.cut.size) if self.axis is Axis.IN else slice(None)
        return vectors[..., mine].to(self.weight.device)

    def product(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """inputs @ weight.T, float32 or bfloat16: the rows of this shard, or whole where the inputs are cut."""
        if self.axis is Axis.IN:
            return total(awq.float32_product(inputs, weight), self.cut.group)
        with _rounded_once():
            return inputs @ weight.T

    def difference(self, product: Tensor, expected: Tensor) -> Tensor:
        """Sum of the squares of the differences of bfloat16 outputs over the whole linear, float64 []."""
        square = awq.squares(product, expected)
        return total(square, self.cut.group) if self.axis is Axis.OUT else square

    def mean(self, squares: Tensor) -> Tensor:
        """Means over all outputs of sums of squares, float32 values as float64."""
        return (squares / (self.inputs.shape[0] * self.rows)).float().double()

    def amaxes(self, weight: Tensor, factors: Tensor) -> Tensor:
        """Largest magnitudes of the whole weight times each of some bfloat16 factors [alphas, in]: float32 [alphas]."""
        mine = awq.largest(weight, factors)
        return maximum(mine, self.cut.group) if self.axis is not None else mine


def _whole_inputs(cut: Cut, *shards: Tensor) -> list[Tensor]:
    """Weights and inputs of which each rank has a part of the columns, in the memory that they have where nothing is cut."""
    return [whole(cut, shard, 1).contiguous() for shard in shards]


@contextmanager
def _rounded_once() -> Iterator[None]:
    """bfloat16 products on CUDA are rounded when all is summed: by default partial sums may be, too."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_bf16_reduced_precision_reduction
    settings.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        settings.allow_bf16_reduced_precision_reduction = before


class Alphas(Observer):
    """Observes linears and finds the alpha of each smoothing vector. Collective.

    means          vector -> mean |input| by channel, float32 [in] on the CPU
    searches       linear -> its searches; one that ends in `_shared` has the same factors for all queries of a group
    same_in_group  replaces the numbers of a group's queries by their mean
    weights        all linears of this rank by canonical name
    topk           how many experts a token is given to
    held_whole     the linears that every rank holds whole
    """

    whole_sequences = True

    def __init__(
        self,
        here: Topology,
        means: dict[str, Tensor],
        searches: Callable[[str], tuple[str, ...]],
        same_in_group: Callable[[Tensor], Tensor],
        weights: dict[str, Tensor],
        topk: int = 1,
        held_whole: AbstractSet[str] = frozenset(),
    ) -> None:
        self.here = here
        self.searches = searches
        self.topk = topk
        self.held_whole = held_whole
        self.losses: dict[tuple[str, str], Tensor] = {}  # float64 [alphas]
        self.counts: dict[tuple[str, str], int] = {}  # of micro-batches, or of outputs of experts
        self.outputs: dict[str, int] = {}  # that a linear, or a layer's experts, make of one token
        self.factors = {  # s of each alpha, float32 [alphas, in], by vector and search
            (home, key): self._factors(means[home], mean, key, same_in_group)
            for (home, key), mean in self._importance(weights).items()
        }

    def _importance(self, weights: dict[str, Tensor]) -> dict[tuple[str, str], Tensor]:
        """The mean importance of every input channel, over the rows of a linear or of all experts of its layer."""
        sums: dict[tuple[str, str], Tensor] = {}
        rows: Counter[tuple[str, str]] = Counter()
        for name, weight in weights.items():
            if vector_home(name) != pooled(name):
                continue
            for key in self.searches(name):
                group, cut = search_of(key).group, self.here.cut(is_expert(name))
                if shard := LinearShard.of(cut, name, weight, weight[:1], group, name in self.held_whole):
                    sums[pooled(name), key] = sums.get((pooled(name), key), 0) + shard.importance(group)
                    rows[pooled(name), key] += shard.rows
        for home, key in sorted(sums):
            if is_expert(f"{home}."):  # of which every rank of the stage holds some
                sums[home, key] = total(sums[home, key], self.here.stage_group)
                count = torch.tensor(rows[home, key], device=self.here.device)
                rows[home, key] = total(count, self.here.stage_group).item()
        return {vector: (found / rows[vector]).to(torch.bfloat16).float().cpu() for vector, found in sums.items()}

    def _factors(self, activation: Tensor, mean: Tensor, key: str, same_in_group: Callable[[Tensor], Tensor]) -> Tensor:
        if key.endswith(SHARED):
            mean, activation = same_in_group(mean), same_in_group(activation)
        return torch.stack([awq.factors(activation, mean, alpha) for alpha in ALPHAS]).to(self.here.device)

    def linear(self, name: str, weight: Tensor, inputs: Tensor) -> None:
        """Compare all alphas on one micro-batch, or on what an expert was given of it."""
        expert = is_expert(name)
        for key in self.searches(name):
            search, cut = search_of(key), self.here.cut(expert)
            if (shard := LinearShard.of(cut, name, weight, inputs, search.group, name in self.held_whole)) is None:
                continue
            squares = torch.zeros(len(ALPHAS), dtype=torch.float64, device=weight.device)
            if tokens := shard.inputs.shape[0]:
                # the calls of an expert have as many tokens as ranks exchange, whose number decides nothing
                by_gram = not expert and awq_gram.pays(tokens, shard.rows, shard.columns)
                shard = shard.with_whole_inputs() if by_gram else shard
                squares = (_squares_by_gram if by_gram else _squares)(
                    shard, search, shard.mine_of(self.factors[vector_home(name), key])
                )
            name_of_all, count = pooled(name), tokens * shard.rows if expert else 1
            losses = squares if expert else shard.mean(squares)
            self.losses[name_of_all, key] = self.losses.get((name_of_all, key), 0) + losses
            self.counts[name_of_all, key] = self.counts.get((name_of_all, key), 0) + count
            self.outputs[name_of_all] = shard.rows * (self.topk if expert else 1)

    def agreed(self) -> dict[str, Tensor]:
        """The chosen vectors, their alphas and all losses, the same on every rank. Collective.

        Where several linears share a vector, the losses are those of all their outputs for one token.
        """
        members: dict[tuple[str, str], list[tuple[str, Tensor, int]]] = {}
        for name, key in sorted(self.losses):
            group = self.here.stage_group if is_expert(f"{name}.") else self.here.dp_group
            losses = total(self.losses[name, key], group).cpu()
            count = total(torch.tensor(self.counts[name, key], device=self.here.device), group).item()
            members.setdefault((vector_home(name), key), []).append((name, losses, count))
        summed = {}
        for vector, found in members.items():
            together = sum(losses / count * self.outputs[name] for name, losses, count in found)
            alone = len(found) == 1 and not is_expert(f"{vector[0]}.")
            summed[vector] = found[0][1] if alone else together
        check_finite(self.here, summed)
        mine = {}
        for (home, key), losses in summed.items():
            best = min(range(len(ALPHAS)), key=losses.tolist().__getitem__)
            mine[vector_key(home, key)] = 1 / self.factors[home, key][best].cpu()
            mine[alpha_key(home, key)] = torch.tensor(ALPHAS[best])
            mine[losses_key(home, key)] = losses
        return spread(self.here, mine)


def _squares(shard: LinearShard, search: awq.Search, vectors: Tensor) -> Tensor:
    """Squares of what each of some vectors of factors [alphas, in] changes in the outputs of a linear, float64 [alphas]."""
    expected = shard.product(shard.inputs, shard.weight).to(torch.bfloat16)
    factors, inverses, amaxes = _rounding(shard, search, vectors)
    products = (
        shard.product(awq.scaled(search, shard.inputs, inverse), awq.rounded(search, shard.weight, mine, amax))
        for mine, inverse, amax in zip(factors, inverses, amaxes, strict=True)
    )
    return torch.stack([shard.difference(product, expected) for product in products])


def _squares_by_gram(shard: LinearShard, search: awq.Search, vectors: Tensor) -> Tensor:
    """The same without outputs, of a shard that has all inputs."""
    found = awq_gram.squares(search, shard.inputs, shard.weight, *_rounding(shard, search, vectors))
    return total(found, shard.cut.group) if shard.axis is Axis.OUT else found


def _rounding(shard: LinearShard, search: awq.Search, vectors: Tensor) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """bfloat16 factors and their inverses, and the amaxes of the whole weight times each, where its rounding depends on them."""
    factors, inverses = vectors.to(torch.bfloat16), (1 / vectors).to(torch.bfloat16)
    amaxes = [*shard.amaxes(shard.weight, factors)] if search.per_tensor else [None] * len(factors)
    return factors, inverses, amaxes


def check_finite(here: Topology, losses: dict[tuple[str, str], Tensor]) -> None:
    """`ExportError` on every rank if any rank has a loss that is NaN or Inf: of those, none would be the smallest."""
    bad = [name for (name, _), values in losses.items() if not values.isfinite().all()]
    if everywhere := sorted({name for theirs in everyone(here, bad) for name in theirs}):
        raise ExportError(
            f"NaN or Inf in the outputs of {', '.join(everywhere[:3])}, of {len(everywhere)} in all, in an AWQ search. "
            "Check the weights, and that the model runs on this data in bfloat16"
        )
