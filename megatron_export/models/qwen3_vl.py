"""Qwen3VLForConditionalGeneration: a Qwen 3 inside a model that sees. Of text alone, the three positions of a token are one."""

from dataclasses import replace

from . import qwen3
from .blocks import within

ARCHITECTURE = replace(
    qwen3.ARCHITECTURE, rules=within("language_model", qwen3.ARCHITECTURE.rules), copied=("model.visual.",)
)
