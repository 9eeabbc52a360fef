"""Qwen3ForCausalLM: Qwen 3 dense. A norm per head on q and k before rotation, an explicit head size, no biases."""

from .architecture import Architecture
from .blocks import GQA, QK_NORM, TOP, dense

ARCHITECTURE = Architecture(
    rules=TOP | GQA | QK_NORM | dense("mlp"),
    settings={"qk_layernorm": True},
    only={"attention_bias": (False, None), "use_sliding_window": (False, None), "hidden_act": ("silu", None)},
    model_type="qwen3",
)
