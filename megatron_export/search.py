"""The second and third look at activations: AWQ's search for alpha, and for how much to clip.

Each linear is compared with itself as it is called: its output with a rounded weight against its output without. The
input of one linear is held, its output twice, and copies of its weight; nothing is kept but losses. An alpha's loss is
the mean squared difference of the bfloat16 outputs, averaged over a micro-batch and summed over them; the first
smallest wins. A micro-batch's loss is rounded to float32 and added up in float64, which rounds nothing: it does not
matter which replica saw which micro-batch.

Under tensor parallelism the loss is that of the whole linear. Column-parallel ranks see the whole input and add up the
squares of their rows. Row-parallel ranks add up their partial products in float32, and only then round and square. If
a group of the format lies on two ranks, both gather weight and input and compute the whole. Vectors are made of whole
statistics on the CPU, whose kind alone decides their last bit. What remains is the order in which products are summed.
Source: AWQ, arXiv 2306.00978; ModelOpt 0.47's awq_lite and awq_clip, there per rank.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ExportError
from .formats import awq
from .formats.awq import ALPHAS, SHARED, search_of
from .formats.form import row_strips
from .formats.int4 import CLIP_RATIOS, rounded
from .gather import everyone, maximum, spread, total, whole
from .layout import Identity, Layout, even_cut
from .names import cut_of
from .piece import Axis
from .topology import Topology

CLIP_TOKENS = 64  # of a micro-batch, that a group's clipping is judged by


@dataclass(frozen=True)
class Shard:
    """What this rank has of one linear: bfloat16 `weight` [out, in] and `inputs` [tokens, in], cut along `cut`."""

    here: Topology
    cut: Axis | None
    weight: Tensor
    inputs: Tensor

    @classmethod
    def of(cls, here: Topology, name: str, weight: Tensor, inputs: Tensor, group: int) -> "Shard | None":
        """The shard, or the whole linear where groups of inputs lie on two shards; None where no groups fit."""
        cut = cut_of(f"{name}.weight") if here.tp_size > 1 else None
        if weight.shape[1] * (here.tp_size if cut is Axis.IN else 1) % group:
            return None  # such a linear cannot be exported in the format, and may be left out of it
        weight, inputs = weight.detach().to(torch.bfloat16), inputs.flatten(0, -2).to(torch.bfloat16)
        if cut is Axis.IN and weight.shape[1] % group:
            return cls(here, None, whole(here.cut(False), weight, 1), whole(here.cut(False), inputs, 1))
        return cls(here, cut, weight, inputs)

    def columns(self, vector: Tensor) -> Tensor:
        """What this shard has of a vector [in], on its device."""
        mine = even_cut(vector.shape[0], self.here.tp_rank, self.here.tp_size) if self.cut is Axis.IN else slice(None)
        return vector[mine].to(self.weight.device)

    def output(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """inputs @ weight.T in bfloat16: the rows of this shard, or whole where the inputs are cut."""
        if self.cut is Axis.IN:
            return total(_float32_product(inputs, weight), self.here.tp_group).to(torch.bfloat16)
        if inputs.is_cuda:  # where a bfloat16 product may round partial sums too
            return _float32_product(inputs, weight).to(torch.bfloat16)
        return inputs @ weight.T

    def difference(self, output: Tensor, expected: Tensor) -> Tensor:
        """Mean square of the difference over the whole linear, float32 values as float64 []."""
        square = (output - expected).float().square().sum(dtype=torch.float64)
        shards = self.here.tp_size if self.cut is Axis.OUT else 1
        if shards > 1:
            square = total(square, self.here.tp_group)
        return (square / (output.numel() * shards)).float().double()

    def amax(self, weight: Tensor) -> Tensor:
        """Largest magnitude of the whole weight, float32 []."""
        mine = weight.abs().amax().float()
        return maximum(mine, self.here.tp_group) if self.cut is not None else mine


def _float32_product(inputs: Tensor, weight: Tensor) -> Tensor:
    if inputs.is_cuda:
        return torch.mm(inputs, weight.T, out_dtype=torch.float32)
    return inputs.float() @ weight.float().T


class Alphas:
    """Observes linears and finds the alpha of each, for the searches that `searches` gives for its name.

    `means` is the mean |input| by channel of every linear, float32 [in] on the CPU. In a search that ends in `_shared`
    the factors of one query group are made of the means over its queries, which `same_in_group` takes, and so are the same.
    """

    whole_sequences = True

    def __init__(
        self,
        here: Topology,
        means: dict[str, Tensor],
        searches: Callable[[str], tuple[str, ...]],
        same_in_group: Callable[[Tensor], Tensor],
    ) -> None:
        self.here = here
        self.means = means
        self.searches = searches
        self.same_in_group = same_in_group
        self.factors: dict[tuple[str, str], Tensor] = {}  # s of each alpha, float32 [alphas, in]
        self.losses: dict[tuple[str, str], Tensor] = {}  # float64 [alphas]

    def linear(self, name: str, weight: Tensor, inputs: Tensor) -> None:
        """Compare all alphas on one micro-batch."""
        for key in self.searches(name):
            search = search_of(key)
            if (shard := Shard.of(self.here, name, weight, inputs, search.group)) is None:
                continue
            expected = shard.output(shard.inputs, shard.weight)
            losses = []
            for factors in self._factors(name, key, shard):
                mine = shard.columns(factors)
                smoothed = shard.weight * mine.to(torch.bfloat16)
                amax = shard.amax(smoothed) if search.per_tensor else None
                quantized = awq.rounded(search, smoothed, amax)
                inverse = (1 / mine).to(torch.bfloat16)
                losses.append(shard.difference(shard.output(shard.inputs * inverse, quantized), expected))
            self.losses[name, key] = self.losses.get((name, key), 0) + torch.stack(losses)

    def attention(self, name: str, key: Tensor, value: Tensor) -> None:
        """Nothing is searched for in attention."""

    def experts(self, name: str, tokens: Tensor) -> None:
        """Nothing is searched for in routing."""

    def _factors(self, name: str, key: str, shard: Shard) -> Tensor:
        if (name, key) not in self.factors:
            sums = awq.importance(shard.weight, search_of(key).group)
            rows = shard.weight.shape[0]
            if shard.cut is Axis.OUT:
                sums, rows = total(sums, self.here.tp_group), rows * self.here.tp_size
            if shard.cut is Axis.IN:
                sums = whole(self.here.cut(False), sums, 0)
            mean = (sums / rows).to(torch.bfloat16).float().cpu()
            activation = self.means[name]
            if key.endswith(SHARED):
                mean, activation = self.same_in_group(mean), self.same_in_group(activation)
            made = torch.stack([awq.factors(activation, mean, alpha) for alpha in ALPHAS])
            self.factors[name, key] = made.to(shard.weight.device)
        return self.factors[name, key]

    def agreed(self) -> dict[str, Tensor]:
        """The chosen vectors, their alphas and all losses, the same on every rank. Collective."""
        summed = {key: total(losses, self.here.dp_group).cpu() for key, losses in sorted(self.losses.items())}
        _check_finite(self.here, summed)
        mine = {}
        for (name, key), losses in summed.items():
            best = min(range(len(ALPHAS)), key=losses.tolist().__getitem__)
            mine[f"{name}.pre_quant_scale.{key}"] = 1 / self.factors[name, key][best].cpu()
            mine[f"{name}.alpha.{key}"] = torch.tensor(ALPHAS[best])
            mine[f"{name}.losses.{key}"] = losses
        return spread(self.here, mine)


class Clips:
    """Observes linears after they were smoothed, and finds what to clip the maxima of groups or weights to.

    int4: a ratio for every group of every row, by the error of its part of up to 127 of a micro-batch's outputs. nvfp4:
    one for the weight, before other linears' vectors are folded into its rows. The losses of int4 weigh 11 * 8 / group
    bytes for every weight that is looked at.
    """

    whole_sequences = True

    def __init__(
        self,
        here: Topology,
        statistics: dict[str, Tensor],
        searches: Callable[[str], tuple[str, ...]],
        layouts: dict[str, Layout],
    ) -> None:
        self.here = here
        self.statistics = statistics
        self.searches = searches
        self.layouts = layouts
        self.losses: dict[tuple[str, str], Tensor] = {}  # float64 [ratios], or [ratios, out, in/group]
        self.cut: dict[tuple[str, str], Axis | None] = {}

    def linear(self, name: str, weight: Tensor, inputs: Tensor) -> None:
        """Compare all ratios on one micro-batch."""
        for key in self.searches(name):
            search = search_of(key)
            if (shard := Shard.of(self.here, name, weight, inputs, search.group)) is None:
                continue
            vector = shard.columns(self.statistics[f"{name}.pre_quant_scale.{key}"])
            smoothed = (shard.weight.float() / vector).to(torch.bfloat16)
            inputs_of = shard.inputs * vector.to(torch.bfloat16)
            losses = (
                self._of_weight(shard, search, smoothed, inputs_of)
                if search.per_tensor
                else _of_groups(smoothed, inputs_of, search.group)
            )
            self.losses[name, key] = self.losses.get((name, key), 0) + losses
            self.cut[name, key] = shard.cut

    def attention(self, name: str, key: Tensor, value: Tensor) -> None:
        """Nothing is clipped in attention."""

    def experts(self, name: str, tokens: Tensor) -> None:
        """Nothing is clipped in routing."""

    def _of_weight(self, shard: Shard, search: awq.Search, smoothed: Tensor, inputs: Tensor) -> Tensor:
        expected = shard.output(inputs, smoothed)
        amax = shard.amax(smoothed)
        quantized = (awq.rounded(search, smoothed, amax * ratio) for ratio in CLIP_RATIOS)
        return torch.stack([shard.difference(shard.output(inputs, weight), expected) for weight in quantized])

    def agreed(self) -> dict[str, Tensor]:
        """The chosen ratios, the same on every rank. Collective."""
        summed = {key: total(losses, self.here.dp_group) for key, losses in sorted(self.losses.items())}
        _check_finite(self.here, summed)
        mine = {}
        for (name, key), losses in summed.items():
            codes = _first_smallest(losses)
            if codes.dim() == 0:
                mine[f"{name}.clip_ratio.{key}"] = torch.tensor(CLIP_RATIOS[int(codes)])
                continue
            cut = self.cut[name, key]
            layout = self.layouts.get(name, Identity())
            parts = layout.split(codes, self.here.tp_rank if cut is Axis.OUT else 0, self.here.tp_size)
            for part, held in parts.items():
                all_of_it = held if cut is None else whole(self.here.cut(False), held, 0 if cut is Axis.OUT else 1)
                mine[f"{name}.clip.{key}.{part}".rstrip(".")] = all_of_it
        return spread(self.here, mine)


def _of_groups(weight: Tensor, inputs: Tensor, group: int) -> Tensor:
    """Mean square error over tokens of every group's part of every output, by ratio: [ratios, out, in/group], float32
    values as float64.
    """
    sample = inputs[:: max(inputs.shape[0] // CLIP_TOKENS, 1)].float()
    sample = sample.unflatten(1, (-1, group)).transpose(0, 1)  # [in/group, tokens, group]
    losses = []
    for code in range(len(CLIP_RATIOS)):
        strips = []
        for rows in row_strips(weight, 1):
            strip = weight[rows]
            clip = torch.full((strip.shape[0], sample.shape[0]), code, dtype=torch.uint8, device=strip.device)
            error = (rounded(strip, group, clip).float() - strip.float()).unflatten(1, (-1, group))
            parts = torch.bmm(sample, error.permute(1, 2, 0))  # [in/group, tokens, out]
            strips.append(parts.square_().mean(dim=1).T)
        losses.append(torch.cat(strips))
    return torch.stack(losses).double()


def _first_smallest(losses: Tensor) -> Tensor:
    """Index along the first dim of the smallest, the first of equal ones: uint8 of the other dims."""
    best = torch.zeros(losses.shape[1:], dtype=torch.uint8, device=losses.device)
    least = losses[0]
    for code in range(1, losses.shape[0]):
        best = torch.where(losses[code] < least, code, best)
        least = torch.minimum(losses[code], least)
    return best.to(torch.uint8)


def _check_finite(here: Topology, losses: dict[tuple[str, str], Tensor]) -> None:
    """Raise on every rank if any rank has a loss that is NaN or Inf: of those, none would be the smallest."""
    bad = [name for (name, _), values in losses.items() if not values.isfinite().all()]
    if everywhere := sorted({name for theirs in everyone(here, bad) for name in theirs}):
        raise ExportError(
            f"NaN or Inf in the outputs of {', '.join(everywhere[:3])}, of {len(everywhere)} in all, in an AWQ search. "
            "Check the weights, and that the model runs on this data in bfloat16"
        )
