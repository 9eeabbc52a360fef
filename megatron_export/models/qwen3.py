"""Qwen3ForCausalLM: Qwen 3 dense. A norm per head on q and k before rotation, an explicit head size, no biases."""

from .blocks import GQA, QK_NORM, TOP, dense

RULES = TOP | GQA | QK_NORM | dense("mlp")
SETTINGS = {"qk_layernorm": True}
ONLY = {"attention_bias": (False, None), "use_sliding_window": (False, None), "hidden_act": ("silu", None)}
WHERE: dict = {}
COPIED = ()
