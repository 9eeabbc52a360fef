"""Llama4ForCausalLM: the language model of Llama 4. Experts stacked in one tensor for each layer, all layers or some, each with
a shared one; some layers without rotary embeddings."""

from .blocks import GQA, TOP, dense, moe, shared_experts, stacked

RULES = stacked(
    "feed_forward",
    TOP
    | GQA
    | dense("feed_forward")
    | moe("feed_forward", router="router")
    | shared_experts("feed_forward.shared_expert"),
)
SETTINGS = {
    "moe_router_score_function": "sigmoid",
    "moe_apply_probs_on_input": True,
    "rotary_interleaved": True,
}
ONLY = {"num_experts_per_tok": (1,), "attention_bias": (False, None), "hidden_act": ("silu", None)}
WHERE: dict = {}
COPIED = ()
