"""MistralForCausalLM and Ministral3ForCausalLM: a Llama whose layers may all attend within one window."""

from dataclasses import replace

from . import written_keys
from .architecture import Architecture
from .blocks import GQA, TOP, dense
from .shape import ModelShape


def window_of(size: int | None) -> dict:
    """Megatron counts the tokens before, HF all that are seen."""
    return {"window_size": (size - 1, 0) if size else None}


def window(config: dict, shape: ModelShape) -> dict:
    """Without the key it is 4,096 tokens of a Mistral and none of a Ministral 3, and with null there is none."""
    return window_of(config.get("sliding_window", None if config.get("model_type") == "ministral3" else 4096))


def unlike(config: dict, length: int) -> str:
    """Ministral 3 scales queries beyond some position."""
    rope = config.get("rope_parameters") or {}
    most = rope.get("original_max_position_embeddings") or 0
    if not rope.get("llama_4_scaling_beta") or length <= most:
        return ""
    return (
        f"samples of {length} tokens: beyond {most} this model scales its queries, which Megatron-Core does not. Give shorter "
        "samples"
    )


ARCHITECTURE = Architecture(
    rules=TOP | GQA | dense("mlp"),
    computed=window,
    only={"model_type": ("mistral", "ministral3", "mistral3", None), "hidden_act": ("silu", None)},
    unlike=unlike,
    model_type="mistral",
    written=written_keys.window,
)
MINISTRAL = replace(ARCHITECTURE, model_type="ministral3", unsaid=("rope_parameters",))  # which scale queries too
