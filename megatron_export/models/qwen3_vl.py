"""Qwen3VLForConditionalGeneration: a Qwen 3 inside a model that sees. Of text alone, the three positions of a token are one."""

from dataclasses import replace

from . import qwen3
from .blocks import within

# By SGLang, which changes names in lists, though its modules have HF's. It compares linears by whole words, and experts by stars.
CALLED = (
    (r"^model\.(language_model\.layers\.\d+\.(?!mlp\.experts\b).*)$", r"\1"),
    (r"^model\.(language_model\.layers\.\d+\.mlp\.experts)$", r"*\1"),
)
ARCHITECTURE = replace(
    qwen3.ARCHITECTURE,
    rules=within("language_model", qwen3.ARCHITECTURE.rules),
    copied=("model.visual.",),
    called=CALLED,
)
