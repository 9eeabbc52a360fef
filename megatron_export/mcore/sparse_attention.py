"""Sparse attention (DSA) of samples that it sees whole: attention is latent attention's, and the indexer is kept, not run.

Megatron-Core builds its own with Transformer Engine only. The names of parameters are those of its `DSAttention`.
"""

from typing import Any

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor, nn

from ..models.shape import ModelShape
from .latent_attention import LatentAttention
from .model import layers_of


class Indexer(nn.Module):
    """The parameters of an indexer; every rank holds all of them."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.linear_wq_b = nn.Linear(shape.q_lora, shape.index_heads * shape.index_dim, bias=False)
        self.linear_wk = nn.Linear(shape.hidden, shape.index_dim, bias=False)
        self.k_norm = nn.LayerNorm(shape.index_dim)
        self.linear_weights_proj = nn.Linear(shape.hidden, shape.index_heads, bias=False)


class SparseAttention(LatentAttention):
    """Latent attention with an indexer beside it, in some layers. What an indexer would read is handed to it and not used."""

    def forward(self, *args: Any, x: Tensor | None = None, qr: Tensor | None = None, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        found = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name, module in self.named_children():
            if isinstance(module, Indexer):
                group = parallel_state.get_tensor_model_parallel_group()
                found |= sharded_state_dict_default(module, f"{prefix}{name}.", sharded_offsets, metadata, group)
        return found


def add_indexers(model: GPTModel, shape: ModelShape) -> None:
    """Give the layers of a chunk that have an indexer theirs."""
    for number, layer in layers_of(model):
        if number in shape.indexed:
            layer.self_attention.core_attention.indexer = Indexer(shape)
