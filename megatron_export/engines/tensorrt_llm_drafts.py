"""Which drafts TensorRT-LLM takes: of EAGLE-3 in its PyTorch backend, of Medusa in its engine flow. Read in its sources of 2026."""

from .checkpoint_view import CheckpointView, Group
from .checks import AGAIN, check_files
from .drafts import (
    ANOTHER,
    EAGLE3,
    MEDUSA,
    check_base,
    check_class,
    check_draft,
    check_layers,
    check_linears,
    draft_of,
    ids_in,
)
from .exclude_lists import Names, tensorrt_llm
from .medusa_heads import Heads, heads_of
from .tensorrt_llm import OPTIONAL, check_gpu, read
from .verdict import Effect, Findings, table

SEEN_IN = ""
_FILES = {
    "archs": "_torch/models/modeling_auto.py",
    "attention": "_torch/modules/attention.py",
    "configs": "quantization/modelopt_config.py",
    "convert": "models/medusa/weight.py",
    "draft": "_torch/models/modeling_speculative.py",
    "excluded": "models/modeling_utils.py",
    "linear": "_torch/modules/linear.py",
    "loader": "_torch/models/checkpoints/hf/weight_loader.py",
    "medusa": "models/medusa/model.py",
    "medusa config": "models/medusa/config.py",
    "mode": "quantization/mode.py",
    "reading": "_torch/model_config.py",
    "speculative": "llmapi/llm_args.py",
}
_R, _L, _M, _U = Effect.REFUSES, Effect.LOSES, Effect.MINDS, Effect.UNKNOWN
READ = False

# fmt: off
RULES = table("TensorRT-LLM main of 2026, tensorrt_llm/", _FILES, {
    "draft":         (_U, "a draft with rules: of EAGLE-3, or of Medusa", "archs", READ),
    "architecture":  (_U, "a class with rules: that of Llama's layers", "archs", READ),
    "class":         (_R, "architectures names LlamaForCausalLM with or without Eagle3, beside draft_vocab_size", "archs", READ),
    "base":          (_M, "a base to compare with", "speculative", READ),
    "target":        (_U, "a base whose class was read", "archs", READ),
    "vocabulary":    (_R, "the draft's vocab_size is the base's", "draft", READ),
    "hidden":        (_R, "hidden_size, or target_hidden_size, is the base's", "draft", READ),
    "embedding":     (_R, "a draft of another hidden_size has an embedding of its own", "draft", READ),
    "positions":     (_M, "the draft rotates as its base", "draft", READ),
    "files":         (_R, "every file of the index is there", "loader", READ),
    "consolidated":  (_M, "files of Mistral's own format are left out", "loader", READ),
    "twice":         (_R, "no tensor is in two files: all are read, and the index is not", "loader", READ),
    "missing":       (_R, "every tensor of the layers is there, and fc", "draft", READ),
    "norms":         (_R, "layers behind the first have their norm as hidden_norm", "draft", READ),
    "unknown":       (_M, "tensors that the model does not have are not looked at", "draft", READ),
    "shape":         (_R, "shapes are those of config.json and of the algorithm", "linear", READ),
    "aux":           (_R, "fc takes as many layers as eagle3_layers_to_capture, three by default", "draft", READ),
    "aux layers":    (_R, "these are layers of the base", "speculative", READ),
    "aux argument":  (_M, "they are given to it as an argument", "speculative", READ),
    "head":          (_R, "lm_head is there if the vocabulary is smaller than the base's", "draft", READ),
    "d2t":           (_R, "d2t says which tokens of the base a smaller vocabulary has", "draft", READ),
    "unquantized":   (_R, "codes need a quantization config", "reading", READ),
    "excludes all":  (_R, "the exclude list leaves something quantized; model* is every module of a draft", "excluded", READ),
    "left out":      (_R, "what is left out of quantization is stored in bfloat16", "excluded", READ),
    "not left out":  (_R, "what is stored in bfloat16 is left out, fc too; lm_head need not be", "excluded", READ),
    "scale":         (_R, "every quantized linear has all its scales, of Medusa also those of inputs", "linear", READ),
    "dtype":         (_R, "dtypes are those of the algorithm; Medusa's heads are in FP8", "linear", READ),
    "extra":         (_M, "other tensors of a quantized linear are not looked at", "linear", READ),
    "algorithm":     (_R, "quant_algo is one of its own, to the letter", "mode", READ),
    "mixed":         (_R, "there is one algorithm for the whole draft", "linear", READ),
    "two configs":   (_M, "hf_quant_config.json counts, and config.json says the same", "configs", READ),
    "case":          (_M, "releases up to 1.2 know fp8_pb_wo in small letters alone", "configs", READ),
    "old":           (_R, "releases up to 1.2 lack NVFP4_AWQ, W4A16_NVFP4, MXFP8, and FP8_PB_WO in capitals", "mode", READ),
    "another":       (_U, "a dialect with rules: ModelOpt's, or fp8 in blocks of 128", "configs", READ),
    "heads":         (_R, "GPUs that share layers have as many heads each, of keys too or copies of one", "attention", READ),
    "shared":        (_R, "so they have whole blocks and groups of every linear that is cut", "linear", READ),
    "machine":       (_M, "some formats run on some GPUs alone", "linear", READ),
    "gpu":           (_R, "the GPU computes it", "linear", READ),
    "alone":         (_R, "Medusa's heads are in one folder with their base", "medusa", READ),
    "flow":          (_M, "Medusa is in its engine flow, not in its PyTorch backend", "medusa", READ),
    "medusa base":   (_R, "Medusa's base is Llama or Qwen", "medusa config", READ),
    "counts":        (_R, "medusa in config.json counts the heads and their blocks", "medusa config", READ),
    "blocks":        (_R, "a head has one block in FP8: of several only the last one's scales are read", "convert", READ),
})
# fmt: on
_BASES = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "DeepseekV3ForCausalLM",
    "GptOssForCausalLM",
    "Llama4ForConditionalGeneration",
)  # fmt: skip
_OF_MEDUSA = ("MedusaLlamaForCausalLM", "MedusaQwen2ForCausalLM")


def judge(
    checkpoint: CheckpointView, kind: str, base: CheckpointView | None, version: str, gpu: str | None, tp: int
) -> Findings:
    """What release `version` finds in a draft of this kind beside a base, on `tp` GPUs of the kind `gpu`; None for any."""
    findings = Findings(RULES)
    if kind == ANOTHER:
        findings.add("draft", "no rules about this kind of draft: they are of EAGLE-3 and of Medusa")
    elif kind == MEDUSA:
        why = "it reads Medusa's heads, in FP8, in one folder with their base"
        findings.add("alone", why, way="write the heads beside their base, as ModelOpt does")
    elif kind == EAGLE3:
        _judge_eagle3(checkpoint, base, version, gpu, tp, findings)
    else:
        _judge_medusa(checkpoint, findings)
    return findings


def _judge_eagle3(
    checkpoint: CheckpointView,
    base: CheckpointView | None,
    version: str,
    gpu: str | None,
    tp: int,
    findings: Findings,
) -> None:
    name, said = checkpoint.architecture, checkpoint.config.get("draft_vocab_size") is not None
    known = name.replace("Eagle3", "") == "LlamaForCausalLM" if said else name == "EAGLE3LlamaForCausalLM"
    if not check_class(checkpoint, known, name == "Eagle3DeepSeekV3ForCausalLM", findings):
        return
    ids = ids_in(checkpoint.config.get("eagle_config"))
    draft = draft_of(checkpoint, base, _spelled, "hidden_norm", len(set(ids)) or 3)
    check_base(draft, _BASES, findings)
    check_draft(draft, findings)
    check_layers(draft, ids, 0, base.layers - 1 if base else 0, findings)
    default = {1, max(base.layers // 2 - 1, 0), max(base.layers - 4, 0)} if base else set()
    if ids and set(ids) != default:
        findings.add("aux argument", f"with eagle3_layers_to_capture={{{', '.join(map(str, ids))}}}")
    reading = read(draft.checkpoint, version, findings)
    if reading is None:
        return

    def parent_of(group: Group) -> str:
        """One layer is midlayer, several are midlayer.0 and so on."""
        _, _, rest = group.parent.partition(".")
        number, _, inside = rest.partition(".")
        if group.kind == "head" or not inside:
            return "" if group.kind == "head" else "model"
        return f"model.midlayer.{number}.{inside}" if draft.checkpoint.layers > 1 else f"model.midlayer.{inside}"

    def matcher(names: Names, parent: str, parts: tuple[str, ...], joined: str) -> bool:
        return (parts == ("lm_head",) and not in_codes) or tensorrt_llm(names, parent, parts, joined)

    in_codes = "lm_head.weight_scale" in draft.checkpoint.whole.tensors
    check_linears(draft, reading, parent_of, matcher, OPTIONAL, tp, findings)
    if reading.algorithm:
        check_gpu(reading, gpu, findings)


def _spelled(name: str) -> str:
    if name.startswith("midlayer."):
        numbered = name.split(".")[1].isdecimal()
        return name.replace("midlayer", "layers" if numbered else "layers.0", 1)
    return name


def _judge_medusa(checkpoint: CheckpointView, findings: Findings) -> None:
    """Heads beside their base, whose tensors must be there too."""
    heads, said = heads_of(checkpoint), checkpoint.config.get("medusa")
    said = said if isinstance(said, dict) else {}
    findings.add("flow", "with trtllm-build; its PyTorch backend has no Medusa")
    check_files(checkpoint, findings)
    if checkpoint.architecture not in _OF_MEDUSA:
        why = f"its Medusa is of Llama and of Qwen, and this is {checkpoint.architecture or 'neither'}"
        findings.add("medusa base", why, way='"architectures": ["MedusaLlamaForCausalLM"] for such a base')
    counts = said.get("num_medusa_heads"), said.get("num_medusa_layers")
    if counts != (heads.count, heads.layers):
        why = f"there are {heads.count} heads of {heads.layers} blocks, and config.json counts {counts[0]} and {counts[1]}"
        findings.add("counts", why, way="set num_medusa_heads and num_medusa_layers in medusa of config.json")
    for name in checkpoint.expected or ():
        if name not in heads.tensors and not (checkpoint.tied and name == "lm_head.weight"):
            findings.add("missing", "it is not there", name, way=AGAIN)
    for name in heads.others:
        if checkpoint.expected is not None and f"{name.rpartition('.')[0]}.weight" not in checkpoint.expected:
            findings.add("unknown", "no tensor of this architecture", name)
    _check_codes(heads, checkpoint, findings)
    if heads.layers > 1:
        why = f"heads have {heads.layers} blocks, and it reads the scales of the last one alone"
        findings.add("blocks", why, way="train heads of one block, or serve bfloat16 heads in vLLM 0.32")


def _check_codes(heads: Heads, checkpoint: CheckpointView, findings: Findings) -> None:
    hidden, vocabulary = checkpoint.number("hidden_size"), checkpoint.number("vocab_size")
    modules: dict[str, tuple[int, ...]] = {}
    for head in range(heads.count):
        modules |= {f"medusa_heads.{head}.{block}.linear": (hidden, hidden) for block in range(heads.layers)}
        modules[f"medusa_heads.{head}.{heads.layers}"] = (vocabulary, hidden)
    for module, shape in modules.items():
        header = heads.tensors.get(f"{module}.weight")
        if header is None:
            findings.add("missing", "it is not there", f"{module}.weight", way=AGAIN)
            continue
        if header.shape != shape:
            findings.add("shape", f"it is {list(header.shape)}, and config.json means {list(shape)}", module)
        if header.dtype != "F8_E4M3":
            findings.add("dtype", f"it is {header.dtype}, and it reads heads in FP8 alone", module, way="--format fp8")
            continue
        for suffix in ("weight_scale", "input_scale", *(("bias",) if module.endswith("linear") else ())):
            if f"{module}.{suffix}" not in heads.tensors:
                findings.add("scale", f"its {suffix} is not there", module, way=AGAIN)
