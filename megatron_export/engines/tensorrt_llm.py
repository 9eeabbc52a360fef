"""What TensorRT-LLM's PyTorch backend accepts: read in its sources of 2026; what is marked seen, copies of parts of its files
did on a CPU."""

from dataclasses import replace

from .architectures import as_built, built_by, is_plain
from .checkpoint_view import CheckpointView, Group
from .checks import AGAIN, check_codes, check_tensors, release_of
from .exclude_lists import IN_FILES, Names, Partly, tensorrt_llm
from .gpus import BLACKWELL, GPUS
from .quant_configs import (
    MIXED,
    AlgorithmOf,
    Reading,
    algorithm_in,
    by_modelopt,
    in_blocks,
    kv_of,
    layers_of,
    left_out,
    listed,
    of_openai,
    size_in,
    sizes_of,
)
from .tensorrt_llm_cache import check_cache
from .tensorrt_llm_scales import check_experts, check_inputs
from .verdict import Effect, Findings, table

NAME, VERSION, SOURCES = "TensorRT-LLM", "1.3", "TensorRT-LLM main of 2026"
RELEASES, SEEN_IN = (VERSION,), "tests/engines/test_tensorrt_llm.py"
_FILES = {
    "archs": "_torch/models/modeling_auto.py",
    "attention": "_torch/modules/attention.py",
    "configs": "quantization/modelopt_config.py",
    "cutlass": "_torch/modules/fused_moe/fused_moe_cutlass.py",
    "deepseek": "_torch/models/modeling_deepseekv3.py",
    "excluded": "models/modeling_utils.py",
    "gpt_oss": "_torch/models/modeling_gpt_oss.py",
    "linear": "_torch/modules/linear.py",
    "llama": "_torch/models/modeling_llama.py",
    "loader": "_torch/models/checkpoints/hf/weight_loader.py",
    "mode": "quantization/mode.py",
    "model": "_torch/models/modeling_utils.py",
    "moe": "_torch/modules/fused_moe/quantization.py",
    "phi3": "_torch/models/modeling_phi3.py",
    "qwen 3.5": "_torch/models/modeling_qwen3_5.py",
    "reading": "_torch/model_config.py",
}
_R, _L, _M, _U = Effect.REFUSES, Effect.LOSES, Effect.MINDS, Effect.UNKNOWN
SEEN, READ = True, False

# fmt: off
RULES = table(f"{SOURCES}, tensorrt_llm/", _FILES, {
    "files":         (_R, "every file of the index is there", "loader", READ),
    "consolidated":  (_M, "files of Mistral's own format are left out", "loader", READ),
    "twice":         (_R, "no tensor is in two files: all are read, and the index is not", "loader", READ),
    "architecture":  (_U, "an architecture with rules", "archs", READ),
    "missing":       (_R, "every tensor of the model is there", "model", SEEN),
    "experts":       (_R, "every expert is there", "moe", SEEN),
    "unknown":       (_M, "tensors that the model does not have are not looked at", "model", SEEN),
    "shape":         (_R, "shapes are those of config.json and of the algorithm", "linear", SEEN),
    "dtype":         (_R, "dtypes are those of the algorithm", "linear", SEEN),
    "scale":         (_R, "every quantized linear has all its scales; FP8 goes without input_scale", "linear", SEEN),
    "extra":         (_M, "other tensors of a quantized linear are not looked at", "linear", SEEN),
    "left out":      (_R, "what is left out of quantization is stored in bfloat16", "excluded", SEEN),
    "not left out":  (_R, "what is stored in bfloat16 is left out", "excluded", SEEN),
    "partly":        (_R, "a mixed model has one algorithm for q, k and v, and for gate and up", "linear", SEEN),
    "algorithm":     (_R, "quant_algo is one of its own, to the letter", "mode", SEEN),
    "two configs":   (_M, "hf_quant_config.json counts, and config.json says the same", "configs", SEEN),
    "case":          (_M, "releases up to 1.2 know fp8_pb_wo in small letters alone", "configs", READ),
    "old":           (_R, "releases up to 1.2 lack NVFP4_AWQ, W4A16_NVFP4, MXFP8, and FP8_PB_WO in capitals", "mode", READ),
    "another":       (_U, "a dialect with rules: ModelOpt's, fp8 in blocks of 128, or GPT-OSS in mxfp4", "configs", READ),
    "unquantized":   (_R, "codes need a quantization config", "reading", SEEN),
    "block experts": (_R, "experts in blocks of FP8 have weight_scale_inv", "moe", SEEN),
    "expert inputs": (_R, "experts in FP8 have an input_scale each", "moe", SEEN),
    "expert factors": (_R, "experts in W4A8_AWQ have a pre_quant_scale each", "moe", READ),
    "expert codes":  (_R, "experts are not in FP8_PER_CHANNEL_PER_TOKEN", "cutlass", SEEN),
    "expert int4":   (_R, "experts in W4A16_AWQ or W4A8_MXFP4_FP8 have an input_scale, as ModelOpt writes none", "moe", READ),
    "expert backend": (_M, "experts in W4A8_NVFP4_FP8 are not of its usual backend", "cutlass", SEEN),
    "heads":         (_R, "GPUs that share layers have as many heads each, of keys too or copies of one", "attention", READ),
    "shared":        (_R, "so they have whole blocks and groups of every linear that is cut", "linear", READ),
    "llama4 text":   (_R, "Llama 4 is Llama4ForConditionalGeneration", "llama", READ),
    "llama4":        (_R, "experts of Llama 4 are stacked, in FP8 or NVFP4", "llama", READ),
    "joined file":   (_R, "scales of what is one tensor in the file too (Phi 3) are numbers, or rows of groups", "phi3", READ),
    "sees":          (_U, "how names in lists are compared in Kimi K2.5 and Qwen3-VL with experts", "archs", READ),
    "gpt_oss":       (_U, "GPT-OSS in ModelOpt's dialect", "gpt_oss", READ),
    "packed":        (_U, "what it packs of Qwen 3.5 (in_proj_qkv, in_proj_z) is in bfloat16, FP8 or its blocks", "qwen 3.5", READ),
    "latent":        (_R, "kv_b_proj is in bfloat16 or blocks of FP8, kv_a_proj_with_mqa in these or NVFP4", "deepseek", READ),
    "joined inputs": (_R, "of joined linears in FP8 each has an input_scale, or none has", "linear", SEEN),
    "joined factor": (_R, "joined q, k and v have no pre_quant_scale in NVFP4, and no joined linear in W4A16_AWQ", "linear", SEEN),
    "group size":    (_R, "the config says the group_size of AWQ", "reading", SEEN),
    "kv shape":      (_R, "a KV scale is one number", "linear", SEEN),
    "kv half":       (_R, "there is no k_scale without a v_scale", "linear", SEEN),
    "kv nvfp4":      (_R, "of an NVFP4 cache q, k and v are in FP8, NVFP4 or bfloat16", "attention", READ),
    "kv fp8":        (_L, "scales of an FP8 cache are not handed to attention", "attention", READ),
    "kv dialect":    (_M, "DeepSeek's own dialect says nothing of the cache", "reading", READ),
    "kv spelling":   (_L, "KV scales are k_proj.k_scale and v_proj.v_scale", "linear", READ),
    "mtp":           (_L, "layers that predict one more token are there if config.json means them", "deepseek", READ),
    "machine":       (_M, "some formats run on some GPUs alone", "linear", READ),
    "gpu":           (_R, "the GPU computes it", "linear", READ),
})
# fmt: on
_SAME = (
    *("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "NVFP4_AWQ", "W4A16_NVFP4", "W4A16_AWQ", "W4A8_AWQ", "MXFP8"),
    *("W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8"),
)
# As configs spell them -> as tensor_specs does.
_ALGORITHMS = {name: name for name in _SAME} | dict.fromkeys(("FP8_BLOCK_SCALES", "FP8_PB_WO", "fp8_pb_wo"), "blocks")
_NEW = ("NVFP4_AWQ", "W4A16_NVFP4", "MXFP8", "FP8_PB_WO")
_FACTOR = frozenset(("pre_quant_scale",))
OPTIONAL = {"FP8": frozenset(("input_scale",)), "NVFP4": _FACTOR, "NVFP4_AWQ": _FACTOR}
_UNHANDED = ("blocks", "modelopt blocks", "FP8_PER_CHANNEL_PER_TOKEN")
_MACHINES = {  # algorithm -> on what, and the compute capabilities
    **dict.fromkeys(("NVFP4", "NVFP4_AWQ", "MXFP8"), ("on Blackwell", range(BLACKWELL, 1000))),
    "W4A8_AWQ": ("on Ada and Hopper", range(89, 91)),
    **dict.fromkeys(("W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8"), ("on B200 and B300", (100, 103))),
    "W4A16_NVFP4": ("on Ada, Hopper and GeForce Blackwell", (*range(89, 100), 120, 121)),
    **dict.fromkeys(("FP8", "blocks"), ("", range(89, 1000))),
}


def judge(checkpoint: CheckpointView, version: str, gpu: str | None, tp: int) -> Findings:
    """What release `version` of TensorRT-LLM finds in a checkpoint on `tp` GPUs of the kind `gpu`; None for any."""
    view = checkpoint.whole
    findings = check_tensors(RULES, checkpoint, view)
    reading = read(checkpoint, version, findings)
    if reading is None:
        return findings

    built = built_by("tensorrt_llm", checkpoint)
    if not built.read:
        findings.add(
            "architecture", f"no rules about {checkpoint.text.get('model_type')}: nobody has read how it is loaded"
        )

    def algorithm_of(group: Group) -> str | None:
        if reading.algorithm is None or group.kind == "router" or (group.kind == "head" and not group.quantized):
            return None
        group = as_built(group, built)
        if is_plain(group, built, reading) or left_out(reading, group, tensorrt_llm, "kv_a_proj_with_mqa"):
            return None
        found = algorithm_in(reading, group)
        inverse = any("weight_scale_inv" in module for module in group.members.values())
        return "modelopt blocks" if found == "blocks" and not inverse else found

    if not check_codes(checkpoint, view, reading, algorithm_of, OPTIONAL, tp, findings):
        return findings
    if checkpoint.architecture == "Llama4ForCausalLM":
        findings.add("llama4 text", "it has Llama 4 only as Llama4ForConditionalGeneration")
    if reading.algorithm is not None:
        _check_layouts(checkpoint, reading, algorithm_of, findings)
        check_gpu(reading, gpu, findings)
    check_cache(checkpoint, reading, algorithm_of, findings)
    return findings


def read(checkpoint: CheckpointView, version: str, findings: Findings) -> Reading | None:
    """What TensorRT-LLM takes from the configs: from hf_quant_config.json, or from config.json if that says no algorithm."""
    inline, nested = checkpoint.inline, checkpoint.nested
    if nested is not None and nested.get("quant_algo") is not None:
        _compare(inline, nested, findings)
        return _named(nested, "exclude_modules", nested.get("kv_cache_quant_algo"), version, findings)
    if inline is None:
        return Reading()
    if inline.get("quant_method") == "fp8":
        return _in_blocks(inline, findings)
    if inline.get("quant_method") == "mxfp4":
        return of_openai(checkpoint.architecture, findings)
    if not str(inline.get("quant_method", "")).lower().startswith("modelopt") and not by_modelopt(inline):
        findings.add("another", f"no rules about quant_method {inline.get('quant_method')}")
        return None
    return _named(inline, "ignore", inline.get("kv_cache_scheme"), version, findings)


def _in_blocks(inline: dict, findings: Findings) -> Reading | None:
    """DeepSeek's own dialect, of which it reads neither ignored_layers nor what is said of the cache."""
    found = in_blocks(inline, listed(inline, "modules_to_not_convert"), findings)
    return found and replace(found, kv=None)


def _named(section: dict, where: str, kv: object, version: str, findings: Findings) -> Reading | None:
    algorithm, names = str(section.get("quant_algo") or ""), Names(listed(section, where))
    layers = layers_of(section) if algorithm == MIXED else {}
    algorithms = {*layers.values()} if algorithm == MIXED else {algorithm}
    if odd := sorted(algorithms - _ALGORITHMS.keys()):
        findings.add("algorithm", f"it does not know {odd[0] or 'the empty quant_algo'}", way=AGAIN)
        return None
    if release_of(version) < (1, 3) and (new := sorted(algorithms & {*_NEW})):
        findings.add("old", f"release {version} does not know {new[0]}", way="serve with a newer one")
        return None
    if "FP8_PB_WO" in algorithms:
        findings.add("case", "releases up to 1.2 know it as fp8_pb_wo alone", way="--fp8-pb-spelling native")
    if algorithm == MIXED:
        layers = {name: _ALGORITHMS[one] for name, one in layers.items()}
        return Reading("", where, names, layers, 0, kv_of(kv), "modelopt", sizes_of(section))
    return Reading(_ALGORITHMS[algorithm], where, names, {}, size_in(section), kv_of(kv), "modelopt")


def _compare(inline: dict | None, nested: dict, findings: Findings) -> None:
    if inline is None or not str(inline.get("quant_method", "")).startswith("modelopt"):
        return
    kinds = {
        "quant_algo": (inline.get("quant_algo"), nested.get("quant_algo")),
        "KV cache": (kv_of(inline.get("kv_cache_scheme")), kv_of(nested.get("kv_cache_quant_algo"))),
        "quantized_layers": (layers_of(inline), layers_of(nested)),
        "list of modules left out": (set(listed(inline, "ignore")), set(listed(nested, "exclude_modules"))),
    }
    for kind, (one, other) in kinds.items():
        if one != other:
            why = f"config.json and hf_quant_config.json have another {kind}, and it reads the latter"
            findings.add("two configs", why)


def check_gpu(reading: Reading, gpu: str | None, findings: Findings) -> None:
    """The GPU against the machines that compute each algorithm."""
    for algorithm in sorted({reading.algorithm, *reading.layers.values()} & _MACHINES.keys()):
        on, capabilities = _MACHINES[algorithm]
        if gpu is None and on:
            findings.add("machine", on)
        elif gpu is not None and GPUS[gpu] not in capabilities:
            findings.add("gpu", f"it does not compute {algorithm} on {gpu}", way=f"it does {on}" if on else "")


def _check_layouts(checkpoint: CheckpointView, reading: Reading, algorithm_of: AlgorithmOf, findings: Findings) -> None:
    if checkpoint.architecture == "GptOssForCausalLM" and reading.dialect == "modelopt":
        findings.add("gpt_oss", "not tried with this architecture")
    built = built_by("tensorrt_llm", checkpoint)
    if not built.compared:
        findings.add("sees", "how it compares names in lists with those of this architecture's modules was not read")
    for group in checkpoint.whole.groups:
        if group.mtp or not group.quantized:
            continue
        try:
            algorithm = algorithm_of(group)
        except Partly:
            continue
        if group.kind == "linear" and group.parts in IN_FILES and not built.inverse and algorithm in _UNHANDED:
            findings.add("joined file", f"it does not hand on scales of {algorithm} of what it takes apart", *group.members,
                         way="--format fp8 or nvfp4")  # fmt: skip
        if group.kind == "experts" and checkpoint.architecture.startswith("Llama4"):
            findings.add("llama4", "reads experts of Llama 4 only where they are stacked in one tensor", group.parent,
                         way="--format fp8 or nvfp4")  # fmt: skip
        check_inputs(group, algorithm, reading, findings)
        if group.kind == "experts":
            check_experts(group, algorithm, findings)
        if checkpoint.latent and ".self_attn" in group.parent:
            _check_latent(group, findings)
        _check_packed(group, algorithm, findings)


def _check_packed(group: Group, algorithm: str | None, findings: Findings) -> None:
    if "in_proj_z" in group.parts and algorithm not in ("FP8", "blocks", "modelopt blocks"):
        findings.add("packed", f"in_proj_qkv and in_proj_z in {algorithm}: how it would pack these was not found")


def _check_latent(group: Group, findings: Findings) -> None:
    """The two projections that it takes apart or joins by itself; all others are loaded as any linear."""
    for name, module in group.members.items():
        if "weight_scale_inv" in module:
            continue
        if name.endswith(".kv_b_proj"):
            findings.add("latent", "it loads kv_b_proj in bfloat16 or blocks of FP8 alone", group.parent,
                         way="without --quantize-mla")  # fmt: skip
        elif name.endswith(".kv_a_proj_with_mqa") and "weight_scale_2" not in module:
            findings.add("latent", "it loads kv_a_proj_with_mqa in bfloat16, blocks of FP8 or NVFP4 alone", group.parent,
                         way="without --quantize-mla")  # fmt: skip
