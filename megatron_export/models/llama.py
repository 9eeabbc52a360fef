"""LlamaForCausalLM: Llama 3.x, tied or not."""

from .blocks import GQA, TOP, dense

RULES = TOP | GQA | dense("mlp")
SETTINGS: dict = {}
ONLY = {"attention_bias": (False, None), "mlp_bias": (False, None), "hidden_act": ("silu", None)}
WHERE: dict = {}
COPIED = ()
