"""MixtralForCausalLM: experts in every layer, w1 being gate, w3 up and w2 down. The best experts, then softmax over them."""

from .architecture import Architecture
from .blocks import GQA, TOP, moe
from .written_keys import local

ON_DISK = (
    (r"\.mlp\.", ".block_sparse_moe."),
    (r"\.gate_proj\.", ".w1."),
    (r"\.up_proj\.", ".w3."),
    (r"\.down_proj\.", ".w2."),
)
ARCHITECTURE = Architecture(
    rules=TOP | GQA | moe("block_sparse_moe", "w1", "w3", "w2"),
    settings={"moe_router_pre_softmax": False},
    only={"sliding_window": (None,), "hidden_act": ("silu", None)},
    on_disk=ON_DISK,
    model_type="mixtral",
    written=local,
)
