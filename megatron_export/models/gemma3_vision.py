"""Gemma3ForConditionalGeneration: Gemma 3 inside a model that sees; what Megatron has no part of is copied."""

from dataclasses import replace

from . import gemma3, mistral3
from .blocks import below

ARCHITECTURE = replace(
    gemma3.ARCHITECTURE,
    rules=below("language_model.", gemma3.ARCHITECTURE.rules),
    copied=mistral3.ARCHITECTURE.copied,
    called=((r"^(vision_tower\..*\.self_attn)\.out_proj$", r"\1.proj"),),  # by SGLang
    on_disk=(
        (r"^model\.vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
        *mistral3.ARCHITECTURE.on_disk,
    ),
)
