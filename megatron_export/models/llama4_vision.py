"""Llama4ForConditionalGeneration: Llama 4 inside a model that sees, whose other parts Megatron does not have: they are copied."""

from dataclasses import replace

from . import llama4
from .blocks import below

ARCHITECTURE = replace(
    llama4.ARCHITECTURE,
    rules=below("language_model.", llama4.ARCHITECTURE.rules),
    copied=("vision_model.", "multi_modal_projector."),
    stacked=True,
    on_disk=((r"^", "language_model."),),
)
