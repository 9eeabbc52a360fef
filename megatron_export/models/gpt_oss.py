"""GptOssForCausalLM: biases on all linears, experts stacked with the rows of gate and up in turn, an offset in the softmax of
every head, windows of attention in every other layer."""

from .blocks import BIASES, GQA, QKV_BIAS, TOP, moe, stacked

RULES = stacked("mlp", TOP | GQA | QKV_BIAS | moe("mlp", router="router") | BIASES, woven=True)
SETTINGS = {
    "activation_func": "quick_gelu",
    "glu_linear_offset": 1.0,
    "softmax_type": "learnable",
    "add_bias_linear": True,
    "add_qkv_bias": True,
}
ONLY = {"swiglu_alpha": (1.702, None), "attention_bias": (True, None), "hidden_act": ("silu", None)}
WHERE: dict = {}
COPIED = ()
