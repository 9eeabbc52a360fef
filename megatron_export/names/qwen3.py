"""Qwen3ForCausalLM: Qwen 3 dense. A norm per head on q and k before rotation, an explicit head size, no biases."""

from .fragments import DENSE, GQA, QK_NORM, TOP

RULES = TOP | GQA | QK_NORM | DENSE
SETTINGS = {"qk_layernorm": True}
ONLY = {"attention_bias": (False, None), "use_sliding_window": (False, None), "hidden_act": ("silu", None)}
WHERE: dict = {}
