"""Qwen2ForCausalLM: Qwen 2 and 2.5. Biases on q, k and v, none on o."""

from .blocks import GQA, QKV_BIAS, TOP, dense

RULES = TOP | GQA | QKV_BIAS | dense("mlp")
SETTINGS = {"add_qkv_bias": True}
ONLY = {"use_sliding_window": (False, None), "hidden_act": ("silu", None)}
WHERE: dict = {}
COPIED = ()
