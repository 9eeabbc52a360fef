"""MiniMaxM2ForCausalLM: MiniMax M2 to M2.7. Experts in every layer under Mixtral's names, chosen as DeepSeek's are; norms of
queries and keys over all heads at once; a part of every head rotated."""

from .architecture import Architecture, Settings
from .blocks import GQA, QK_NORM_OF_ALL_HEADS, TOP, moe
from .mixtral import ON_DISK
from .rules import same
from .written_keys import local

BIAS = {"decoder.layers.{l}.mlp.router.expert_bias": same("model.layers.{l}.block_sparse_moe.e_score_correction_bias")}


def written(said: Settings) -> dict:
    """How many numbers of a head are rotated is said as it is, not as a part."""
    return local(said) | {"rotary_dim": round(said["rotary_percent"] * said["kv_channels"])}


ARCHITECTURE = Architecture(
    rules=TOP | GQA | QK_NORM_OF_ALL_HEADS | moe("block_sparse_moe", "w1", "w3", "w2") | BIAS,
    settings={"qk_layernorm": True, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    only={
        "scoring_func": ("sigmoid", None),
        "use_routing_bias": (True, None),
        "use_qk_norm": (True, None),
        "qk_norm_type": ("per_layer", None),
        "shared_intermediate_size": (0, None),
        "sliding_window": (None,),
        "hidden_act": ("silu", None),
    },
    # Without them vLLM builds routers that have no bias, and SGLang attention without norms.
    routing={"use_routing_bias": True, "scoring_func": "sigmoid", "use_qk_norm": True},
    called=((r"\.block_sparse_moe\.experts$", ".mlp.experts"),),  # by vLLM
    on_disk=ON_DISK,
    model_type="minimax_m2",
    written=written,
)
