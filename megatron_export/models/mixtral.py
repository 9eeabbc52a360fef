"""MixtralForCausalLM: experts in every layer, w1 being gate, w3 up and w2 down. The best experts, then softmax over them."""

from .blocks import GQA, TOP, moe

RULES = TOP | GQA | moe("block_sparse_moe", "w1", "w3", "w2")
SETTINGS = {"moe_router_pre_softmax": False}
ONLY = {"sliding_window": (None,), "hidden_act": ("silu", None)}
WHERE: dict = {}
COPIED = ()
