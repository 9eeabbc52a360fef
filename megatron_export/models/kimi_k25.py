"""KimiK25ForConditionalGeneration: Kimi K2.5 and later, a DeepSeek V3 inside a model that sees; what Megatron lacks is copied."""

from dataclasses import replace

from . import deepseek_v3
from .blocks import below

ARCHITECTURE = replace(
    deepseek_v3.ARCHITECTURE,
    rules=below("language_model.", deepseek_v3.ARCHITECTURE.rules),
    copied=("vision_tower.", "mm_projector."),
    on_disk=(
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.(vision_tower|mm_projector)\.", r"\1."),
    ),
)
