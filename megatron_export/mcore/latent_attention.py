"""Latent attention without Transformer Engine."""

from typing import Any

from megatron.core.transformer.dot_product_attention import DotProductAttention


class LatentAttention(DotProductAttention):
    """Megatron's own attention for keys and values of different sizes, which it has in Transformer Engine's only."""

    def __init__(self, *args: Any, k_channels: int = 0, v_channels: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition
