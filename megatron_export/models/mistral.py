"""MistralForCausalLM: a Llama whose layers may all attend within one window."""

from .architecture import Architecture
from .blocks import GQA, TOP, dense
from .shape import ModelShape


def window_of(size: int | None) -> dict:
    """Megatron counts the tokens before, HF all that are seen."""
    return {"window_size": (size - 1, 0) if size else None}


def window(config: dict, shape: ModelShape) -> dict:
    """Without the key it is 4,096 tokens, and with null there is none."""
    return window_of(config.get("sliding_window", 4096))


ARCHITECTURE = Architecture(
    rules=TOP | GQA | dense("mlp"),
    computed=window,
    only={"model_type": ("mistral", "mistral3", None), "hidden_act": ("silu", None)},
)
