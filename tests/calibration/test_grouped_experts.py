"""Experts in one module, called once with the tokens of all, as Transformer Engine groups them: measured like single ones."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from megatron_export import calibrate
from megatron_export.mcore.model import experts_of

from ..support.covering import covering
from ..support.live import loaded
from ..support.models import assert_same
from ..support.ranks import Ranks

pytestmark = pytest.mark.whole


class GroupedLinear(nn.Module):
    """The linears of several experts: weights `weight0`, `weight1`, ..., called with (tokens, tokens of each)."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.num_gemms = len(weights)
        for number, weight in enumerate(weights):
            self.register_parameter(f"weight{number}", nn.Parameter(weight))

    def forward(self, inputs: Tensor, counts: list[int]) -> Tensor:
        parts = zip(inputs.split(counts), (getattr(self, f"weight{n}") for n in range(self.num_gemms)), strict=True)
        return torch.cat([part @ weight.T for part, weight in parts])


class GroupedMLP(nn.Module):
    """What `TEGroupedMLP` computes, the probabilities before `linear_fc2` as there."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.config = experts.config
        self.linear_fc1 = GroupedLinear([expert.linear_fc1.weight.detach() for expert in experts.local_experts])
        self.linear_fc2 = GroupedLinear([expert.linear_fc2.weight.detach() for expert in experts.local_experts])

    def forward(self, hidden: Tensor, counts: Tensor, probabilities: Tensor) -> tuple[Tensor, None]:
        gate, up = self.linear_fc1(hidden, counts.tolist()).chunk(2, dim=-1)
        weighted = nn.functional.silu(gate) * up * probabilities.unsqueeze(-1)
        return self.linear_fc2(weighted.to(hidden.dtype), counts.tolist()), None


def both(source: Path, ep: int, all_experts: bool) -> list[dict[str, Tensor]]:
    """In a rank: the statistics of a model, and of the same one with its experts grouped."""
    found, ids = [], torch.randint(0, 500, (4, 24), generator=torch.Generator().manual_seed(3))
    with loaded(source, ep=ep) as (model, here):
        for _ in range(2):
            batches = list(ids.split(2))[here.dp_rank :: here.dp_size]
            found.append(calibrate(model, batches, format=("nvfp4_awq", "fp8"), awq_clip=True, all_experts=all_experts))
            for layer in experts_of(model).values():
                layer.experts = GroupedMLP(layer.experts) if hasattr(layer.experts, "local_experts") else layer.experts
    return found


@pytest.mark.parametrize(
    ("name", "ep", "all_experts"), covering(["qwen3_moe", "deepseek_v3"], [1, 2], [False, True], together=2)
)
def test_grouped_experts_have_the_statistics_of_single_ones(
    name: str, ep: int, all_experts: bool, models: dict, ranks: Ranks
) -> None:
    for single, grouped in ranks.call(ep, both, models[name], ep, all_experts):
        assert any(".tokens" in key for key in single)
        assert any(".mlp.experts.3.linear_fc1.clip_ratio." in key for key in single)
        assert_same(grouped, single)
