"""Llama4ForCausalLM: the language model of Llama 4. Experts stacked in one tensor for each layer, all layers or some, each with
a shared one; some layers without rotary embeddings."""

from .architecture import Architecture, Settings
from .blocks import GQA, TOP, dense, moe, shared_experts, stacked
from .shape import ModelShape
from .written_keys import layers_with, local


def unrotated(config: dict, shape: ModelShape) -> dict:
    """Layers without rotary embeddings: HF's flag says which layers have them, Megatron's which do not."""
    interval = config.get("no_rope_layer_interval") or 4
    uses = config.get("no_rope_layers") or [(layer + 1) % interval != 0 for layer in range(shape.layers)]
    return {"no_rope_freq": [int(not used) for used in uses], "qk_l2_norm": config.get("use_qk_norm", True)}


def unlike(config: dict, length: int) -> str:
    """Beyond some length HF attends in chunks and scales queries, which Megatron-Core does not."""
    chunk = config.get("attention_chunk_size", 8192) or length
    scale = config.get("floor_scale", 8192) if config.get("attn_temperature_tuning", True) else length + 1
    if length <= (most := min(chunk, scale - 1)):
        return ""
    return (
        f"samples of {length} tokens: beyond {most} this model attends in chunks and scales its queries, which "
        "Megatron-Core does not. Give shorter samples"
    )


def written(said: Settings) -> dict:
    """Layers with experts are listed; the step is what they would follow if they were not."""
    if not said["num_moe_experts"]:
        return {}
    sparse = layers_with(said["moe_layer_freq"], 1)
    return local(said) | {
        "intermediate_size_mlp": said["ffn_hidden_size"],
        "moe_layers": sparse,
        "interleave_moe_layer_step": sparse[0] + 1 if sparse else said["num_layers"] + 1,
        "no_rope_layers": [int(not skipped) for skipped in said["no_rope_freq"] or [0] * said["num_layers"]],
        "use_qk_norm": bool(said["qk_l2_norm"]),
    }


FEED_FORWARD = moe("feed_forward", router="router") | shared_experts("feed_forward.shared_expert")
ARCHITECTURE = Architecture(
    rules=stacked("feed_forward", TOP | GQA | dense("feed_forward") | FEED_FORWARD),
    shared=1,
    settings={
        "moe_router_score_function": "sigmoid",
        "moe_apply_probs_on_input": True,
        "rotary_interleaved": True,
    },
    computed=unrotated,
    only={"num_experts_per_tok": (1,), "attention_bias": (False, None), "hidden_act": ("silu", None)},
    unlike=unlike,
    turned=True,
    model_type="llama4_text",
    written=written,
    unsaid=("attention_chunk_size", "attn_temperature_tuning", "floor_scale", "attn_scale"),
)
