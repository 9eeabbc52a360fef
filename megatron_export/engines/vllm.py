"""What vLLM 0.32.0 accepts: read in its sources, and tried with its CPU build, but for its kernels; what 0.33 reads otherwise."""

from functools import partial

from .architectures import Built, as_built, as_listed, built_by, is_plain
from .checkpoint_view import CheckpointView, Group
from .checks import check_capability, check_codes, check_config, check_mtp, check_tensors
from .exclude_lists import GATE_UP, Names, vllm_exactly, vllm_modelopt
from .quant_configs import (
    MIXED,
    AlgorithmOf,
    Matcher,
    Reading,
    algorithm_in,
    by_modelopt,
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
from .router_weights import check_router_weights
from .tensor_specs import MXFP4_EXPERTS
from .verdict import Effect, Findings, table
from .vllm_cache import check_cache
from .vllm_layouts import check_indexers, check_layouts, check_queries

NAME, VERSION = "vLLM", "0.32.0"
SOURCES = f"{NAME} {VERSION}"
RELEASES, SEEN_IN = (VERSION, "0.33.0"), "tests/engines/test_vllm.py"
_FILES = {
    "archs": "model_executor/models/registry.py",
    "blocks": "model_executor/layers/quantization/utils/fp8_utils.py",
    "cache": "utils/torch_utils.py",
    "config": "config/vllm.py",
    "configs": "transformers_utils/model_arch_config_convertor.py",
    "deepseek": "model_executor/models/deepseek_v2.py",
    "flashinfer": "v1/attention/backends/flashinfer.py",
    "gpt_oss": "model_executor/models/gpt_oss.py",
    "joined": "model_executor/layers/quantization/utils/quant_utils.py",
    "kv": "model_executor/layers/quantization/kv_cache.py",
    "minimax": "model_executor/models/minimax_m2.py",
    "mistral": "model_executor/models/mistral.py",
    "mistral3": "model_executor/models/mistral3.py",
    "llama4": "model_executor/models/llama4.py",
    "loader": "model_executor/model_loader/default_loader.py",
    "model": "model_executor/models/utils.py",
    "model config": "config/model.py",
    "modelopt": "model_executor/layers/quantization/modelopt.py",
    "moe": "model_executor/layers/fused_moe/prepare_finalize/no_dp_ep.py",
    "mtp": "model_executor/models/deepseek_mtp.py",
    "qwen": "model_executor/models/qwen2.py",
    "qwen next": "model_executor/models/qwen3_next.py",
    "weights": "model_executor/model_loader/weight_utils.py",
}
_R, _L, _M, _U = Effect.REFUSES, Effect.LOSES, Effect.MINDS, Effect.UNKNOWN
SEEN, READ = True, False

# fmt: off
RULES = table(SOURCES, _FILES, {
    "files":         (_R, "every file of the index is there", "weights", SEEN),
    "consolidated":  (_R, "no consolidated*.safetensors, which are read as Mistral's own format", "loader", SEEN),
    "twice":         (_R, "no tensor is in two files; it does not look, and keeps the last", "loader", SEEN),
    "architecture":  (_U, "an architecture with rules", "archs", SEEN),
    "missing":       (_R, "every tensor is there; of a quantized model it does not look by itself", "loader", SEEN),
    "experts":       (_R, "every expert is there; it does not look, and computes with anything", "loader", SEEN),
    "unknown":       (_R, "no tensor that the model does not have", "model", SEEN),
    "shape":         (_R, "shapes are those of config.json and of the algorithm", "modelopt", SEEN),
    "dtype":         (_R, "dtypes are those of the algorithm; it converts values of others", "model", SEEN),
    "scale":         (_R, "every quantized linear has all its scales", "modelopt", SEEN),
    "extra":         (_R, "a quantized linear has no other tensors, such as pre_quant_scale", "model", SEEN),
    "left out":      (_R, "what is left out of quantization is stored in bfloat16", "modelopt", SEEN),
    "not left out":  (_R, "what is stored in bfloat16 is left out, lm_head too", "modelopt", SEEN),
    "partly":        (_R, "q, k, v and gate, up are left out together", "joined", SEEN),
    "dialect":       (_R, "quantization_config says quant_method", "configs", SEEN),
    "config":        (_R, "hf_quant_config.json alone serves a few algorithms, with all its keys", "configs", SEEN),
    "algorithm":     (_R, "quant_algo is one of its seven", "modelopt", SEEN),
    "another":       (_U, "a dialect with rules: ModelOpt's, fp8 in blocks of 128, or GPT-OSS in mxfp4", "configs", READ),
    "unquantized":   (_R, "codes need a quantization config", "loader", SEEN),
    "mixed":         (_R, "a mixed model lists its quantized_layers, of algorithms that it has", "modelopt", SEEN),
    "mixed cache":   (_L, "a mixed model's KV cache is in FP8: scales of another are not read", "modelopt", SEEN),
    "blocks":        (_R, "of joined linears all but the last have whole blocks of 128 rows, of experts all", "blocks", SEEN),
    "inputs":        (_R, "FP8_PB_WO has inputs in whole blocks of 128", "modelopt", SEEN),
    "block experts": (_R, "experts are not in FP8_PER_CHANNEL_PER_TOKEN, nor in FP8_PB_WO but in a mixed model", "modelopt", READ),
    "inverse":       (_R, "Mistral 3 renames weight_scale_inv, and blocks have no other scale", "mistral3", SEEN),
    "heads":         (_R, "GPUs that share layers have as many heads each, of keys too or copies of one", "model config", SEEN),
    "shared":        (_R, "so they have whole blocks and groups of every linear that is cut", "blocks", SEEN),
    "head":          (_R, "the output layer of Qwen3-Next is not quantized: it is built without the config", "qwen next", SEEN),
    "stack":         (_R, "stacked experts are quantized in Llama4ForConditionalGeneration alone", "llama4", SEEN),
    "gpt_oss":       (_R, "GPT-OSS is not quantized in another dialect than OpenAI's", "gpt_oss", SEEN),
    "chunks":        (_R, "attention is not in dual chunks: no backend takes what Qwen's models hand to it then", "qwen", READ),
    "keys":          (_R, "config.json says what the classes of MiniMax M2 and Qwen3-VL MoE read", "minimax", SEEN),
    "queries":       (_L, "no queries are scaled by position as HF's rope_parameters say (Ministral 3)", "mistral", READ),
    "indexers":      (_R, "index_topk_pattern or index_topk_freq says which layers have an indexer", "deepseek", SEEN),
    "bias":          (_R, "DeepSeek's router bias goes with topk_method noaux_tc in config.json", "deepseek", SEEN),
    "softmax":       (_R, "DeepSeek's config.json says scoring_func, or routers take softmax", "deepseek", READ),
    "kv latent":     (_R, "latent attention has no NVFP4 KV cache", "config", SEEN),
    "kv mla":        (_L, "KV scales of latent attention are not read: its cache has a scale of 1", "deepseek", SEEN),
    "kv dialect":    (_M, "with quant_method fp8 the KV cache is quantized on request", "cache", READ),
    "kv nvfp4":      (_M, "an NVFP4 KV cache needs FlashInfer", "flashinfer", READ),
    "kv shape":      (_R, "a KV scale is one number", "kv", READ),
    "kv pair":       (_R, "there is no v_scale without a k_scale", "kv", READ),
    "kv half":       (_L, "nor a k_scale without a v_scale, or it serves for both", "kv", READ),
    "kv scales":     (_L, "KV scales are there for every layer, or for none: a cache without has a scale of 1", "kv", READ),
    "mtp":           (_L, "layers that predict one more token are there if config.json means them", "mtp", READ),
    "mtp left out":  (_L, "of such a layer too, what is stored in bfloat16 is left out", "mtp", READ),
    "router":        (_L, "Llama 4's experts in FP4 do not go to Marlin, which multiplies by router weights again", "moe", SEEN),
    "router kernel": (_M, "nor, in FP8 or on RTX GPUs, to FlashInfer's CUTLASS kernels, which do so too", "moe", READ),
    "gpu":           (_R, "the GPU computes it", "modelopt", READ),
})
# fmt: on
_BLOCKS_OF_MIXED = {  # how a mixed model's linears and experts in blocks are spelled
    ("linear", "FP8_BLOCK_SCALES"): None,
    ("head", "FP8_BLOCK_SCALES"): None,
    ("experts", "FP8_PB_WO"): "blocks",
    ("experts", "FP8_BLOCK_SCALES"): "blocks",
}
_ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MXFP8")
_NESTED = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4")
NOT_NEEDED = {"W4A16_NVFP4": frozenset(("input_scale",))}
_LATENT = "fused_qkv_a_proj"
LEAST = dict.fromkeys(("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8", MXFP4_EXPERTS), 80)
_LEAST_MIXED = {"MXFP8": 80}  # FP8 goes to Marlin there
_FILE = ("exclude_modules", "kv_cache_quant_algo")
_B12X = ("IQ2_XS", "IQ2_XXS", "Q8_0")  # of a package of that name
FORMATS = "choose --format fp8, fp8_pb or nvfp4"


def judge(checkpoint: CheckpointView, version: str, gpu: str | None, tp: int) -> Findings:
    """What vLLM finds in a checkpoint on `tp` GPUs of the kind `gpu`; None for any."""
    view = checkpoint.indexed
    findings = check_tensors(RULES, checkpoint, view)
    built = built_by("vllm", checkpoint)
    check_config(checkpoint, built, findings)
    check_indexers(checkpoint, built, findings)
    check_queries(checkpoint, findings)
    reading = read(checkpoint, version, findings)
    if reading is None:
        return findings
    algorithm_of = _algorithms(built, as_listed(reading, built))
    if not check_codes(checkpoint, view, reading, algorithm_of, NOT_NEEDED, tp, findings):
        return findings
    if reading.algorithm is not None:
        _check_tied(checkpoint, algorithm_of, findings)
        check_layouts(checkpoint, reading, algorithm_of, findings)
        check_mtp(view, findings, algorithm_of)
        check_capability(reading, gpu, LEAST if reading.algorithm else _LEAST_MIXED, 75, findings)
        check_router_weights(checkpoint, algorithm_of, gpu, findings)
    check_cache(checkpoint, reading, gpu, findings)
    if built.routed:
        _check_routers(checkpoint, findings)
    return findings


def _algorithms(built: Built, reading: Reading) -> AlgorithmOf:
    """What it takes each group of a checkpoint for."""
    modelopt = reading.dialect == "modelopt"

    def algorithm_of(group: Group) -> str | None:
        if reading.algorithm is None or (group.kind == "head" and not modelopt) or is_plain(group, built, reading):
            return None
        if group.kind == "router" and not (modelopt and built.asking):
            return None
        matcher = vllm_modelopt if modelopt else vllm_exactly
        if built.one_name and group.parts == GATE_UP:  # it says that they are joined when lists are already compared
            matcher = partial(by_one_name, matcher)
        group = as_built(group, built)
        found = None if left_out(reading, group, matcher, _LATENT) else algorithm_in(reading, group)
        return found if reading.algorithm else _in_a_mix(reading, group, found)

    return algorithm_of


def by_one_name(matcher: Matcher, names: Names, parent: str, parts: tuple[str, ...], joined: str) -> bool:
    """A joined linear whose members' names are not compared."""
    return matcher(names, parent, (joined,), joined)


def _in_a_mix(reading: Reading, group: Group, listed_in: str | None) -> str | None:
    """What a mixed model's group that is listed in an algorithm is built for. Experts that are not listed take the algorithm of the
    first module beside them that is.
    """
    if listed_in is None and group.kind in ("experts", "stack"):
        beside = group.parent.removesuffix("experts")
        listed_in = next((one for name, one in reading.layers.items() if name.startswith(beside)), None)
    return _BLOCKS_OF_MIXED.get((group.kind, listed_in), listed_in)


def read(checkpoint: CheckpointView, version: str, findings: Findings) -> Reading | None:
    """What vLLM takes from the configs: from config.json, or from hf_quant_config.json if that does not quantize."""
    inline, nested = checkpoint.inline, checkpoint.nested
    if inline is None and nested is None:
        return Reading()
    if inline is None and not by_modelopt(checkpoint.quant):
        why = "hf_quant_config.json does not say that ModelOpt made it, so it is not read"
        findings.add("config", why, way='put "producer": {"name": "modelopt"} there')
        return None
    if inline is None or (inner := inner_section(inline)):
        return _read_nested(checkpoint, nested if inline is None else inner, version, findings)
    method = str(inline.get("quant_method", "")).lower()
    if method == "fp8":
        return in_blocks(inline, listed(inline, "ignored_layers", "modules_to_not_convert"), findings)
    if method == "mxfp4":
        return of_openai(checkpoint.architecture, findings)
    if not method:
        findings.add("dialect", "quantization_config does not say quant_method", way="set it to modelopt")
        return None
    if not method.startswith("modelopt"):
        findings.add("another", f"no rules about quant_method {method}")
        return None
    mixed_in_file = inline.get("quant_algo") == MIXED and "quantized_layers" not in inline and nested is not None
    if has("vllm", "other key", version) and "ignore" not in inline:
        inline = inline | {"ignore": inline.get("exclude_modules")}
    section, where, kv = (nested, *_FILE) if mixed_in_file else (inline, "ignore", "kv_cache_scheme")
    return _read_modelopt(checkpoint, section, where, kv_of(section.get(kv)), findings)


def _read_nested(checkpoint: CheckpointView, nested: dict, version: str, findings: Findings) -> Reading | None:
    algorithm = str(nested.get("quant_algo") or "").upper()
    lacking = {"group_size", "kv_cache_quant_algo", "exclude_modules"} - nested.keys()
    if algorithm not in (*_NESTED, *((MIXED,) if has("vllm", "mixed alone", version) else ())):
        later = "or serve with 0.33, " if algorithm == MIXED else ""
        why = f"hf_quant_config.json alone, or its section in config.json, says {algorithm}"
        findings.add("config", why, way=f"{later}put it into config.json, with quant_method")
        return None
    if algorithm == "NVFP4" and lacking:
        findings.add(
            "config",
            f"hf_quant_config.json, or its section in config.json, has no {', '.join(sorted(lacking))}",
            way="put it there",
        )
        return None
    return _read_modelopt(checkpoint, nested, _FILE[0], kv_of(nested.get(_FILE[1])), findings)


def _read_modelopt(
    checkpoint: CheckpointView, section: dict, where: str, kv: str | None, findings: Findings
) -> Reading | None:
    algorithm = str(section.get("quant_algo") or "").upper()
    names = Names(listed(section, where))
    if algorithm == MIXED:
        layers = layers_of(section)
        if not layers:
            findings.add("mixed", "quantized_layers lists none", way="list them")
            return None
        if odd := sorted({*layers.values()} & {*_B12X}):
            findings.add("another", f"no rules about {odd[0]}")
            return None
        known = (*_ALGORITHMS, "FP8_BLOCK_SCALES")
        check_entries(layers, known, checkpoint.indexed, FORMATS, findings)
        layers = {name: one for name, one in layers.items() if one in known}
        return Reading("", where, names, layers, 0, kv, "modelopt", sizes_of(section))
    if algorithm not in _ALGORITHMS:
        findings.add("algorithm", f"it does not know {algorithm or 'the empty quant_algo'}", way=FORMATS)
        return None
    groups = section.get("config_groups")
    if algorithm == "NVFP4" and isinstance(groups, dict) and groups:
        inputs = [group.get("input_activations") for group in groups.values() if isinstance(group, dict)]
        algorithm = "W4A16_NVFP4" if not any(inputs) else algorithm
    return Reading(algorithm, where, names, {}, size_in(section), kv, "modelopt")


def _check_routers(checkpoint: CheckpointView, findings: Findings) -> None:
    biases = [name for name in checkpoint.indexed.tensors if name.endswith("e_score_correction_bias")]
    if biases and checkpoint.text.get("topk_method") != "noaux_tc":
        findings.add("bias", "config.json does not say that routers have it", *biases,
                     way='set "topk_method": "noaux_tc" in config.json, as DeepSeek does')  # fmt: skip
    if biases and "scoring_func" not in checkpoint.text:
        findings.add("softmax", "config.json does not say that routers take sigmoid, and it computes softmax",
                     way='set "scoring_func": "sigmoid" in config.json, as DeepSeek does')  # fmt: skip


def _check_tied(checkpoint: CheckpointView, algorithm_of: AlgorithmOf, findings: Findings) -> None:
    """vLLM builds an output layer for a tied model too, before it becomes the embedding."""
    embedding = next((name for name in checkpoint.indexed.modules if "model.embed" in name), "")
    parent = embedding.rpartition("model.embed")[0].strip(".")
    if checkpoint.tied and algorithm_of(Group("head", parent, ("lm_head",))):
        why = "it is the embedding, and by the config it is quantized"
        findings.add("not left out", why, "lm_head", way="name it in ignore")
