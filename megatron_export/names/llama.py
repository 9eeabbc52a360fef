"""LlamaForCausalLM: Llama 3.x, tied or not."""

from .fragments import DENSE, GQA, TOP

RULES = TOP | GQA | DENSE
SETTINGS: dict = {}
ONLY = {"attention_bias": (False, None), "mlp_bias": (False, None), "hidden_act": ("silu", None)}
WHERE: dict = {}
