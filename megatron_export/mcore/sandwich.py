"""What Gemma 3 has and Megatron-Core's `GPTModel` has no setting for: norms of outputs, scaled embeddings, a second rotary base.

The names of the norms are those of Megatron-Bridge's modules.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch import Tensor, nn

from .model import layers_of


class NormedLinear(RowParallelLinear):
    """A linear whose output, of all ranks together, is normed."""

    def __init__(self, *args: Any, config: Any, **kwargs: Any) -> None:
        super().__init__(*args, config=config, **kwargs)
        self.post_layernorm = WrappedTorchNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(hidden)
        return self.post_layernorm(output), bias


def norm_outputs(layer: ModuleSpec) -> None:
    """Let attention and MLP of a layer's spec end in such linears."""
    layer.submodules.self_attention.submodules.linear_proj = NormedLinear
    layer.submodules.mlp.submodules.linear_fc2 = NormedLinear


def sandwich(model: GPTModel, local_base: float) -> None:
    """Scale the embeddings of a chunk, and rotate by `local_base` in layers with windows."""
    if model.pre_process:
        scale = torch.tensor(model.config.hidden_size**0.5)
        model.embedding.register_forward_hook(lambda module, given, made: made * scale.to(made))
    config = model.config
    rotary = RotaryEmbedding(
        config.kv_channels,
        rotary_percent=1.0,
        rotary_base=local_base,
        use_cpu_initialization=config.use_cpu_initialization,
    )
    for number, layer in layers_of(model):
        if config.window_attn_skip_freq[number]:
            layer.register_forward_pre_hook(_rotated_by(rotary), with_kwargs=True)


def _rotated_by(rotary: RotaryEmbedding) -> Callable[..., tuple[tuple, dict]]:
    """A hook that gives a layer other rotary embeddings than it was called with."""

    def hook(layer: nn.Module, given: tuple, named: dict) -> tuple[tuple, dict]:
        length = named["rotary_pos_emb"].shape[0]
        return given, named | {"rotary_pos_emb": rotary(length).to(named["rotary_pos_emb"])}

    return hook
