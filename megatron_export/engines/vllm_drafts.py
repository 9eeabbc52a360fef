"""Which drafts vLLM 0.32.0 takes beside a base: of EAGLE-3, and, as its last release, of Medusa. Read, and tried on a CPU."""

from functools import partial

from .checkpoint_view import CheckpointView, Group
from .checks import check_capability
from .drafts import (
    ANOTHER,
    COMBINED,
    EAGLE3,
    Draft,
    check_base,
    check_class,
    check_draft,
    check_layers,
    check_linears,
    count_in,
    draft_of,
    ids_in,
)
from .exclude_lists import full, vllm_exactly, vllm_modelopt
from .medusa_heads import check_heads, heads_of
from .releases import has
from .verdict import Effect, Findings, table
from .vllm import LEAST, NAME, NOT_NEEDED, VERSION, by_one_name, read

SEEN_IN = "tests/engines/test_loaded_drafts.py"
_FILES = {
    "archs": "model_executor/models/registry.py",
    "blocks": "model_executor/layers/quantization/utils/fp8_utils.py",
    "configs": "transformers_utils/model_arch_config_convertor.py",
    "eagle": "transformers_utils/configs/eagle.py",
    "layers": "v1/worker/gpu_model_runner.py",
    "llama": "model_executor/models/llama_eagle3.py",
    "loader": "model_executor/model_loader/default_loader.py",
    "medusa": "model_executor/models/medusa.py",
    "medusa config": "transformers_utils/configs/medusa.py",
    "model config": "config/model.py",
    "modelopt": "model_executor/layers/quantization/modelopt.py",
    "proposer": "v1/spec_decode/llm_base_proposer.py",
    "speculative": "config/speculative.py",
    "weights": "model_executor/model_loader/weight_utils.py",
}
_R, _L, _M, _U = Effect.REFUSES, Effect.LOSES, Effect.MINDS, Effect.UNKNOWN
SEEN, READ = True, False

# fmt: off
RULES = table(f"{NAME} {VERSION}", _FILES, {
    "draft":         (_U, "a draft with rules: of EAGLE-3, or of Medusa", "speculative", READ),
    "architecture":  (_U, "a class with rules: that of Llama's layers", "archs", READ),
    "class":         (_R, "architectures names a class that it has; Eagle3 is put before a name without it", "eagle", SEEN),
    "base":          (_M, "a base to compare with", "speculative", READ),
    "target":        (_R, "the base's class hands out hidden states", "archs", READ),
    "vocabulary":    (_R, "the draft's vocab_size, or the rows of Medusa's heads, are the base's", "llama", READ),
    "hidden":        (_R, "hidden_size, or target_hidden_size, is the base's", "llama", READ),
    "embedding":     (_R, "a draft of another hidden_size has an embedding of its own", "proposer", READ),
    "positions":     (_M, "the draft rotates as its base", "llama", READ),
    "files":         (_R, "every file of the index is there", "weights", SEEN),
    "consolidated":  (_R, "no consolidated*.safetensors, which are read as Mistral's own format", "loader", SEEN),
    "twice":         (_R, "no tensor is in two files; it does not look, and keeps the last", "loader", READ),
    "missing":       (_R, "every tensor of the layers is there, and fc", "llama", SEEN),
    "norms":         (_R, "layers behind the first have their norm as input_layernorm", "llama", SEEN),
    "midlayer":      (_R, "of several layers none is called midlayer, which means the first", "llama", SEEN),
    "unknown":       (_R, "no tensor that it does not have; names have no model. before them", "llama", SEEN),
    "shape":         (_R, "shapes are those of config.json and of the algorithm", "llama", SEEN),
    "aux":           (_R, "fc takes as many layers of the base as config.json lists, or three", "llama", SEEN),
    "aux layers":    (_R, "these are layers of the base", "layers", READ),
    "aux shift":     (_L, "their numbers count inputs of layers, those in eagle_config outputs", "layers", READ),
    "head":          (_R, "lm_head is there if the vocabulary is smaller than the base's", "llama", READ),
    "d2t":           (_R, "d2t says which tokens of the base a smaller vocabulary has, or it has the first ones", "llama", SEEN),
    "d2t idle":      (_R, "there is no d2t if the vocabulary is the base's", "llama", SEEN),
    "unquantized":   (_R, "codes need a quantization config", "loader", SEEN),
    "excludes all":  (_R, "the exclude list leaves something quantized; model* is every module of a draft", "modelopt", SEEN),
    "left out":      (_R, "what is left out of quantization is stored in bfloat16", "modelopt", SEEN),
    "not left out":  (_R, "what is stored in bfloat16 is left out, fc and lm_head too, q, k and v as qkv_proj", "modelopt", SEEN),
    "scale":         (_R, "every quantized linear has all its scales", "modelopt", SEEN),
    "dtype":         (_R, "dtypes are those of the algorithm", "modelopt", READ),
    "extra":         (_R, "a quantized linear has no other tensors", "modelopt", SEEN),
    "dialect":       (_R, "quantization_config says quant_method, or has ModelOpt's producer", "configs", SEEN),
    "config":        (_R, "ModelOpt's older spelling has one of four algorithms, with all its keys", "configs", SEEN),
    "algorithm":     (_R, "quant_algo is one of its seven", "modelopt", SEEN),
    "mixed":         (_R, "there is one algorithm for the whole draft", "modelopt", SEEN),
    "another":       (_U, "a dialect with rules: ModelOpt's, or fp8 in blocks of 128", "configs", READ),
    "heads":         (_R, "GPUs that share layers have as many heads each, of keys too or copies of one", "model config", READ),
    "shared":        (_R, "so they have whole blocks and groups of every linear that is cut", "blocks", READ),
    "gpu":           (_R, "the GPU computes it", "modelopt", READ),
    "gone":          (_R, "Medusa is there up to 0.32", "medusa", READ),
    "combined":      (_R, "Medusa's heads are in a folder of their own", "medusa config", SEEN),
    "codes":         (_R, "Medusa's heads are in bfloat16: codes are copied in as numbers, and scales are skipped", "medusa", SEEN),
    "blocks":        (_R, "config.json counts Medusa's blocks, in the last of its keys with num and layers", "medusa config", SEEN),
    "bias":          (_L, "medusa_fc_bias is true, or biases are skipped", "medusa", SEEN),
    "tokens":        (_M, "no more tokens are drafted than there are heads", "speculative", READ),
})
# fmt: on
_CLASSES = (
    "Eagle3LlamaForCausalLM",
    "LlamaForCausalLMEagle3",
    "Eagle3MiniMaxM2ForCausalLM",
    "Eagle3Qwen2_5vlForCausalLM",
    "Eagle3Qwen3vlForCausalLM",
)  # fmt: skip
_UNREAD = ("Eagle3Qwen3ForCausalLM", "Eagle3DeepseekV2ForCausalLM", "Eagle3DeepseekV3ForCausalLM")
_BASES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM", "GptOssForCausalLM", "Llama4ForCausalLM", "Llama4ForConditionalGeneration")  # fmt: skip


def judge(
    checkpoint: CheckpointView, kind: str, base: CheckpointView | None, version: str, gpu: str | None, tp: int
) -> Findings:
    """What vLLM finds in a draft of this kind beside a base, on `tp` GPUs of the kind `gpu`; None for any."""
    findings = Findings(RULES)
    if kind == ANOTHER:
        findings.add("draft", "no rules about this kind of draft: they are of EAGLE-3 and of Medusa")
    elif kind == EAGLE3:
        _judge_eagle3(checkpoint, base, version, gpu, tp, findings)
    elif has("vllm", "no Medusa", version):
        findings.add("gone", f"{version} has no Medusa", way="serve with 0.32, or draft with EAGLE-3")
    elif kind == COMBINED:
        why = "it takes heads from a folder of their own, and misreads the base's config for theirs"
        findings.add("combined", why, way="export its Megatron model, whose heads get a folder of their own")
    else:
        _judge_medusa(checkpoint, base, findings)
    return findings


def _judge_eagle3(
    checkpoint: CheckpointView,
    base: CheckpointView | None,
    version: str,
    gpu: str | None,
    tp: int,
    findings: Findings,
) -> None:
    name = checkpoint.architecture
    name = name if name.startswith("Eagle3") or name.endswith("Eagle3") else f"Eagle3{name}"
    if not check_class(checkpoint, name in _CLASSES, name in _UNREAD, findings):
        return
    draft = draft_of(checkpoint, base, _spelled, "input_layernorm", count_in(checkpoint))
    several = [name for name in checkpoint.whole.tensors if name.startswith("midlayer.")]
    if draft.checkpoint.layers > 1 and several:
        findings.add("midlayer", "it takes midlayer for layers.0, and there are several layers", *several,
                     way="call them layers.0, layers.1 and so on")  # fmt: skip
        return
    check_base(draft, _BASES, findings)
    check_draft(draft, findings)
    if not draft.smaller and "d2t" in draft.checkpoint.whole.tensors:
        findings.add("d2t idle", "the draft knows all tokens, and has no place for it", "d2t", way="leave it out")
    _check_layers(draft, findings)
    reading = read(draft.checkpoint, version, findings)
    if reading is None:
        return
    before = base.layers if base else 0

    def parent_of(group: Group) -> str:
        """Layers are numbered behind those of the base."""
        first, _, rest = group.parent.partition(".")
        number, _, inside = rest.partition(".")
        numbered = f"layers.{before + int(number)}.{inside}" if first == "layers" else group.parent
        return "" if group.kind == "head" else full("model", numbered)

    matcher = partial(by_one_name, vllm_modelopt if reading.dialect == "modelopt" else vllm_exactly)
    check_linears(draft, reading, parent_of, matcher, NOT_NEEDED, tp, findings)
    if reading.algorithm:
        check_capability(reading, gpu, LEAST, 75, findings)


def _spelled(name: str) -> str:
    return name.replace("midlayer.", "layers.0.")


def _check_layers(draft: Draft, findings: Findings) -> None:
    top, ids = ids_in(draft.checkpoint.config), ids_in(draft.checkpoint.config.get("eagle_config"))
    last = draft.base.layers if draft.base else 0
    check_layers(draft, top or ids, 0, last, findings)
    outputs = [one + 1 for one in ids]
    if ids and list(top) != outputs:
        how = f"config.json itself lists {list(top)}" if top else "config.json itself lists none"
        why = f"eagle_config lists outputs {list(ids)} of layers, {how}: it takes those of one layer before"
        findings.add("aux shift", why if not top else f"eagle_config lists outputs {list(ids)} of layers, and {how}",
                     way=f'set "eagle_aux_hidden_state_layer_ids": {outputs} in config.json, beside eagle_config')  # fmt: skip


def _judge_medusa(checkpoint: CheckpointView, base: CheckpointView | None, findings: Findings) -> None:
    heads = heads_of(checkpoint)
    config = checkpoint.config
    counts = [value for key, value in config.items() if "num" in key and "layers" in key and "heads" not in key]
    layers = counts[-1] if counts else 1
    if layers != heads.layers:
        why = f"config.json counts {layers} blocks in each head, and there are {heads.layers}"
        findings.add("blocks", why, way=f'"num_hidden_layers": {heads.layers}')
    bias = config.get("medusa_fc_bias") is True
    check_heads(heads, checkpoint, base, bias, findings)
    biased = [name for name in heads.tensors if name.endswith(".bias")]
    if biased and not bias:
        findings.add("bias", "it skips biases", *biased, way='set "medusa_fc_bias": true in config.json')
    findings.add("tokens", f"with num_speculative_tokens of at most {heads.count}")
