"""Which drafts SGLang 0.5.23 takes beside a base: of EAGLE-3 alone. Read in its sources; its loaders were run on a CPU."""

from .checkpoint_view import CheckpointView, Group
from .checks import check_capability
from .drafts import (
    ANOTHER,
    EAGLE3,
    check_base,
    check_class,
    check_draft,
    check_layers,
    check_linears,
    count_in,
    draft_of,
    ids_in,
)
from .exclude_lists import Names, sglang_excluded, sglang_skipped
from .sglang import LEAST, NAME, NOT_NEEDED, VERSION, read
from .verdict import Effect, Findings, table

SEEN_IN = "tests/engines/test_loaded_drafts.py"
_FILES = {
    "configs": "srt/configs/model_config.py",
    "eagle": "srt/speculative/eagle_worker_v2.py",
    "fp8": "srt/layers/quantization/fp8.py",
    "joined": "srt/layers/quantization/utils.py",
    "layers": "srt/model_executor/model_runner_components/spec_aux_hidden_state.py",
    "llama": "srt/models/llama.py",
    "llama_eagle3": "srt/models/llama_eagle3.py",
    "loader": "srt/model_loader/loader.py",
    "modelopt": "srt/layers/quantization/modelopt_quant.py",
    "registry": "srt/models/registry.py",
    "target": "srt/model_executor/model_runner_components/attention_backend_setup.py",
    "weights": "srt/model_loader/weight_utils.py",
}
_R, _L, _M, _U = Effect.REFUSES, Effect.LOSES, Effect.MINDS, Effect.UNKNOWN
SEEN, READ = True, False

# fmt: off
RULES = table(f"{NAME} {VERSION}", _FILES, {
    "draft":         (_U, "a draft with rules: of EAGLE-3", "registry", READ),
    "architecture":  (_U, "a class with rules: that of Llama's layers", "registry", READ),
    "class":         (_R, "architectures names LlamaForCausalLMEagle3", "registry", SEEN),
    "medusa":        (_R, "it has no Medusa", "registry", SEEN),
    "base":          (_M, "a base to compare with", "eagle", READ),
    "target":        (_R, "the base's class hands out hidden states", "target", READ),
    "vocabulary":    (_R, "the draft's vocab_size is the base's, whose embedding it takes", "eagle", READ),
    "hidden":        (_R, "hidden_size, or target_hidden_size, is the base's", "llama_eagle3", READ),
    "embedding":     (_R, "a draft of another hidden_size has an embedding of its own", "llama", READ),
    "positions":     (_M, "the draft rotates as its base", "llama_eagle3", READ),
    "files":         (_R, "every file of the index is there", "weights", SEEN),
    "consolidated":  (_M, "files of Mistral's own format are left out", "loader", SEEN),
    "twice":         (_R, "no tensor is in two files that are read", "weights", READ),
    "missing":       (_R, "every tensor of the layers is there, and fc; it does not look", "llama_eagle3", SEEN),
    "norms":         (_R, "layers behind the first have their norm as hidden_norm", "llama_eagle3", SEEN),
    "midlayer":      (_R, "of several layers none is called midlayer, which means the first", "llama_eagle3", SEEN),
    "head":          (_R, "lm_head is there if config.json has a draft_vocab_size", "llama_eagle3", SEEN),
    "unknown":       (_M, "tensors that the model does not have are skipped", "llama_eagle3", SEEN),
    "shape":         (_R, "shapes are those of config.json and of the algorithm", "llama_eagle3", SEEN),
    "aux":           (_R, "fc takes as many layers of the base as eagle_config lists, or three", "llama_eagle3", SEEN),
    "aux layers":    (_R, "these are layers of the base, and none is the last", "llama", READ),
    "d2t":           (_R, "d2t says which tokens of the base a smaller vocabulary has, or it has the first ones", "eagle", READ),
    "fc":            (_R, "fc is in bfloat16: its codes are copied in as numbers, without their scale", "llama_eagle3", SEEN),
    "unquantized":   (_R, "codes need a quantization config", "weights", READ),
    "older":         (_R, "the exclude list is not spelled as in hf_quant_config.json, where it is not read", "modelopt", SEEN),
    "excludes all":  (_R, "the exclude list leaves something quantized; model* is every module of a draft", "modelopt", READ),
    "left out":      (_R, "what is left out of quantization is stored in bfloat16", "modelopt", READ),
    "not left out":  (_R, "what is stored in bfloat16 is left out, lm_head too", "modelopt", SEEN),
    "partly":        (_R, "q, k, v and gate, up are left out together", "joined", SEEN),
    "scale":         (_R, "every quantized linear has all its scales", "modelopt", SEEN),
    "dtype":         (_R, "dtypes are those of the algorithm", "modelopt", READ),
    "extra":         (_L, "other tensors of a quantized linear are skipped", "llama_eagle3", SEEN),
    "config":        (_R, "hf_quant_config.json alone says the group_size of NVFP4", "modelopt", SEEN),
    "no cache said": (_R, "a mixed draft whose config.json says nothing of a KV cache has hf_quant_config.json", "weights", SEEN),
    "algorithm":     (_R, "quant_algo is one of its six, in capitals", "modelopt", SEEN),
    "mixed":         (_R, "there is one algorithm for the whole draft", "modelopt", READ),
    "another":       (_U, "a dialect with rules: ModelOpt's, or fp8 in blocks of 128", "configs", READ),
    "heads":         (_R, "GPUs that share layers have as many heads each, of keys too or copies of one", "llama", READ),
    "shared":        (_R, "so they have whole blocks and groups of every linear that is cut", "fp8", READ),
    "gpu":           (_R, "the GPU computes it", "modelopt", READ),
})
# fmt: on
_CLASS, _UNREAD = "LlamaForCausalLMEagle3", "Eagle3DeepseekV2ForCausalLM"
_BASES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM",
    "Glm4MoeForCausalLM", "GptOssForCausalLM", "Llama4ForConditionalGeneration")  # fmt: skip
_HANDS_OUT_ALL = ("GptOssForCausalLM",)  # the output of its last layer too


def judge(
    checkpoint: CheckpointView, kind: str, base: CheckpointView | None, version: str, gpu: str | None, tp: int
) -> Findings:
    """What SGLang finds in a draft of this kind beside a base, on `tp` GPUs of the kind `gpu`; None for any."""
    findings = Findings(RULES)
    if kind == ANOTHER:
        findings.add("draft", "no rules about this kind of draft: they are of EAGLE-3")
    elif kind != EAGLE3:
        findings.add("medusa", "it has no Medusa", way="draft with EAGLE-3")
    elif check_class(checkpoint, checkpoint.architecture == _CLASS, checkpoint.architecture == _UNREAD, findings):
        _judge_eagle3(checkpoint, base, version, gpu, tp, findings)
    return findings


def _judge_eagle3(
    checkpoint: CheckpointView, base: CheckpointView | None, version: str, gpu: str | None, tp: int, findings: Findings
) -> None:
    draft = draft_of(checkpoint, base, _spelled, "hidden_norm", count_in(checkpoint))
    tensors = draft.checkpoint.whole.tensors
    several = [name for name in checkpoint.whole.tensors if name.startswith("midlayer.")]
    if draft.checkpoint.layers > 1 and several:
        findings.add("midlayer", "it takes midlayer for layers.0, and there are several layers", *several,
                     way="call them layers.0, layers.1 and so on")  # fmt: skip
        return
    check_base(draft, _BASES, findings)
    check_draft(draft, findings)
    whole = base is not None and base.architecture in _HANDS_OUT_ALL
    last = base.layers - (1 if whole else 2) if base else 0
    check_layers(draft, ids_in(checkpoint.config.get("eagle_config")), 0, last, findings)
    named = checkpoint.config.get("draft_vocab_size") is not None
    if named and not draft.smaller and "lm_head.weight" not in tensors:
        why = "config.json says a draft_vocab_size, and then it takes no lm_head from the base"
        findings.add("head", why, "lm_head", way='"draft_vocab_size": null, or write its lm_head')
    reading = read(draft.checkpoint, version, findings)
    fc = tensors.get("fc.weight")
    if fc is not None and fc.dtype in ("F8_E4M3", "U8"):
        why = f"it is {fc.dtype}: its codes are taken for numbers, and its scales skipped"
        findings.add("fc", why, "fc", way="export the draft again with fc in bfloat16")
    if reading is None:
        return
    if not reading.names.listed and draft.checkpoint.inline and "quantization" in draft.checkpoint.inline:
        why = "quantization_config is spelled as hf_quant_config.json: of that it reads the algorithm alone, and no exclude list"
        findings.add("older", why, way="spell it flat: quant_method, quant_algo, ignore")
        return

    def matcher(names: Names, parent: str, parts: tuple[str, ...], joined: str) -> bool:
        modelopt = reading.dialect == "modelopt"
        return sglang_skipped(names, parent, parts, joined) or (
            modelopt and sglang_excluded(names, parent, parts, joined)
        )

    check_linears(draft, reading, _parent, matcher, NOT_NEEDED, tp, findings, never="fc")
    if reading.algorithm:
        check_capability(reading, gpu, LEAST, 80, findings)


def _spelled(name: str) -> str:
    return name.removeprefix("model.").replace("midlayer", "layers.0")


def _parent(group: Group) -> str:
    """Its modules have no layer number, and no mlp; the output of attention alone is in self_attn."""
    if group.kind == "head":
        return ""
    return "model.self_attn" if group.parts == ("o_proj",) else "model"
