"""The third look at activations, when asked for: by how much to clip the weights of a linear, after it was smoothed.

A group of weights, or a whole weight, is rounded with its amax as it is, and with eleven smaller ones; the ratio whose outputs
differ least is kept. Losses add up as in awq_search.py. Source: AWQ, arXiv 2306.00978; ModelOpt 0.47's awq_clip, there per rank.
"""

from collections import Counter
from collections.abc import Callable
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

from ..common.piece import Axis
from ..common.strips import row_strips
from ..distributed.collectives import spread, total, whole
from ..distributed.topology import Topology
from ..formats import awq
from ..formats.awq import search_of
from ..formats.int4 import CLIP_RATIOS, rounded
from ..models import is_expert, vector_home
from ..models.layouts import Identity, Layout
from ..models.statistic_names import codes_key, ratio_key, vector_key
from .awq_search import LinearShard, check_finite
from .observer import Observer

CLIP_TOKENS = 64  # of a micro-batch, that a group's clipping is judged by


class Clips(Observer):
    """Observes linears after they were smoothed, and finds what to clip the maxima of groups or weights to.

    int4: a ratio for every group of every row, by the error of its part of up to 127 of a micro-batch's outputs. Their losses take
    11 * 8 / group bytes for every element of the weights. nvfp4: one ratio for the weight, before other linears' vectors are folded
    into its rows. Each expert has its own ratios, by the tokens that it was given; one that was given none is not clipped.
    """

    whole_sequences = True

    def __init__(
        self,
        here: Topology,
        statistics: dict[str, Tensor],
        searches: Callable[[str], tuple[str, ...]],
        layouts: dict[str, Layout],
        held_whole: AbstractSet[str] = frozenset(),
    ) -> None:
        self.here = here
        self.statistics = statistics
        self.searches = searches
        self.layouts = layouts
        self.held_whole = held_whole
        self.losses: dict[tuple[str, str], Tensor] = {}  # float64 [ratios], or [ratios, out, in/group]
        self.axis: dict[tuple[str, str], Axis | None] = {}
        self.calls: Counter[str] = Counter()  # with tokens

    def linear(self, name: str, weight: Tensor, inputs: Tensor) -> None:
        """Compare all ratios on one micro-batch."""
        for key in self.searches(name):
            search, cut = search_of(key), self.here.cut(is_expert(name))
            if (shard := LinearShard.of(cut, name, weight, inputs, search.group, name in self.held_whole)) is None:
                continue
            self.axis[name, key] = shard.axis
            if not shard.inputs.shape[0]:
                rows, columns = shard.weight.shape
                groups = () if search.per_tensor else (rows, columns // search.group)
                nothing = torch.zeros(len(CLIP_RATIOS), *groups, dtype=torch.float64, device=weight.device)
                self.losses.setdefault((name, key), nothing)
                continue
            vector = shard.mine_of(self.statistics[vector_key(vector_home(name), key)])
            smoothed = (shard.weight.float() / vector).to(torch.bfloat16)
            inputs_of = shard.inputs * vector.to(torch.bfloat16)
            losses = (
                self._of_weight(shard, search, smoothed, inputs_of)
                if search.per_tensor
                else _of_groups(smoothed, inputs_of, search.group)
            )
            self.losses[name, key] = self.losses.get((name, key), 0) + losses
            self.calls[name] += 1

    def _of_weight(self, shard: LinearShard, search: awq.Search, smoothed: Tensor, inputs: Tensor) -> Tensor:
        expected = shard.product(inputs, smoothed).to(torch.bfloat16)
        ones = smoothed.new_ones(smoothed.shape[1])
        amax = shard.amaxes(smoothed, ones.unsqueeze(0))[0]
        products = (shard.product(inputs, awq.rounded(search, smoothed, ones, amax * ratio)) for ratio in CLIP_RATIOS)
        return shard.mean(torch.stack([shard.difference(product, expected) for product in products]))

    def agreed(self) -> dict[str, Tensor]:
        """The chosen ratios, the same on every rank. Collective."""
        summed, calls = {}, {}
        for name, key in sorted(self.losses):
            replicas = self.here.cut(is_expert(name)).replicas
            summed[name, key] = total(self.losses[name, key], replicas)
            calls[name] = total(torch.tensor(self.calls[name], device=self.here.device), replicas).item()
        check_finite(self.here, summed)
        mine: dict[bool, dict[str, Tensor]] = {False: {}, True: {}}
        for (name, key), losses in summed.items():
            unclipped = torch.full_like(losses[0], len(CLIP_RATIOS) - 1, dtype=torch.uint8)
            codes = _first_smallest(losses) if calls[name] else unclipped
            mine[is_expert(name)] |= self._named(name, key, codes)
        return spread(self.here, mine[False]) | spread(self.here, mine[True], experts=True)

    def _named(self, name: str, key: str, codes: Tensor) -> dict[str, Tensor]:
        """The codes of one linear, whole, under the names of their statistics."""
        if codes.dim() == 0:
            return {ratio_key(name, key): torch.tensor(CLIP_RATIOS[int(codes)])}
        axis, cut = self.axis[name, key], self.here.cut(is_expert(name))
        layout = self.layouts.get(name, Identity())
        if axis is Axis.OUT and not layout.splits(codes.shape[0]):
            axis, codes = None, whole(cut, codes, 0)
        found = {}
        for part, held in layout.split(codes, cut.rank if axis is Axis.OUT else 0, cut.size).items():
            all_of_it = held if axis is None else whole(cut, held, 0 if axis is Axis.OUT else 1)
            found[codes_key(name, key, part)] = all_of_it
        return found


def _of_groups(weight: Tensor, inputs: Tensor, group: int) -> Tensor:
    """Mean square error over tokens of every group's part of every output: float64 [ratios, out, in/group], rounded to float32."""
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
