"""KimiK25ForConditionalGeneration: Kimi K2.5 and later, a DeepSeek V3 inside a model that sees; what Megatron lacks is copied."""

from dataclasses import replace

from . import deepseek_v3
from .blocks import below


def respelled(config: dict) -> dict:
    """The class of the language model, as Moonshot's config.json says it: SGLang asks for it."""
    said = config["text_config"].get("architectures")
    return {} if said else {"text_config": {"architectures": ["DeepseekV3ForCausalLM"]}}


ARCHITECTURE = replace(
    deepseek_v3.ARCHITECTURE,
    rules=below("language_model.", deepseek_v3.ARCHITECTURE.rules),
    copied=("vision_tower.", "mm_projector."),
    called=((r"^language_model\.", ""),),  # by SGLang
    respelled=respelled,
    on_disk=(
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.(vision_tower|mm_projector)\.", r"\1."),
    ),
)
