"""MistralForCausalLM: a Llama whose layers may all attend within one window."""

from .architecture import Architecture
from .blocks import GQA, TOP, dense
from .shape import ModelShape


def window(config: dict, shape: ModelShape) -> dict:
    """Megatron counts the tokens before, HF all that are seen; 4,096 where the key is not there, none where it is null."""
    size = config.get("sliding_window", 4096)
    return {"window_size": (size - 1, 0) if size else None}


ARCHITECTURE = Architecture(
    rules=TOP | GQA | dense("mlp"),
    computed=window,
    only={"model_type": ("mistral", "mistral3", None), "hidden_act": ("silu", None)},
)
