"""Qwen3VLMoeForConditionalGeneration: a Qwen 3 with experts inside a model that sees. HF keeps the experts of a layer stacked."""

from dataclasses import replace

from . import qwen3_moe, qwen3_vl
from .blocks import stacked, within

ARCHITECTURE = replace(
    qwen3_moe.ARCHITECTURE,
    rules=within("language_model", stacked("mlp", qwen3_moe.ARCHITECTURE.rules)),
    copied=("model.visual.",),
    only=dict(qwen3_moe.ARCHITECTURE.only) | {"norm_topk_prob": (True, None)},  # without the key HF norms too
    called=qwen3_vl.CALLED,
    routing={"norm_topk_prob": True},  # which vLLM's class reads
)
