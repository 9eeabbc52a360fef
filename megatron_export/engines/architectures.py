"""The architectures whose loaders were read in each engine's sources, a line each: what it builds otherwise than of a Qwen 3.

Of an architecture without a line the verdict is "not known".
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .checkpoint_view import CheckpointView, Group
from .exclude_lists import Names, full
from .quant_configs import Reading


@dataclass(frozen=True, kw_only=True)
class Built:
    """How one engine builds an architecture. What is not given is as of a Qwen 3.

    modules    a part of HF modules' names -> what the engine has there
    listed     the same, of names that configs list
    stripped   whether names in configs that begin with language_model. count without that too
    plain      ends of the names of linears that it builds without quantization, whatever configs say
    plain_fp4  more such, where all of a model is in NVFP4
    needs      keys of config.json that its class reads
    routed     whether its experts are chosen as config.json says in DeepSeek's words
    chunked    whether it builds dual chunk attention
    asking     whether it asks the config about routers
    one_name   whether it takes gate and up for one name, when it compares lists
    dense      whether it builds layers without experts among others
    joining    whether it finds the members of joined linears in quantized_layers
    inverse    whether its loader keeps weight_scale_inv
    head       whether its output layer may be quantized
    caching    whether its loader keeps KV scales
    compared   whether it was read how it compares names in lists
    windowed   whether it computes attention in the sliding windows that HF's class takes from config.json
    read       whether its class was read
    patterned  whether it reads in index_topk_pattern and index_topk_freq alone which layers have an indexer
    """

    modules: Mapping[str, str] = field(default_factory=dict)
    listed: Mapping[str, str] = field(default_factory=dict)
    stripped: bool = False
    plain: tuple[str, ...] = ()
    plain_fp4: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    routed: bool = False
    chunked: bool = False
    asking: bool = False
    one_name: bool = False
    dense: bool = True
    joining: bool = False
    inverse: bool = True
    head: bool = True
    caching: bool = False
    compared: bool = True
    windowed: bool = True
    read: bool = True
    patterned: bool = False


@dataclass(frozen=True, kw_only=True)
class Engines:
    """How each engine builds one architecture."""

    vllm: Built = Built()
    sglang: Built = Built()
    tensorrt_llm: Built = Built()


_SEES = {"model.language_model.": "language_model.model."}
_UNREAD = Built(compared=False)  # in TensorRT-LLM
_LLAMA = Built(inverse=False, caching=True)  # in SGLang
_MISTRAL = replace(_LLAMA, windowed=False)
_WITHIN = Built(modules={"language_model.": ""})  # there: the model of text compares lists with names of its own
_QWEN_MOE = Built(chunked=True, asking=True, one_name=True)  # in vLLM
_INDEXER = (".indexer.wk", ".indexer.weights_proj")  # in TensorRT-LLM: _torch/attention_backend/sparse/dsa/indexer.py
_DSA = Engines(
    vllm=Built(routed=True, plain=_INDEXER, patterned=True),
    sglang=Built(routed=True, caching=True, plain=_INDEXER[1:]),
    tensorrt_llm=Built(plain=_INDEXER),
)
_JOIN = ("mtp.fc",)  # of embedding and hidden state, in layers that predict
_HYBRID = Built(joining=True, caching=True)  # in SGLang
_QWEN35 = Engines(vllm=Built(plain_fp4=_JOIN), sglang=replace(_HYBRID, plain=_JOIN))
_QWEN35_SEES = replace(_QWEN35, vllm=Built(modules=_SEES, listed=_SEES, plain_fp4=_JOIN))
_QWEN35_TEXT = replace(_QWEN35, sglang=replace(_HYBRID, plain=_JOIN, head=False))
ARCHITECTURES: dict[str, Engines] = {
    "LlamaForCausalLM": Engines(sglang=_LLAMA),
    "MistralForCausalLM": Engines(sglang=_MISTRAL),
    "Mistral3ForConditionalGeneration": Engines(
        vllm=Built(inverse=False),
        sglang=replace(_MISTRAL, modules={"language_model.model.": "model."}),
        tensorrt_llm=_WITHIN,
    ),
    "Ministral3ForCausalLM": Engines(sglang=_MISTRAL, tensorrt_llm=Built(read=False)),
    "Mistral3ForConditionalGeneration of ministral3": Engines(
        vllm=Built(inverse=False),
        sglang=replace(_MISTRAL, modules={"language_model.model.": "model."}),
        tensorrt_llm=Built(read=False),
    ),
    "Phi3ForCausalLM": Engines(sglang=_MISTRAL, tensorrt_llm=Built(inverse=False)),
    "Qwen2ForCausalLM": Engines(vllm=Built(chunked=True), sglang=Built(chunked=True, windowed=False)),
    "Qwen3ForCausalLM": Engines(vllm=Built(chunked=True), sglang=Built(windowed=False)),
    "Qwen3VLForConditionalGeneration": Engines(
        vllm=Built(modules=_SEES, listed=_SEES),
        sglang=Built(listed=_SEES, stripped=True),
        tensorrt_llm=Built(modules={"model.language_model.": "model."}),
    ),
    "Qwen3MoeForCausalLM": Engines(
        vllm=_QWEN_MOE, sglang=Built(chunked=True, dense=False, joining=True, windowed=False)
    ),
    "Qwen3VLMoeForConditionalGeneration": Engines(
        vllm=Built(modules=_SEES, listed=_SEES, asking=True, one_name=True, needs=("norm_topk_prob",)),
        sglang=Built(listed=_SEES, stripped=True, dense=False),
        tensorrt_llm=_UNREAD,
    ),
    "Gemma3ForCausalLM": Engines(sglang=Built(joining=True, caching=True)),
    "Gemma3ForConditionalGeneration": Engines(sglang=Built(joining=True, caching=True), tensorrt_llm=_WITHIN),
    "MixtralForCausalLM": Engines(sglang=Built(head=False, windowed=False)),
    "MiniMaxM2ForCausalLM": Engines(
        vllm=Built(modules={".block_sparse_moe.experts": ".mlp.experts"}, needs=("use_routing_bias", "scoring_func")),
        sglang=Built(head=False, joining=True, caching=True, needs=("use_routing_bias", "scoring_func", "use_qk_norm")),
    ),
    "DeepseekV3ForCausalLM": Engines(vllm=Built(routed=True), sglang=Built(routed=True, caching=True)),
    "DeepseekV32ForCausalLM": _DSA,
    "GlmMoeDsaForCausalLM": _DSA,
    "KimiK25ForConditionalGeneration": Engines(
        vllm=Built(routed=True),
        sglang=Built(
            routed=True, caching=True, modules={"language_model.": ""}, stripped=True, needs=("architectures",)
        ),
        tensorrt_llm=_UNREAD,
    ),
    "Glm4MoeForCausalLM": Engines(),
    "GptOssForCausalLM": Engines(),
    "Qwen3NextForCausalLM": Engines(
        vllm=Built(plain_fp4=_JOIN, head=False),
        sglang=replace(_HYBRID, plain=_JOIN, dense=False, modules={"mtp.layers.": "model.layers."}),
    ),
    "Qwen3_5ForConditionalGeneration": _QWEN35_SEES,
    "Qwen3_5MoeForConditionalGeneration": _QWEN35_SEES,
    "Qwen3_5ForCausalLM": _QWEN35_TEXT,
    "Qwen3_5MoeForCausalLM": _QWEN35_TEXT,
    "NemotronHForCausalLM": Engines(sglang=_HYBRID),
    "Llama4ForCausalLM": Engines(sglang=Built(joining=True)),
    "Llama4ForConditionalGeneration": Engines(sglang=Built(joining=True)),
}


def built_by(engine: str, checkpoint: CheckpointView) -> Built:
    """How an engine, by its name in `Engines`, builds a checkpoint's architecture."""
    name, inside = checkpoint.architecture, f"{checkpoint.architecture} of {checkpoint.text.get('model_type')}"
    return getattr(ARCHITECTURES.get(inside, ARCHITECTURES.get(name, Engines())), engine)


def called(name: str, parts: Mapping[str, str]) -> str:
    """A name, with what stands in place of these parts of it."""
    for part, other in parts.items():
        name = name.replace(part, other, 1)
    return name


def as_built(group: Group, built: Built) -> Group:
    """A group under the names of the engine's modules."""
    if not built.modules:
        return group
    of = full(group.parent, group.parts[0]) if group.parts else group.parent
    mine = called(of, built.modules)
    return replace(
        group,
        parent=mine.rpartition(".")[0] if group.parts else mine,
        members={called(name, built.modules): module for name, module in group.members.items()},
    )


def as_listed(reading: Reading, built: Built) -> Reading:
    """What configs say, under the names that the engine makes of theirs."""
    if not (built.listed or built.stripped):
        return reading
    layers = built.listed if built.modules else {}  # else it looks for HF's names in quantized_layers too
    names = [called(name, built.listed) for name in reading.names.listed]
    if built.stripped and reading.dialect == "modelopt":
        names += [name.removeprefix("language_model.") for name in names if name.startswith("language_model.")]
    return replace(
        reading,
        names=Names(tuple(names)),
        layers={called(name, layers): one for name, one in reading.layers.items()},
        sizes={called(name, layers): one for name, one in reading.sizes.items()},
    )


def is_plain(group: Group, built: Built, reading: Reading) -> bool:
    """Whether the engine builds a linear without quantization. Of blocks of FP8 it makes bfloat16 when it loads them."""
    name = full(group.parent, group.parts[0]) if group.parts else ""
    plain = built.plain + (built.plain_fp4 if "NVFP4" in (reading.algorithm or "") else ())
    return name.endswith(plain) and not (group.quantized and reading.algorithm == "blocks")
