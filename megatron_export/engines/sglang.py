"""What SGLang 0.5.23 accepts: read in its sources; its configs and loaders were run on a CPU, and 0.5.17 on a GPU."""

from dataclasses import replace

from .architectures import Built, as_built, as_listed, built_by, is_plain
from .checkpoint_view import CheckpointView, Group
from .checks import check_capability, check_codes, check_config, check_mtp, check_tensors
from .exclude_lists import Names, sglang_excluded, sglang_skipped
from .gpus import BLACKWELL
from .quant_configs import (
    MIXED,
    Reading,
    algorithm_in,
    check_entries,
    in_blocks,
    inner_section,
    kv_of,
    layers_of,
    left_out,
    listed,
    of_openai,
    size_in,
    sizes_of,
)
from .releases import has
from .sglang_cache import check_cache
from .sglang_hybrids import check_hybrid_config, quantizes_predicting
from .sglang_layouts import check_layouts
from .sglang_releases import check_release
from .verdict import Effect, Findings, table

NAME, VERSION = "SGLang", "0.5.23"
SOURCES = f"{NAME} {VERSION}"
RELEASES = (VERSION, "0.5.22", "0.5.21", "0.5.20", "0.5.19", "0.5.18", "0.5.17")
SEEN_IN = "tests/engines/test_sglang.py"
_FILES = {
    "archs": "srt/models/registry.py",
    "attention": "srt/layers/radix_attention.py",
    "cache": "srt/mem_cache/kv_cache_dtype.py",
    "configs": "srt/configs/model_config.py",
    "deepseek": "srt/models/deepseek_v2.py",
    "deepseek loader": "srt/models/deepseek_common/deepseek_weight_loader.py",
    "fp8": "srt/layers/quantization/fp8.py",
    "gpt_oss": "srt/models/gpt_oss.py",
    "joined": "srt/layers/quantization/utils.py",
    "kv": "srt/arg_groups/kv_cache_hook.py",
    "kv scales": "srt/layers/quantization/kv_cache.py",
    "llama": "srt/models/llama.py",
    "llama4": "srt/models/llama4.py",
    "loader": "srt/model_loader/loader.py",
    "minimax": "srt/models/minimax_m2.py",
    "mixtral": "srt/models/mixtral.py",
    "mllama4": "srt/models/mllama4.py",
    "modelopt": "srt/layers/quantization/modelopt_quant.py",
    "mtp": "srt/models/deepseek_nextn.py",
    "nemotron config": "srt/configs/nemotron_h.py",
    "qwen": "srt/models/qwen3_moe.py",
    "qwen next": "srt/models/qwen3_next.py",
    "rope": "srt/layers/rotary_embedding/factory.py",
    "weights": "srt/model_loader/weight_utils.py",
}
_R, _L, _M, _U = Effect.REFUSES, Effect.LOSES, Effect.MINDS, Effect.UNKNOWN
SEEN, READ = True, False

# fmt: off
RULES = table(SOURCES, _FILES, {
    "files":         (_R, "every file of the index is there", "weights", SEEN),
    "consolidated":  (_M, "files of Mistral's own format are left out", "loader", SEEN),
    "twice":         (_R, "no tensor is in two files that are read", "weights", READ),
    "architecture":  (_U, "an architecture with rules", "archs", SEEN),
    "missing":       (_R, "every tensor of the model is there; it does not look", "llama", SEEN),
    "experts":       (_R, "every expert is there; it does not look", "qwen", SEEN),
    "unknown":       (_M, "tensors that the model does not have are skipped", "llama", SEEN),
    "shape":         (_R, "shapes are those of config.json and of the algorithm", "modelopt", SEEN),
    "dtype":         (_R, "dtypes are those of the algorithm; it converts values of others", "modelopt", SEEN),
    "scale":         (_R, "every quantized linear has all its scales", "modelopt", SEEN),
    "extra":         (_L, "other tensors of a quantized linear are skipped", "llama", SEEN),
    "left out":      (_R, "what is left out of quantization is stored in bfloat16; it takes codes for numbers", "modelopt", SEEN),
    "not left out":  (_R, "what is stored in bfloat16 is left out, lm_head too", "modelopt", SEEN),
    "partly":        (_R, "q, k, v and gate, up are left out together", "joined", SEEN),
    "mixed joined":  (_R, "a mixed model lists joined linears by that name, if the class does not say which", "modelopt", SEEN),
    "algorithm":     (_R, "quant_algo is one of its six, in capitals", "modelopt", SEEN),
    "old":           (_R, "the release knows each format (engines/releases.py); seen of MXFP8, W4A16_NVFP4, FP8 in shared experts "
                          "and swiglu_limit", "modelopt", READ),
    "config":        (_R, "hf_quant_config.json alone says the group_size of NVFP4", "modelopt", SEEN),
    "no cache said": (_R, "a mixed model whose config.json says nothing of a KV cache has hf_quant_config.json", "weights", READ),
    "another":       (_U, "a dialect with rules: ModelOpt's, fp8 in blocks of 128, or GPT-OSS in mxfp4", "configs", READ),
    "unquantized":   (_R, "codes need a quantization config", "weights", SEEN),
    "mixed":         (_R, "a mixed model has a layer in NVFP4; another is taken for w4afp8", "configs", SEEN),
    "blocks":        (_R, "joined linears and experts have rows in whole blocks of 128, each of them", "fp8", SEEN),
    "heads":         (_R, "GPUs that share layers have as many heads each, of keys too or copies of one", "llama", READ),
    "shared":        (_R, "so they have whole blocks and groups of every linear that is cut", "fp8", READ),
    "llama blocks":  (_R, "Llama, Mistral and Phi 3 rename weight_scale_inv and lose it (pull request 30234)", "llama", SEEN),
    "llama4 text":   (_R, "Llama4ForCausalLM has no loader of experts", "llama4", SEEN),
    "dense":         (_R, "Qwen 3 MoE, with a vision tower too, and Qwen3-Next have experts in every layer", "qwen", SEEN),
    "head":          (_R, "the output layer of Mixtral, MiniMax M2 and Qwen 3.5 of text alone is not quantized", "mixtral", SEEN),
    "joined file":   (_R, "what is one tensor in the file too (Phi 3) is not in W4A16_NVFP4", "modelopt", SEEN),
    "keys":          (_R, "config.json says what the classes of MiniMax M2 and Kimi K2.5 read", "minimax", SEEN),
    "stack":         (_R, "stacked experts of Llama 4 are in FP8", "mllama4", SEEN),
    "rotated":       (_R, "q and k of Llama 4, whose rows it moves, are not in four bits", "mllama4", READ),
    "hybrid":        (_R, "config.json says layers, groups and mergers as SGLang's own classes read them", "nemotron config", SEEN),
    "hybrid linear": (_R, "no scale of in_proj_qkvz of Qwen3-Next is one number; in_proj of Mamba is not W4A16", "qwen next", SEEN),
    "next qkv":      (_R, "q, k and v of Qwen3-Next are not in four bits, but in a mix", "qwen next", SEEN),
    "gpt_oss":       (_R, "stacked experts of GPT-OSS are not quantized in ModelOpt's dialect", "gpt_oss", SEEN),
    "window":        (_L, "attention has no sliding windows but in Gemma 3 and GPT-OSS: others compute it in full", "llama", READ),
    "chunks":        (_R, "attention is not in dual chunks: get_rope makes five queries of one for no backend", "rope", READ),
    "awq":           (_R, "pre_quant_scale is applied on Blackwell alone, and not to experts", "modelopt", READ),
    "expert inputs": (_L, "inputs of experts in W4A16_NVFP4 stay as they are; Blackwell rounds them", "modelopt", READ),
    "latent":        (_R, "kv_b_proj is in bfloat16, FP8 or blocks of FP8", "deepseek loader", SEEN),
    "latent scale":  (_R, "scales of q_a_proj and kv_a_proj_with_mqa have no dims", "deepseek loader", READ),
    "bias":          (_R, "DeepSeek's config.json says topk_method, scoring_func and moe_layer_freq", "deepseek", SEEN),
    "kv shape":      (_R, "a KV scale is one number", "weights", SEEN),
    "kv pair":       (_R, "there is no v_scale without a k_scale", "kv scales", SEEN),
    "kv half":       (_L, "nor a k_scale without a v_scale, or it serves for both", "kv scales", READ),
    "kv flag":       (_M, "the KV cache is FP8 by itself only if a config of ModelOpt's dialect says so", "cache", READ),
    "kv nvfp4":      (_M, "an NVFP4 KV cache is on request, and on Blackwell", "kv", READ),
    "kv ignored":    (_L, "KV scales are not loaded in Qwen 2, 3 and 3-VL, Mixtral, GLM 4.5, Llama 4, GPT-OSS", "attention", SEEN),
    "mtp":           (_L, "layers that predict one more token are there if config.json means them", "mtp", READ),
    "mtp count":     (_L, "there is one layer that predicts one more token", "deepseek loader", READ),
    "mtp left out":  (_L, "of such a layer too, what is stored in bfloat16 is left out", "mtp", READ),
    "gpu":           (_R, "the GPU computes it", "modelopt", READ),
})
# fmt: on
_ALGORITHMS = ("FP8", "NVFP4", "NVFP4_AWQ", "W4A16_NVFP4", "MXFP8")
_MIXED = {"FP8": "FP8", "FP8_PB_WO": "blocks", "FP8_BLOCK_SCALES": "blocks", "MXFP8": "native MXFP8", "NVFP4": "NVFP4",
          "W4A16_NVFP4": "W4A16_NVFP4"}  # fmt: skip
NOT_NEEDED = dict.fromkeys((*_ALGORITHMS, *_MIXED.values()), frozenset(("pre_quant_scale",)))
_LATENT = "fused_qkv_a_proj_with_mqa"
LEAST = {"FP8": 89, "MXFP8": BLACKWELL}
_LEAST_MIXED = {"native MXFP8": 90}  # DeepGEMM computes it; and Marlin FP8 where nothing else does
# What DeepSeek's config.json says of routing.
_ROUTES = {"topk_method": '"noaux_tc"', "scoring_func": '"sigmoid"', "moe_layer_freq": "1"}
FORMATS = "choose --format fp8, fp8_pb or nvfp4"


def judge(checkpoint: CheckpointView, version: str, gpu: str | None, tp: int) -> Findings:
    """What release `version` of SGLang finds in a checkpoint on `tp` GPUs of the kind `gpu`; None for any."""
    view = checkpoint.indexed
    findings = check_tensors(RULES, checkpoint, view)
    built = built_by("sglang", checkpoint)
    check_config(checkpoint, built, findings)
    reading = read(checkpoint, version, findings)
    if reading is None:
        return findings
    reading, modelopt = as_listed(reading, built), reading.dialect == "modelopt"
    prefix = "language_model." if checkpoint.architecture == "Llama4ForConditionalGeneration" else ""
    quantizes_mtp = quantizes_predicting(checkpoint, reading)

    def algorithm_of(group: Group) -> str | None:
        if reading.algorithm is None or group.kind == "router" or (group.kind == "head" and not modelopt):
            return None
        if is_plain(group, built, reading) or (group.mtp and not quantizes_mtp):
            return None
        group = as_built(group, built)
        inside = group if group.parent.startswith(prefix) else Group(group.kind, prefix + group.parent, group.parts)
        of_experts = group.kind in ("experts", "stack")
        latent = "" if group.mtp else _LATENT  # models/deepseek_nextn.py does not tell the config what it joins
        skipped = not (modelopt and of_experts) and left_out(reading, inside, sglang_skipped, latent)
        if of_experts and reading.experts and not left_out(reading.experts, inside, sglang_excluded, _LATENT):
            return reading.experts.algorithm
        if skipped or (modelopt and left_out(reading, inside, sglang_excluded, _LATENT)):
            return None
        return algorithm_in(reading, group)

    if not check_codes(checkpoint, view, reading, algorithm_of, NOT_NEEDED, tp, findings):
        return findings
    check_release(checkpoint, reading, version, algorithm_of, findings)
    if reading.algorithm is not None:
        check_layouts(checkpoint, reading, algorithm_of, gpu, findings)
        check_mtp(view, findings, algorithm_of)
        if checkpoint.number("num_nextn_predict_layers") > 1:
            findings.add("mtp count", "speculative decoding needs num_nextn_predict_layers of 1")
        check_capability(reading, gpu, LEAST if reading.algorithm else _LEAST_MIXED, 80, findings)
    check_cache(checkpoint, reading, findings)
    check_hybrid_config(checkpoint, findings)
    _check_experts(checkpoint, built, findings)
    _check_window(checkpoint, built, findings)
    return findings


def read(checkpoint: CheckpointView, version: str, findings: Findings) -> Reading | None:
    """What SGLang takes from the configs: from config.json, or from hf_quant_config.json if that does not quantize."""
    inline, nested = checkpoint.inline, checkpoint.nested
    if inline is None and nested is None:
        return Reading()
    section, where = (inline, "ignore") if inline is not None else (nested, "exclude_modules")
    if (
        inline is not None
        and inline.get("quant_algo") == MIXED
        and str(inline.get("quant_method")).startswith("modelopt")
    ):
        if "quantized_layers" not in inline or not {"kv_cache_quant_algo", "kv_cache_scheme"} & inline.keys():
            section, where = nested, "exclude_modules"
        if section is None:
            why = "config.json says nothing of a KV cache, and hf_quant_config.json is not there"
            findings.add("no cache said", why, way='set "kv_cache_quant_algo": null beside quantized_layers')
            return None
    if inner := inner_section(inline):  # of which it copies the algorithm alone to where it looks
        section = {"quant_algo": inner.get("quant_algo"), "group_size": inner.get("group_size")}
    method = str(section.get("quant_method", "modelopt"))
    if method == "fp8":
        names = listed(section, "ignored_layers", "modules_to_not_convert")
        found = in_blocks(section, _either_way(names), findings)
        mixed = (section.get("quant_algo"), section.get("moe_quant_algo")) == (MIXED, "NVFP4")
        if found and mixed and size_in(section):
            found = replace(found, experts=Reading("NVFP4", "ignore", Names(listed(section, "ignore"))))
        return found
    if method == "mxfp4":
        return of_openai(checkpoint.architecture, findings)
    if not method.startswith("modelopt"):
        findings.add("another", f"no rules about quant_method {method}")
        return None
    return _read_modelopt(checkpoint, section, where, version, findings)


def _read_modelopt(
    checkpoint: CheckpointView, section: dict, where: str, version: str, findings: Findings
) -> Reading | None:
    algorithm = str(section.get("quant_algo") or "")
    kv = kv_of(section.get("kv_cache_scheme") or section.get("kv_cache_quant_algo"))
    names = Names(listed(section, where, *_other_keys(algorithm, where, version)))
    if algorithm == MIXED:
        layers = layers_of(section)
        if not set(layers.values()) & {"NVFP4", "W4A16_NVFP4"}:
            why = "no layer is in NVFP4, so it is taken for another format"
            findings.add("mixed", why, way="quantize a layer to NVFP4")
            return None
        check_entries(layers, _MIXED, checkpoint.indexed, FORMATS, findings)
        known = {name: _MIXED[one] for name, one in layers.items() if one in _MIXED}
        return Reading("", where, names, known, 0, kv, "modelopt", sizes_of(section), spelled=layers)
    if algorithm.upper() == "FP8_PB_WO":
        findings.add("algorithm", "refuses FP8_PB_WO", way="--fp8-pb-spelling native")
        return None
    if algorithm not in _ALGORITHMS:
        findings.add("algorithm", f"it does not know {algorithm or 'the empty quant_algo'}", way=FORMATS)
        return None
    if where == "exclude_modules" and "NVFP4" in algorithm and not isinstance(section.get("group_size"), int):
        findings.add("config", "hf_quant_config.json has no group_size", way="put it there")
        return None
    if algorithm == "MXFP8":  # which it reads as its native dialect, and the names so
        return Reading(algorithm, where, Names(_either_way(names.listed)), {}, 32, kv, "native")
    return Reading(algorithm, where, names, {}, size_in(section), kv, "modelopt")


def _other_keys(algorithm: str, where: str, version: str) -> tuple[str, ...]:
    """Keys of the list where the first, `where`, is not there."""
    if algorithm == "MXFP8":
        return ("exclude_modules", "ignore")
    if where == "ignore" and algorithm == MIXED:
        return ("exclude_modules",)
    if where == "ignore" and "NVFP4" in algorithm and has("sglang", "other key of NVFP4", version):
        return ("modules_to_not_convert", "exclude_modules")
    return ()


def _check_window(checkpoint: CheckpointView, built: Built, findings: Findings) -> None:
    window = _window(checkpoint)
    if 0 < window < checkpoint.number("max_position_embeddings") and not built.windowed:
        findings.add("window", f"it computes attention in full, which config.json wants in windows of {window} tokens",
                     way=f"serve with --context-length {window}")  # fmt: skip


def _window(checkpoint: CheckpointView) -> int:
    """How many tokens some layer of the model attends to, as HF's class reads config.json; 0 for all."""
    text, architecture = checkpoint.text, checkpoint.architecture
    if not text.get("use_sliding_window", not architecture.startswith("Qwen")):
        return 0
    if architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):  # whose first layers have none
        first = checkpoint.number("max_window_layers") if "max_window_layers" in text else 28
        if first >= checkpoint.number("num_hidden_layers"):
            return 0
    return checkpoint.number("sliding_window")


def _either_way(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names with "model." before them, and without."""
    return tuple(f"{start}{name.removeprefix('model.')}" for name in names for start in ("", "model."))


def _check_experts(checkpoint: CheckpointView, built: Built, findings: Findings) -> None:
    """What config.json must say of experts, quantized or not."""
    if checkpoint.architecture == "Llama4ForCausalLM" and checkpoint.experts:
        findings.add("llama4 text", "it loads experts of Llama 4 only in Llama4ForConditionalGeneration")
    dense = checkpoint.text.get("mlp_only_layers") or checkpoint.number("decoder_sparse_step") > 1
    if not built.dense and dense:
        findings.add("dense", "it makes experts of every layer, and config.json means some without")
    lacking = [key for key in _ROUTES if key not in checkpoint.text]
    if built.routed and lacking:
        said = ", ".join(f'"{key}": {_ROUTES[key]}' for key in lacking)
        way = f"set {said} there, as DeepSeek does"
        findings.add("bias", f"config.json does not say {', '.join(lacking)}", way=way)
