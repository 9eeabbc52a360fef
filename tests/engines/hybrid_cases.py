"""Checkpoints with linear attention and Mamba, and the rules that each engine finds broken, as in test_every_rule.py."""

from collections.abc import Callable
from dataclasses import replace

from megatron_export.engines import CheckpointView

from ..support.checkpoints import planned
from ..support.configs import NEMOTRON, QWEN35, QWEN_NEXT

SEES = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "text_config": QWEN35,
    "vision_config": {"depth": 1},
    "tie_word_embeddings": False,
}
EVERY_4TH = [*["linear_attention"] * 3, "full_attention"]
PREDICTS = {"mtp_num_hidden_layers": 1}
PROJECTION = "*.in_proj_qkvz"


def saying(said: CheckpointView, **changes: object) -> CheckpointView:
    """With other words in config.json; None takes a key out."""
    kept = {key: value for key, value in (said.config | changes).items() if value is not None}
    return replace(said, config=kept)


# fmt: off
CASES: dict[str, tuple[Callable[[], CheckpointView], dict, str, str, str]] = {
    "next": (lambda: planned(QWEN_NEXT | PREDICTS, format="bf16"), {}, "", "", ""),
    "next in FP8": (lambda: planned(QWEN_NEXT, format="fp8"), {}, "", "", ""),
    "next in FP8, predicting": (lambda: planned(QWEN_NEXT | PREDICTS, format="fp8"), {}, "", "mtp left out", ""),
    "next in FP8, all of it": (lambda: planned(QWEN_NEXT, format="fp8", set=(f"{PROJECTION}=fp8",)), {}, "", "hybrid linear", ""),
    "next in four bits, a layer in FP8": (
        lambda: planned(QWEN_NEXT, format="nvfp4", set=("*.layers.0.*=fp8",)), {}, "", "", "machine"),
    "next in blocks": (lambda: planned(QWEN_NEXT, format="fp8_pb"), {}, "", "", ""),
    "next in four bits": (lambda: planned(QWEN_NEXT, format="nvfp4"), {}, "", "", "machine"),
    "next in four bits, q, k and v too": (
        lambda: planned(QWEN_NEXT, format="nvfp4", set=("*.[qkv]_proj=nvfp4",)), {}, "", "next qkv", "machine"),
    "next in four bits, weights alone, all of it": (
        lambda: planned(QWEN_NEXT, format="w4a16_nvfp4", set=("*.[qkv]_proj=w4a16_nvfp4", f"{PROJECTION}=w4a16_nvfp4")), {},
        "", "hybrid linear, next qkv", "machine"),
    "next with a quantized head": (lambda: planned(QWEN_NEXT, format="fp8", set=("lm_head=fp8",)), {}, "head", "", ""),
    "next with a head in four bits": (
        lambda: planned(QWEN_NEXT, format="nvfp4", set=("lm_head=nvfp4",)), {}, "head", "", "machine"),
    "next with a layer of no experts": (
        lambda: planned(QWEN_NEXT | {"mlp_only_layers": [0]}, format="bf16"), {}, "", "dense", ""),
    "next without its interval": (
        lambda: saying(planned(QWEN_NEXT, format="bf16"), full_attention_interval=None), {}, "", "hybrid", ""),
    "next with attention elsewhere": (
        lambda: saying(planned(QWEN_NEXT, format="bf16"), full_attention_interval=4), {}, "", "hybrid", ""),
    "next on four GPUs, with two heads of keys": (lambda: planned(QWEN_NEXT, format="fp8"), {"tp": 4}, "heads", "heads", "heads"),
    "next with a cache": (lambda: planned(QWEN_NEXT, format="fp8", kv_cache="fp8", kv_scale=2.0), {}, "", "", "kv fp8"),
    "3.5 in FP8": (lambda: planned(QWEN35 | PREDICTS, format="fp8"), {}, "", "", ""),
    "3.5 in FP8 with its head": (lambda: planned(QWEN35, format="fp8", set=("lm_head=fp8",)), {}, "", "head", ""),
    "3.5 in blocks": (lambda: planned(QWEN35, format="fp8_pb"), {}, "", "", ""),
    "3.5 in blocks, of narrow heads": (
        lambda: planned(QWEN35 | {"linear_key_head_dim": 32}, format="fp8_pb"), {}, "blocks", "blocks", ""),
    "3.5 in blocks, on two GPUs": (lambda: planned(QWEN35, format="fp8_pb"), {"tp": 2}, "shared", "shared", "shared"),
    "3.5 in four bits": (lambda: planned(QWEN35 | PREDICTS, format="nvfp4"), {}, "", "", "packed"),
    "3.5 in MXFP8": (lambda: planned(QWEN35, format="mxfp8"), {}, "", "", "packed"),
    "3.5 in a mix": (lambda: planned(QWEN35 | PREDICTS, recipe="w4a16_nvfp4_mlp_fp8_attention"), {}, "", "", "machine"),
    "3.5 that sees": (lambda: planned(SEES, format="fp8"), {}, "", "", ""),
    "3.5 that sees, with mergers of nothing": (
        lambda: saying(planned(SEES, format="fp8"), vision_config={"depth": 1}), {}, "", "hybrid", ""),
    "Nemotron in FP8": (lambda: planned(NEMOTRON, format="fp8"), {}, "", "", ""),
    "Nemotron in FP8 with a cache": (lambda: planned(NEMOTRON, format="fp8", kv_cache="fp8", kv_scale=2.0), {}, "", "", "kv fp8"),
    "Nemotron in blocks": (lambda: planned(NEMOTRON, format="fp8_pb"), {}, "", "", ""),
    "Nemotron in four bits": (lambda: planned(NEMOTRON, format="nvfp4"), {}, "", "", "machine"),
    "Nemotron in weights of four bits": (lambda: planned(NEMOTRON, format="w4a16_nvfp4"), {}, "", "", "machine"),
    "Nemotron in weights of four bits, all of it": (
        lambda: planned(NEMOTRON, format="w4a16_nvfp4", set=("*.in_proj=w4a16_nvfp4",)), {}, "", "hybrid linear", "machine"),
    "Nemotron of four groups": (
        lambda: saying(planned(NEMOTRON | {"n_groups": 4}, format="bf16"), mamba_n_groups=None), {}, "", "hybrid", ""),
    "Nemotron in transformers' words": (
        lambda: saying(planned(NEMOTRON, format="bf16"), hybrid_override_pattern=None,
                       layers_block_type=["linear_attention", "moe", "full_attention"]), {}, "", "hybrid", ""),
    "Nemotron on 16 GPUs": (lambda: planned(NEMOTRON, format="fp8"), {"tp": 16}, "heads", "heads", "heads"),
}
# fmt: on
