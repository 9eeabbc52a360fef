"""Qwen3MoeForCausalLM: Qwen 3 with experts in all layers or some. Softmax over all experts, then the best of them."""

from .architecture import Architecture
from .blocks import GQA, QK_NORM, TOP, dense, moe
from .written_keys import numbered

ARCHITECTURE = Architecture(
    rules=TOP | GQA | QK_NORM | dense("mlp") | moe("mlp"),
    settings={"qk_layernorm": True},
    only={
        "norm_topk_prob": (True, False),
        "attention_bias": (False, None),
        "use_sliding_window": (False, None),
        "hidden_act": ("silu", None),
    },
    model_type="qwen3_moe",
    written=numbered,
)
