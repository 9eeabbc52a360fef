"""Every rule of every engine, asserted of two checkpoints at least: of these, of ModelOpt's own, and of damaged ones."""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from megatron_export.engines import ENGINES, CheckpointView, Header, verdict_of
from megatron_export.formats import Options

from ..support.checkpoints import DAMAGES, described, golden, planned
from ..support.configs import (
    GLM5,
    KIMI,
    LLAMA,
    LLAMA4,
    LLAMA4_SEES,
    MINIMAX,
    MINISTRAL3,
    MINISTRAL3_SEES,
    MISTRAL3,
    MIXTRAL,
    PHI3,
    QWEN,
    QWEN_MOE,
    QWEN_MOE_SEES,
    QWEN_SEES,
    SMALL_V3,
)
from .hybrid_cases import CASES as HYBRIDS
from .product import list_joined
from .test_rules import GOLDEN, GPT_OSS, MISTRAL, alter, reconfigured, store_the_last_layer_plain

SPELLED = Options(fp8_pb_spelling="modelopt")
KEPT = Options(awq_output="modelopt")
TWO_HOMES = {"model.norm.weight": "model.safetensors", "lm_head.weight": "other.safetensors"}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"]}
CACHE_OF_2 = tuple(f"layers.2.self_attn.{part}_proj.{part}_scale" for part in "kv")
NVFP4_CACHE = {"kv_cache_scheme": "NVFP4", "kv_cache_quant_algo": "NVFP4"}
FP8_CACHE = {"kv_cache_scheme": "FP8", "kv_cache_quant_algo": "FP8"}
NOBODYS = {"architectures": ["NobodysForCausalLM"]}
DOWN_TO_LATENTS = ("q_a_proj.weight_scale", "kv_a_proj_with_mqa.weight_scale")
MIX = {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"model.layers.0.self_attn.o_proj": {"quant_algo": "FP8"}}}


def hurt(name: str, how: str) -> Callable[[], CheckpointView]:
    """A checkpoint of ModelOpt after a damage of `DAMAGES`, there done to another one."""

    def make() -> CheckpointView:
        said = golden(f"models/{name}")
        DAMAGES[how][1](said)
        return described(said)

    return make


def without_words(said: CheckpointView, *keys: str) -> CheckpointView:
    """The same tensors, without these keys in config.json."""
    return replace(said, config={key: value for key, value in said.config.items() if key not in keys})


def without_tensors(said: CheckpointView, *ends: str) -> CheckpointView:
    """Without the tensors whose names end so."""
    files = {f: {n: one for n, one in held.items() if not n.endswith(ends)} for f, held in said.files.items()}
    return replace(said, files=files)


def renamed(said: CheckpointView, key: str, other: str) -> CheckpointView:
    """With another key in config.json's section."""
    section = said.config["quantization_config"]
    return reconfigured(
        said, quantization_config={other if one == key else one: value for one, value in section.items()}
    )


def naming_joined(said: CheckpointView) -> CheckpointView:
    """A mixed one whose quantized_layers has joined linears too."""
    said = copy.deepcopy(said)
    list_joined(said.config["quantization_config"]["quantized_layers"])
    list_joined(said.quant["quantization"]["quantized_layers"])
    return said


def unsaid(config: dict, key: str) -> CheckpointView:
    """In bfloat16, without a key of the language model in config.json."""
    said = planned(config, format="bf16")
    inner = {name: value for name, value in said.config["text_config"].items() if name != key}
    return reconfigured(said, text_config=inner)


def unlisted(said: CheckpointView, end: str) -> CheckpointView:
    """Without the names that end so in lists of modules left out."""
    lists = {
        "ignore": said.config["quantization_config"]["ignore"],
        "exclude_modules": said.quant["quantization"]["exclude_modules"],
    }
    return alter(said, **{key: [name for name in found if not name.endswith(end)] for key, found in lists.items()})


def with_a_dim(said: CheckpointView, *ends: str, size: int = 1) -> CheckpointView:
    """With [size] where numbers whose names end so have no dims."""
    files = {
        f: {n: one._replace(shape=(size,)) if n.endswith(ends) else one for n, one in held.items()}
        for f, held in said.files.items()
    }
    return replace(said, files=files)


def with_factors(said: CheckpointView, last: str) -> CheckpointView:
    """With factors of the inputs of every module of that name."""
    files = {
        f: held
        | {
            n.replace(".weight", ".pre_quant_scale"): Header("BF16", (said.number("hidden_size"),))
            for n in held
            if n.endswith(f"{last}.weight")
        }
        for f, held in said.files.items()
    }
    return replace(said, files=files)


def with_header(said: CheckpointView, end: str, **changes: Any) -> CheckpointView:
    """With another dtype or shape of the tensors whose names end so."""
    files = {
        f: {n: one._replace(**changes) if n.endswith(end) else one for n, one in held.items()}
        for f, held in said.files.items()
    }
    return replace(said, files=files)


def mixed(config: dict, *lines: str, **settings: Any) -> CheckpointView:
    """What a recipe would write: NVFP4 in MLPs and experts, and these lines."""
    return planned(config, recipe="nvfp4_mlp_only", set=lines, **settings)


def without_predicting(form: str) -> CheckpointView:
    """DeepSeek's config.json with a layer that predicts one more token, and files without it."""
    whole = planned(SMALL_V3, format=form)
    without = planned(SMALL_V3 | {"num_nextn_predict_layers": 0}, format=form)
    return replace(without, config=whole.config, expected=whole.expected)


# Case -> the checkpoint, what else the engines are asked (a GPU, GPUs that share layers, a release), and all that vLLM, SGLang and
# TensorRT-LLM find.
# fmt: off
CASES: dict[str, tuple[Callable[[], CheckpointView], dict, str, str, str]] = {
    "a file of two lost": (hurt("qwen3-FP8-mcore", "a file lost"), {},
        "files, missing, not left out", "files, missing", "files, missing"),
    "a file that is named alone": (lambda: replace(planned(QWEN, format="bf16"), index=TWO_HOMES), {}, "files", "files", "files"),
    "a stray file": (hurt("qwen3-NVFP4", "a stray file"), {}, "unknown", "unknown", "unknown, machine"),
    "Mistral's file": (hurt("qwen3-FP8", "Mistral's file"), {},
        "consolidated, unknown", "consolidated, unknown", "consolidated, unknown"),
    "a tensor twice": (hurt("qwen3-FP8-mcore", "a tensor repeated"), {}, "twice, not left out", "twice", "twice"),
    "a norm lost": (hurt("qwen3moe-NVFP4", "a norm lost"), {}, "missing", "missing", "missing, machine"),
    "an expert lost": (
        lambda: without_tensors(planned(MIXTRAL, format="fp8"), "layers.1.block_sparse_moe.experts.3.w1.weight"), {},
        "experts", "experts", "experts"),
    "integers": (hurt("qwen3-FP8", "stored in integers"), {}, "dtype", "dtype", "dtype"),
    "a factor too many": (hurt("qwen3-NVFP4", "a factor too many"), {}, "extra", "awq", "machine"),
    "partly": (hurt("qwen3-NVFP4", "a part left out"), {}, "partly", "partly", "left out, machine"),
    "no method": (hurt("qwen3-NVFP4", "the method forgotten"), {}, "dialect", "", "machine"),
    "the file alone": (hurt("qwen3-NVFP4", "the file without a size"), {}, "config", "config", "machine"),
    "another method": (hurt("qwen3-NVFP4", "another method"), {}, "another", "another", "another"),
    "a mix of nothing": (hurt("qwen3-NVFP4", "nothing mixed"), {}, "mixed", "mixed", "left out"),
    "a mix of every layer": (hurt("qwen3-NVFP4", "every layer mixed"), {}, "", "mixed joined", "machine"),
    "a mix of FP8": (
        lambda: alter(planned(QWEN_MOE, format="fp8"), **MIX), {},
        "left out", "mixed", "left out"),
    "codes unsaid": (lambda: replace(reconfigured(planned(QWEN, format="fp8"), quantization_config=None), quant=None), {},
        "unquantized", "unquantized", "unquantized"),
    "blocks cut off": (hurt("qwen3-FP8", "a block cut"), {}, "inputs", "algorithm", "case"),
    "blocks in Llama": (lambda: planned(LLAMA, format="fp8_pb"), {}, "", "llama blocks", ""),
    "Ministral 3": (lambda: planned(MINISTRAL3, format="fp8"), {}, "queries", "", "architecture"),
    "Ministral 3 in blocks": (lambda: planned(MINISTRAL3, format="fp8_pb"), {}, "queries", "llama blocks", "architecture"),
    "Ministral 3 that sees": (lambda: planned(MINISTRAL3_SEES, format="nvfp4"), {}, "queries", "", "architecture"),
    "Ministral 3 that sees, in blocks": (
        lambda: planned(MINISTRAL3_SEES, format="fp8_pb"), {}, "inverse, queries", "llama blocks", "architecture"),
    "Ministral 3, told as vLLM reads it": (
        lambda: reconfigured(planned(MINISTRAL3, format="bf16"), llama_4_scaling={"beta": 0.1}), {}, "", "", "architecture"),
    "blocks in Mistral": (
        lambda: planned(LLAMA | {"architectures": ["MistralForCausalLM"]}, format="fp8_pb"), {}, "", "llama blocks", ""),
    "cache in Mistral": (
        lambda: planned(LLAMA | {"architectures": ["MistralForCausalLM"]}, format="fp8", kv_cache="fp8"), {},
        "", "", "kv fp8"),
    "few rows": (lambda: planned(QWEN_MOE | {"num_key_value_heads": 2}, format="fp8_pb"), {}, "blocks", "blocks", ""),
    "few inputs": (
        lambda: planned(LLAMA | {"intermediate_size": 576}, format="fp8_pb", options=SPELLED), {},
        "inputs", "algorithm", "case"),
    "blocks of experts": (lambda: alter(planned(QWEN_MOE, format="fp8"), quant_algo="FP8_PER_CHANNEL_PER_TOKEN"), {},
        "shape, extra, block experts", "algorithm", "shape, expert codes, extra"),
    "heads": (lambda: planned(LLAMA, format="bf16"), {"tp": 3}, "heads", "heads", "heads"),
    "heads of keys": (
        lambda: planned(QWEN | {"num_key_value_heads": 8, "num_attention_heads": 24, "head_dim": 32}, format="bf16"), {"tp": 3},
        "heads", "heads", "heads"),
    "shared groups": (lambda: planned(LLAMA | {"intermediate_size": 528}, format="nvfp4"), {"tp": 2},
        "shared", "shared", "shared, machine"),
    "shared blocks": (lambda: planned(QWEN, format="fp8_pb"), {"tp": 8}, "shared", "shared", "shared"),
    "stacks": (lambda: replace(planned(LLAMA4_SEES, format="fp8"), config=planned(LLAMA4, format="fp8").config), {},
        "stack, router kernel", "llama4 text", "llama4 text, two configs"),
    "stacks in four bits": (lambda: planned(LLAMA4_SEES, format="nvfp4"), {}, "router kernel", "stack", "machine"),
    "stacks on Hopper": (lambda: planned(LLAMA4_SEES, format="nvfp4"), {"gpu": "h200"}, "router", "stack", "gpu"),
    "one by one on Hopper": (lambda: planned(LLAMA4, format="nvfp4"), {"gpu": "h100"},
        "router", "llama4 text", "llama4 text, llama4, gpu"),
    "one by one in fp8": (lambda: planned(LLAMA4, format="fp8"), {}, "router kernel", "llama4 text", "llama4 text, llama4"),
    "one by one in blocks": (lambda: planned(LLAMA4, format="fp8_pb"), {}, "", "llama4 text", "llama4 text, llama4"),
    "rotated": (lambda: reconfigured(planned(LLAMA, format="nvfp4"), architectures=["Llama4ForCausalLM"]), {},
        "", "rotated", "llama4 text, machine"),
    "windows": (lambda: planned(MISTRAL, format="fp8"), {}, "", "window", ""),
    "windows in Phi 3": (
        lambda: planned(PHI3 | {"sliding_window": 8, "max_position_embeddings": 16}, format="bf16"), {}, "", "window", ""),
    "gpt-oss": (lambda: planned(GPT_OSS, format="fp8"), {}, "gpt_oss", "gpt_oss", "gpt_oss"),
    "gpt-oss in four bits": (lambda: planned(GPT_OSS, format="nvfp4"), {}, "gpt_oss", "gpt_oss", "gpt_oss"),
    "gpt-oss as OpenAI has it": (lambda: planned(GPT_OSS, format="mxfp4"), {}, "", "", ""),
    "gpt-oss so, on a T4": (lambda: planned(GPT_OSS, format="mxfp4"), {"gpu": "t4"}, "gpu", "gpu", ""),
    "gpt-oss so, without scales": (lambda: without_tensors(planned(GPT_OSS, format="mxfp4"), "down_proj_scales"), {},
        "scale", "scale", "scale"),
    "gpt-oss so, without blocks": (lambda: without_tensors(planned(GPT_OSS, format="mxfp4"), "down_proj_blocks"), {},
        "experts", "experts", "experts"),
    "gpt-oss so, in other blocks": (lambda: with_header(planned(GPT_OSS, format="mxfp4"), "down_proj_blocks", shape=(4, 64, 1, 32)),
        {}, "shape", "shape", "shape"),
    "gpt-oss so, with scales in floats": (lambda: with_header(planned(GPT_OSS, format="mxfp4"), "down_proj_scales", dtype="F32"),
        {}, "dtype", "dtype", "dtype"),
    "gpt-oss so, in bfloat16": (lambda: replace(planned(GPT_OSS, format="bf16"), config=planned(GPT_OSS, format="mxfp4").config),
        {}, "not left out", "not left out", "not left out"),
    "gpt-oss so, attention too": (lambda: with_header(planned(GPT_OSS, format="mxfp4"), "o_proj.weight", dtype="F8_E4M3"),
        {}, "left out", "left out", "left out"),
    "no words for routers": (
        lambda: reconfigured(planned(SMALL_V3, format="fp8"), topk_method=None, scoring_func="sigmoid"), {},
        "bias", "", ""),
    "latent": (lambda: planned(SMALL_V3, format="nvfp4", quantize_mla=True), {}, "", "latent", "latent, machine"),
    "latent in fp8": (lambda: planned(SMALL_V3, format="fp8", quantize_mla=True), {}, "", "", "latent"),
    "latent cache": (lambda: alter(planned(SMALL_V3, format="nvfp4"), **NVFP4_CACHE), {},
        "kv latent", "kv nvfp4", "machine"),
    "latent cache in fp8": (
        lambda: planned(SMALL_V3, format="fp8", kv_cache="fp8", kv_scale=1.0), {}, "", "", ""),
    "latent cache with scales": (
        lambda: alter(hurt("deepseekv3-NVFP4-KVNVFP4", "routers, cache")(), **FP8_CACHE), {},
        "kv mla", "latent", "latent, kv fp8, machine"),
    "predicts, plain": (lambda: store_the_last_layer_plain(planned(SMALL_V3, format="nvfp4")), {},
        "mtp left out", "mtp left out", "machine"),
    "predicts twice": (lambda: planned(SMALL_V3 | {"num_nextn_predict_layers": 2}, format="fp8"), {}, "", "mtp count", ""),
    "predicts nothing": (
        lambda: reconfigured(planned(SMALL_V3 | {"num_nextn_predict_layers": 0}, format="fp8"), num_nextn_predict_layers=1), {},
        "", "", ""),
    "dense among experts": (lambda: planned(QWEN_MOE | {"mlp_only_layers": [1]}, format="bf16"), {}, "", "dense", ""),
    "experts in every other": (lambda: planned(QWEN_MOE | {"decoder_sparse_step": 2}, format="fp8"), {}, "", "dense", ""),
    "cache in blocks": (lambda: planned(QWEN_MOE, format="fp8_pb", kv_cache="fp8"), {},
        "kv dialect", "kv ignored, kv flag", "kv fp8"),
    "cache in blocks, dense": (lambda: planned(QWEN, format="fp8_pb", kv_cache="fp8"), {},
        "kv dialect", "kv ignored, kv flag", "kv fp8"),
    "cache in blocks, alone": (lambda: replace(planned(QWEN, format="fp8_pb", kv_cache="fp8"), quant=None), {},
        "kv dialect", "kv ignored, kv flag", "kv dialect"),
    "cache in blocks of experts, alone": (lambda: replace(planned(QWEN_MOE, format="fp8_pb", kv_cache="fp8"), quant=None), {},
        "kv dialect", "kv ignored, kv flag", "kv dialect"),
    "cache in four bits in blocks": (lambda: planned(QWEN, format="fp8_pb", kv_cache="nvfp4"), {},
        "kv dialect, kv nvfp4", "kv ignored, kv nvfp4", "kv nvfp4"),
    "cache in four bits in int4": (lambda: planned(QWEN, format="int4_awq", kv_cache="nvfp4"), {},
        "algorithm", "algorithm", "kv nvfp4"),
    "cache in four bits on L4": (
        lambda: planned(LLAMA, format="nvfp4", kv_cache="nvfp4"), {"gpu": "l4"}, "kv nvfp4", "kv nvfp4", "gpu"),
    "cache in four bits, narrow heads": (
        lambda: planned(LLAMA | {"head_dim": 64}, format="nvfp4", kv_cache="nvfp4"), {"gpu": "rtx5090"},
        "gpu, kv nvfp4", "kv nvfp4", ""),
    "cache in four bits, narrow heads on B200": (
        lambda: planned(LLAMA | {"head_dim": 64}, format="nvfp4", kv_cache="nvfp4"), {"gpu": "b200"}, "kv nvfp4", "kv nvfp4", ""),
    "cache in four bits": (lambda: planned(LLAMA, format="nvfp4", kv_cache="nvfp4"), {}, "kv nvfp4", "kv nvfp4", "machine"),
    "cache in four bits, alone": (lambda: replace(planned(LLAMA, format="nvfp4", kv_cache="nvfp4"), quant=None), {},
        "kv nvfp4", "kv nvfp4", "machine"),
    "cache in four bits of Qwen, alone": (lambda: replace(planned(QWEN, format="fp8", kv_cache="nvfp4"), quant=None), {},
        "kv nvfp4", "kv ignored, kv nvfp4", ""),
    "cache scales of a layer lost": (
        lambda: without_tensors(planned(QWEN, format="fp8", kv_cache="fp8"), *CACHE_OF_2), {},
        "kv scales", "kv ignored", "kv fp8"),
    "no scales of a cache": (lambda: planned(QWEN, format="fp8", kv_cache="fp8", kv_scale=1.0), {}, "", "", ""),
    "no scales of a cache in four bits": (
        lambda: without_tensors(planned(LLAMA, format="nvfp4", kv_cache="nvfp4"), "k_scale", "v_scale"), {},
        "kv scales, kv nvfp4", "kv nvfp4", "machine"),
    "cache scales spelled short": (hurt("qwen3-FP8-KVFP8", "the cache spelt short"), {}, "", "kv ignored", "kv spelling"),
    "cache scales of heads": (
        lambda: with_a_dim(planned(LLAMA, format="nvfp4", kv_cache="fp8"), "k_scale", "v_scale", size=4), {},
        "kv shape", "kv shape", "kv shape, kv fp8, machine"),
    "cache scales of keys alone": (lambda: without_tensors(planned(LLAMA, format="fp8", kv_cache="fp8"), "v_scale"), {},
        "kv half", "kv half", "kv half, kv fp8"),
    "cache scales of values alone": (lambda: without_tensors(planned(LLAMA, format="fp8", kv_cache="fp8"), "k_scale"), {},
        "kv pair", "kv pair", "kv spelling"),
    "dual chunks": (lambda: reconfigured(planned(QWEN2, format="fp8"), dual_chunk_attention_config={"chunk_size": 32768}), {},
        "chunks", "chunks", ""),
    "two configs": (hurt("qwen3-FP8", "two configs"), {}, "", "", "two configs"),
    "two algorithms": (lambda: replace(planned(LLAMA, format="fp8"), quant=planned(LLAMA, format="nvfp4").quant), {},
        "", "", "dtype, scale, two configs, machine"),
    "another architecture": (lambda: replace(reconfigured(planned(LLAMA, format="fp8"), **NOBODYS), expected=None), {},
        "architecture", "architecture", "architecture"),
    "an algorithm of nobody": (lambda: alter(planned(LLAMA, format="fp8"), quant_algo="INT3"), {},
        "algorithm", "algorithm", "algorithm"),
    "an old release": (lambda: planned(LLAMA, format="nvfp4_awq", options=KEPT), {"version": "1.2"},
        "algorithm, version", "awq, version", "old, version"),
    "an old release, in blocks": (
        lambda: planned(LLAMA, format="fp8_pb", options=SPELLED), {"version": "1.2.1"},
        "version", "algorithm, version", "old, version"),
    "experts of ModelOpt in blocks": (lambda: alter(planned(MIXTRAL, format="fp8"), quant_algo="FP8_PB_WO"), {},
        "shape, extra, block experts", "algorithm", "shape, block experts, extra, case"),
    "on a T4": (lambda: planned(LLAMA, format="fp8"), {"gpu": "t4"}, "gpu", "gpu", "gpu"),
    "on an A100": (lambda: planned(MIXTRAL, format="nvfp4", kv_cache="nvfp4"), {"gpu": "a100"},
        "kv nvfp4", "kv ignored, kv nvfp4", "gpu"),
    "smoothed, kept": (lambda: planned(LLAMA, format="nvfp4_awq", options=KEPT), {},
        "algorithm", "awq", "machine"),
    "factors of what is joined": (lambda: with_factors(planned(LLAMA, format="nvfp4"), "q_proj"), {},
        "extra", "awq", "joined factor, machine"),
    "factors of what is joined, int4": (lambda: with_factors(planned(QWEN, format="int4_awq"), "up_proj"), {},
        "algorithm", "algorithm", "joined factor"),
    "inputs of some": (lambda: without_tensors(planned(LLAMA, format="fp8"), "up_proj.input_scale"), {},
        "scale", "scale", "joined inputs"),
    "no size of groups": (lambda: alter(planned(QWEN, format="int4_awq"), group_size=None), {},
        "algorithm", "algorithm", "group size"),
    "no size of groups, w4a8": (lambda: alter(planned(QWEN, format="w4a8_awq"), group_size=None), {},
        "algorithm", "algorithm", "group size, machine"),
    "experts of no inputs": (lambda: without_tensors(planned(QWEN_MOE, format="fp8"), "experts.0.up_proj.input_scale"), {},
        "scale", "scale", "expert inputs"),
    "experts, smoothed": (lambda: planned(QWEN_MOE, format="w4a8_awq"), {}, "algorithm", "algorithm", "expert factors, machine"),
    "experts of no inputs, Mixtral": (lambda: without_tensors(planned(MIXTRAL, format="fp8"), "experts.0.w3.input_scale"), {},
        "scale", "scale", "expert inputs"),
    "experts, smoothed, Mixtral": (lambda: planned(MIXTRAL, format="w4a8_awq"), {},
        "algorithm", "algorithm", "expert factors, machine"),
    "experts of another backend": (lambda: planned(MIXTRAL, format="w4a8_nvfp4_fp8"), {},
        "algorithm", "algorithm", "expert backend, machine"),
    "smoothed in int4": (lambda: planned(QWEN, format="int4_awq"), {}, "algorithm", "algorithm", ""),
    "no words for scores": (lambda: without_words(planned(SMALL_V3, format="fp8"), "scoring_func"), {}, "softmax", "bias", ""),
    "no words for scores, bf16": (lambda: without_words(planned(SMALL_V3, format="bf16"), "scoring_func", "topk_method"), {},
        "bias, softmax", "bias", ""),
    "predicts not": (lambda: without_predicting("fp8"), {}, "mtp", "mtp", "mtp, two configs"),
    "predicts not, bf16": (lambda: without_predicting("bf16"), {}, "mtp", "mtp", "mtp"),
    "predicts thrice": (lambda: planned(SMALL_V3 | {"num_nextn_predict_layers": 3}, format="nvfp4"), {},
        "", "mtp count", "machine"),
    "rotated, smoothed": (
        lambda: reconfigured(planned(LLAMA, format="nvfp4_awq"), architectures=["Llama4ForConditionalGeneration"]), {},
        "", "rotated", "machine"),
    "scales with a dim": (
        lambda: with_a_dim(planned(SMALL_V3, format="fp8", quantize_mla=True), *DOWN_TO_LATENTS), {},
        "", "latent scale", "latent"),
    "plain, predicts in fp8": (lambda: store_the_last_layer_plain(planned(SMALL_V3, format="fp8")), {},
        "mtp left out", "mtp left out", ""),
    "kv in w4": (lambda: planned(LLAMA, format="w4a8_awq", kv_cache="fp8"), {"gpu": "b200"},
        "algorithm", "algorithm", "gpu, kv fp8"),
    "stacks in four bits, not seen": (
        lambda: replace(planned(LLAMA4_SEES, format="nvfp4"), config=planned(LLAMA4, format="nvfp4").config), {},
        "not left out, stack, router kernel", "llama4 text, stack", "llama4 text, two configs, machine"),
    "latent cache of fp8 weights": (
        lambda: alter(planned(SMALL_V3, format="fp8"), **NVFP4_CACHE), {},
        "kv latent", "kv nvfp4", ""),
    "experts on a T4": (lambda: planned(MIXTRAL, format="fp8"), {"gpu": "t4"}, "gpu", "gpu", "gpu"),
    "called W4A16": (hurt("qwen3-NVFP4", "called W4A16"), {}, "", "extra", "extra, machine"),
    "few rows, dense": (lambda: planned(QWEN | {"num_key_value_heads": 2}, format="fp8_pb"), {}, "blocks", "blocks", ""),
    "no files": (lambda: replace(planned(LLAMA, format="bf16"), files={}), {},
        "missing", "missing", "missing"),
    "stored in bfloat16": (hurt("qwen3-NVFP4", "stored in bfloat16"), {},
        "not left out", "not left out", "not left out, machine"),
    "mixed within a linear": (hurt("qwen3-NVFP4", "mixed within a linear"), {},
        "partly", "partly, mixed joined", "partly, machine"),
    "another algorithm of nobody": (lambda: alter(planned(QWEN, format="nvfp4"), quant_algo="INT8_SQ"), {},
        "algorithm", "algorithm", "algorithm"),
    "latent in mxfp8": (lambda: planned(SMALL_V3, format="mxfp8"), {}, "", "mtp left out", "machine"),
    "mxfp8 in Llama": (lambda: planned(LLAMA, format="mxfp8"), {}, "", "llama blocks", "machine"),
    "mxfp8 on Blackwell": (lambda: planned(QWEN_MOE, format="mxfp8"), {"gpu": "b200"}, "", "", ""),
    "mxfp8 on Hopper": (lambda: planned(QWEN_MOE, format="mxfp8"), {"gpu": "h200"}, "", "gpu", "gpu"),
    "weights of NVFP4": (lambda: planned(QWEN_MOE, format="w4a16_nvfp4"), {"gpu": "h200"}, "", "", ""),
    "weights of NVFP4 on Blackwell": (lambda: planned(QWEN_MOE, format="w4a16_nvfp4"), {"gpu": "b200"}, "", "expert inputs", "gpu"),
    "weights of NVFP4 in a mix, on Blackwell": (
        lambda: planned(QWEN_MOE, recipe="w4a16_nvfp4_mlp_fp8_attention"), {"gpu": "rtx5090"}, "", "expert inputs", ""),
    "weights of NVFP4, before": (lambda: planned(QWEN, format="w4a16_nvfp4"), {"version": "0.5.17"},
        "version", "old", "old, version"),
    "mxfp8, before": (lambda: planned(QWEN, format="mxfp8"), {"version": "0.5.17"}, "version", "old", "old, version"),
    "a mix with blocks, before": (lambda: mixed(QWEN_MOE, "*.self_attn.*=fp8_pb"), {"version": "0.5.19"},
        "left out, version", "old", "machine, version"),
    "left out under the other key": (
        lambda: replace(renamed(planned(QWEN, format="fp8", exclude=("*.layers.1.*",)), "ignore", "exclude_modules"), quant=None),
        {}, "not left out", "not left out", "not left out"),
    "left out under the other key, later": (
        lambda: replace(renamed(planned(QWEN, format="fp8", exclude=("*.layers.1.*",)), "ignore", "exclude_modules"), quant=None),
        {"version": "0.33"}, "", "not left out, version", "not left out, version"),
    "a quantized head of Mixtral": (lambda: planned(MIXTRAL, format="fp8", set=("lm_head=fp8",)), {}, "", "head", ""),
    "a quantized head of Mixtral, in four bits": (
        lambda: planned(MIXTRAL, format="nvfp4", set=("lm_head=nvfp4",)), {}, "", "head", "machine"),
    "rows of experts": (lambda: planned(MIXTRAL, format="fp8_pc_pt"), {}, "block experts", "algorithm", "expert codes"),
    "rows": (lambda: planned(QWEN, format="fp8_pc_pt"), {}, "", "algorithm", ""),
    "mxfp4": (lambda: planned(QWEN, format="mxfp4"), {}, "algorithm", "algorithm", "algorithm"),
    "w4a8, e8m0": (lambda: planned(QWEN, format="w4a8_mxfp4_fp8"), {"gpu": "b200"}, "algorithm", "algorithm", ""),
    "w4a8, e4m3": (lambda: planned(MIXTRAL, format="w4a8_nvfp4_fp8"), {"gpu": "h200"},
        "algorithm", "algorithm", "gpu, expert backend"),
    "stacked weights of NVFP4, a scale lost": (
        lambda: without_tensors(planned(LLAMA4_SEES, format="w4a16_nvfp4"), "experts.down_proj_weight_scale_2"), {"gpu": "b200"},
        "scale", "scale, stack", "scale, gpu"),
    "a mix with MXFP8": (lambda: mixed(QWEN_MOE, "*.self_attn.*=mxfp8"), {}, "", "scale, extra", "machine"),
    "a mix with blocks": (lambda: mixed(QWEN_MOE, "*.self_attn.*=fp8_pb"), {}, "left out", "", "machine"),
    "a mix with blocks of ModelOpt": (lambda: mixed(LLAMA, "*.self_attn.*=fp8_pb", options=SPELLED), {},
        "", "scale, mixed joined, extra", "case, machine"),
    "a mix with blocks of ModelOpt, before 1.3": (
        lambda: mixed(LLAMA, "*.self_attn.*=fp8_pb", options=SPELLED), {"version": "1.2"},
        "version", "scale, mixed joined, extra, version", "old, version"),
    "a mix with channels": (lambda: mixed(QWEN_MOE, "*.self_attn.*=fp8_pc_pt"), {}, "", "left out, mixed", "machine"),
    "a mix with experts in channels": (
        lambda: mixed(QWEN_MOE, "*.self_attn.*=nvfp4", "*.experts=fp8_pc_pt"), {},
        "block experts", "left out, mixed", "expert codes, machine"),
    "a mix with int4 in groups of 64, shared": (
        lambda: mixed(LLAMA, "*.self_attn.*=int4_awq", options=Options(group_size=64)), {"tp": 4},
        "left out, mixed", "left out, mixed joined, mixed, awq", "machine"),
    "a mix with int4 in groups of 128, shared": (lambda: mixed(LLAMA, "*.self_attn.*=int4_awq"), {"tp": 4},
        "left out, mixed", "left out, mixed joined, mixed, awq", "shared, machine"),
    "a mix for Blackwell": (lambda: mixed(QWEN, "*.self_attn.*=w4a8_nvfp4_fp8"), {"gpu": "h200"},
        "left out, mixed", "left out, mixed joined, mixed", "gpu"),
    "a mix that names joined linears": (lambda: naming_joined(mixed(LLAMA, "*.self_attn.*=fp8")), {}, "", "", "machine"),
    "a mix of Mixtral": (lambda: mixed(MIXTRAL, "*.self_attn.o_proj=fp8"), {}, "", "mixed joined", "machine"),
    "a mix on Hopper": (lambda: planned(QWEN_MOE, recipe="w4a16_nvfp4_mlp_fp8_attention"), {"gpu": "h200"}, "", "", ""),
    "a mix on a T4": (lambda: mixed(QWEN_MOE, "*.self_attn.*=fp8"), {"gpu": "t4"}, "", "gpu", "gpu"),
    "a mix on an A100": (lambda: mixed(QWEN_MOE, "*.self_attn.*=fp8"), {"gpu": "a100"}, "", "", "gpu"),
    "a mix with a cache in four bits": (lambda: mixed(QWEN_MOE, "*.self_attn.*=fp8", kv_cache="nvfp4"), {},
        "mixed cache, kv nvfp4", "kv ignored, kv nvfp4", "machine"),
    "a mix with a cache in four bits, dense": (lambda: mixed(LLAMA, "*.self_attn.*=fp8", kv_cache="nvfp4"), {},
        "mixed cache, kv nvfp4", "mixed joined, kv nvfp4", "machine"),
    "a mix in config.json": (lambda: replace(mixed(QWEN_MOE, "*.self_attn.*=fp8"), quant=None), {}, "", "no cache said", "machine"),
    "a mix in config.json, dense": (lambda: replace(mixed(LLAMA, "*.self_attn.*=fp8"), quant=None), {},
        "", "no cache said", "machine"),
    "experts beside shared ones of a mix": (
        lambda: alter(planned(SMALL_V3, format="bf16", set=("*.shared_experts.*=fp8", "*.layers.0.mlp.*=nvfp4")), ignore=[]), {},
        "not left out, mtp left out", "mixed joined", "two configs, machine"),
    "stacks beside MXFP8": (lambda: mixed(LLAMA4_SEES, "*.o_proj=mxfp8"), {}, "router kernel", "scale, stack, extra", "machine"),
    "experts beside blocks of ModelOpt": (lambda: mixed(QWEN_MOE, "*.o_proj=fp8_pb", options=SPELLED), {},
        "", "scale, extra", "case, machine"),
    "a quantized head in a mix": (lambda: mixed(QWEN_MOE, "*.self_attn.*=fp8", "lm_head=fp8"), {}, "", "", "machine"),
    "a dense layer left out": (
        lambda: planned(QWEN_MOE | {"mlp_only_layers": [1]}, recipe="fp8_attention_only"), {}, "not left out", "dense", ""),
    "Kimi in blocks": (lambda: planned(KIMI, format="fp8_pb"), {}, "", "", "sees"),
    "experts of Qwen3-VL": (lambda: planned(QWEN_MOE_SEES, format="fp8"), {}, "", "", "sees"),
    "a layer of Mistral 3 left out": (
        lambda: planned(MISTRAL3, format="fp8", exclude=("*.layers.1.*",)), {}, "", "", ""),
    "a layer of Qwen3-VL left out": (
        lambda: planned(QWEN_SEES, format="fp8", exclude=("*.layers.1.*",)), {}, "", "", "not left out"),
    "blocks of Mistral 3": (lambda: planned(MISTRAL3, format="fp8_pb"), {}, "inverse", "llama blocks", ""),
    "blocks of Mistral 3 with a cache": (lambda: planned(MISTRAL3, format="fp8_pb", kv_cache="fp8"), {},
        "inverse, kv dialect", "llama blocks, kv flag", "kv fp8"),
    "blocks of Phi 3": (lambda: planned(PHI3, format="fp8_pb"), {}, "", "llama blocks", "joined file"),
    "blocks of Phi 3 that hold rows of two": (lambda: planned(PHI3 | {"hidden_size": 192}, format="fp8_pb"), {},
        "blocks", "blocks, llama blocks", "joined file"),
    "rows of Phi 3": (lambda: planned(PHI3, format="fp8_pc_pt"), {}, "", "algorithm", "joined file"),
    "four bits of Phi 3": (lambda: planned(PHI3, format="w4a16_nvfp4"), {}, "", "joined file", "machine"),
    "four bits of Phi 3 in a mix": (lambda: planned(PHI3, recipe="w4a16_nvfp4_mlp_fp8_attention"), {},
        "", "joined file", "machine"),
    "MiniMax, nothing said": (lambda: without_words(planned(MINIMAX, format="fp8"), "use_routing_bias", "use_qk_norm"), {},
        "keys", "keys", ""),
    "Qwen 3 that sees, norm_topk_prob not said": (lambda: unsaid(QWEN_MOE_SEES, "norm_topk_prob"), {}, "keys", "", ""),
    "Kimi, its class not said": (lambda: unsaid(KIMI, "architectures"), {}, "", "keys", ""),
    "GLM 5, indexers not said": (
        lambda: without_words(planned(GLM5, format="nvfp4"), "index_topk_pattern"), {}, "indexers", "", "machine"),
    "GLM 5, other indexers": (
        lambda: reconfigured(planned(GLM5, format="bf16"), index_topk_pattern="FFSF"), {}, "indexers", "", ""),
    "weights of indexers not left out": (lambda: unlisted(planned(GLM5, format="fp8"), "indexer.weights_proj"), {}, "", "", ""),
    "indexers left out": (lambda: unlisted(planned(GLM5, format="fp8"), "indexer.wq_b"), {}, "not left out", "not left out",
        "not left out"),
    "a mix of Qwen 3 that sees": (
        lambda: planned(QWEN_SEES, recipe="nvfp4_mlp_fp8_attention"), {}, "", "mixed joined", "left out, machine"),
    "experts of MiniMax in a mix": (lambda: planned(MINIMAX, recipe="nvfp4_mlp_fp8_attention"), {}, "", "", "machine"),
    "smoothed in w4a8": (lambda: planned(QWEN, format="w4a8_awq"), {}, "algorithm", "algorithm", "machine"),
}
# fmt: on
CASES |= HYBRIDS


def found(checkpoint: CheckpointView, asked: dict) -> list[str]:
    """The names of all rules that each engine finds, in its own order."""
    verdicts = [verdict_of(checkpoint, engine, **asked) for engine in ENGINES]
    return [", ".join(dict.fromkeys(one.rule for one in verdict.findings)) for verdict in verdicts]


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_has_these_findings_and_no_others(case: str) -> None:
    make, asked, *expected = CASES[case]
    assert found(make(), asked) == expected


def test_every_rule_is_asserted_of_two_checkpoints() -> None:
    asserted = {engine: Counter() for engine in ENGINES}
    rows = [*GOLDEN.values(), *(row[2:5] for row in DAMAGES.values()), *(row[2:] for row in CASES.values())]
    for row in rows:
        for engine, rules in zip(ENGINES, row, strict=True):
            asserted[engine].update(filter(None, rules.split(", ")))
    few = [(engine, rule) for engine, module in ENGINES.items() for rule in module.RULES if asserted[engine][rule] < 2]
    assert few == []
