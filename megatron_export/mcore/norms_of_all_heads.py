"""A norm of queries or keys over all heads at once (MiniMax M2): Megatron-Core's own is over each head."""

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from ..models import parameters_of
from .model import layers_of


class NormOfAllHeads(nn.Module):
    """RMSNorm of [..., heads, width] over both, where each rank has `heads` of the heads, and their weights."""

    def __init__(self, heads: int, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(heads * width)), eps

    def forward(self, hidden: Tensor) -> Tensor:
        values = hidden.float()
        total = reduce_from_tensor_model_parallel_region(values.square().sum((-2, -1), keepdim=True))
        many = self.weight.numel() * parallel_state.get_tensor_model_parallel_world_size()
        normed = (values * torch.rsqrt(total / many + self.eps)).to(hidden.dtype)
        return normed * self.weight.view(hidden.shape[-2:])

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)


def norm_all_heads(model: GPTModel, config: dict) -> None:
    """Give the layers of a chunk such norms, where config.json's model has them."""
    sources, width = parameters_of(config), model.config.kv_channels
    for number, layer in layers_of(model):
        for leaf in ("q_layernorm", "k_layernorm"):
            source = sources.get(f"decoder.layers.{number}.self_attention.{leaf}.weight")
            if source is not None and source.rule.cut_shape:
                heads = source.shape[0] // width // parallel_state.get_tensor_model_parallel_world_size()
                setattr(layer.self_attention, leaf, NormOfAllHeads(heads, width, model.config.layernorm_epsilon))
