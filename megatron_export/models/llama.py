"""LlamaForCausalLM: Llama 3.x, tied or not."""

from .architecture import Architecture
from .blocks import GQA, TOP, dense

ARCHITECTURE = Architecture(
    rules=TOP | GQA | dense("mlp"),
    only={"attention_bias": (False, None), "mlp_bias": (False, None), "hidden_act": ("silu", None)},
    model_type="llama",
)
