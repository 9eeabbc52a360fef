"""Qwen2ForCausalLM: Qwen 2 and 2.5. Biases on q, k and v, none on o."""

from .architecture import Architecture
from .blocks import GQA, QKV_BIAS, TOP, dense

ARCHITECTURE = Architecture(
    rules=TOP | GQA | QKV_BIAS | dense("mlp"),
    settings={"add_qkv_bias": True},
    only={"use_sliding_window": (False, None), "hidden_act": ("silu", None)},
    model_type="qwen2",
)
