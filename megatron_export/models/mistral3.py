"""Mistral3ForConditionalGeneration: a Mistral inside a model that sees; what Megatron has no part of is copied."""

from dataclasses import replace

from . import mistral
from .blocks import below

ARCHITECTURE = replace(
    mistral.ARCHITECTURE,
    rules=below("language_model.", mistral.ARCHITECTURE.rules),
    copied=("vision_tower.", "multi_modal_projector."),
    called=((r"^language_model\.model\.", "model."),),  # by SGLang
    on_disk=(
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    ),
)
