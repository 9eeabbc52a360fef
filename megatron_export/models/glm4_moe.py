"""Glm4MoeForCausalLM: GLM 4.5 and 4.6. Dense layers first, experts as DeepSeek's, half of every head rotated."""

from .architecture import Architecture
from .blocks import EXPERT_BIAS, GQA, MTP, QK_NORM, QKV_BIAS, TOP, dense, moe, shared_experts
from .written_keys import routed

EXPERTS = moe("mlp") | shared_experts("mlp.shared_experts") | EXPERT_BIAS
ARCHITECTURE = Architecture(
    rules=TOP | GQA | QKV_BIAS | QK_NORM | dense("mlp") | EXPERTS | MTP,
    where={"attention_bias": ("add_qkv_bias", QKV_BIAS), "use_qk_norm": ("qk_layernorm", QK_NORM)},
    settings={"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    only={"norm_topk_prob": (True, None), "hidden_act": ("silu", None)},
    model_type="glm4_moe",
    written=lambda said: routed(said) | {"partial_rotary_factor": said["rotary_percent"]},
)
