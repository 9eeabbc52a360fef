"""Llama4ForConditionalGeneration: Llama 4 inside a model that sees, whose other parts Megatron does not have: they are copied."""

from . import llama4
from .blocks import below

RULES = below("language_model.", llama4.RULES)
SETTINGS, ONLY, WHERE = llama4.SETTINGS, llama4.ONLY, llama4.WHERE
COPIED = ("vision_model.", "multi_modal_projector.")
