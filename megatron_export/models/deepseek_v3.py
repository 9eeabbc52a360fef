"""DeepseekV3ForCausalLM: DeepSeek V3 and R1, and Kimi K2. Latent attention, dense layers first, routed and shared experts, and
layers that predict one more token."""

from .architecture import Architecture
from .blocks import EXPERT_BIAS, MLA, MTP, TOP, dense, moe, shared_experts
from .written_keys import latent, routed

ARCHITECTURE = Architecture(
    rules=TOP | MLA | dense("mlp") | moe("mlp") | shared_experts("mlp.shared_experts") | EXPERT_BIAS | MTP,
    settings={"qk_layernorm": True, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    only={
        "rope_interleave": (True, None),
        "scoring_func": ("sigmoid", None),
        "topk_method": ("noaux_tc", None),
        "moe_layer_freq": (1, None),
        "attention_bias": (False, None),
        "norm_topk_prob": (True,),
        "hidden_act": ("silu", None),
    },
    routing={"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},  # without, vLLM takes softmax
    model_type="deepseek_v3",
    written=lambda said: routed(said) | latent(said),
)
