"""How Megatron shapes and cuts each canonical parameter: one table for every architecture.

The cut is the weight axis that tensor parallelism divides (for experts, expert tensor parallelism). It is declared here and checked
against the model's real shapes; parameter attributes are missing or wrong for several modules. Megatron may pad the rows of a
vocabulary. {l} is a layer, {e} an expert. A name with a number is of that layer alone.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter

from ..common.piece import Axis
from .layer_kinds import FEED_FORWARD, MIXERS, Kind
from .shape import ModelShape


@dataclass(frozen=True)
class Parameter:
    """The axis that is cut (None: every rank holds the whole), the unsharded shape, and the layers that have it, if in layers."""

    cut: Axis | None
    shape: Callable[[ModelShape], tuple[int, ...]]
    layers: Callable[[ModelShape], Iterable[int]] = attrgetter("every")


def _in(*kinds: Kind) -> Callable[[ModelShape], tuple[int, ...]]:
    return lambda shape: shape.having(*kinds)


_mixers, _mlps = _in(*MIXERS), _in(*FEED_FORWARD)
_attention, _dense, _sparse = _in(Kind.ATTENTION), _in(Kind.MLP), _in(Kind.EXPERTS)
_linear, _mamba = _in(Kind.LINEAR), _in(Kind.MAMBA)
_joining, _last = _in(Kind.JOIN), _in(Kind.LAST)
_indexed = attrgetter("indexed")


def _qkv_rows(m: ModelShape) -> int:
    return (m.heads * (1 + m.output_gate) + 2 * m.groups) * m.head_dim


def _q_rows(m: ModelShape) -> int:
    return m.heads * (m.nope_dim + m.rope_dim)


def _mapped(m: ModelShape) -> int:
    """How many tokens of a draft stand for others of its base: all, if it knows fewer."""
    return m.vocab if m.vocab < m.base_vocab else 0


def _of_block(block: int, leaf: str) -> Callable[[ModelShape], tuple[int, ...]]:
    """The shape of a block's tensor in a head of Medusa, of size 0 if heads have fewer blocks."""
    sizes = 2 if leaf == "weight" else 1
    return lambda m: (m.hidden if block < m.blocks else 0,) * sizes


def _read_heads(m: ModelShape) -> int:
    return m.heads * (m.v_dim or m.head_dim)


def _halves(m: ModelShape) -> int:
    """Of the first linear of an MLP: gate and up, or up alone."""
    return 1 if m.ungated else 2


# fmt: off
PARAMETERS: dict[str, Parameter] = {
    "embedding.word_embeddings.weight":                        Parameter(Axis.OUT, lambda m: (m.vocab, m.hidden)),
    "decoder.final_layernorm.weight":                          Parameter(None,     lambda m: (m.hidden,)),
    "output_layer.weight":                                     Parameter(Axis.OUT, lambda m: (m.vocab, m.hidden)),

    "decoder.layers.{l}.input_layernorm.weight":               Parameter(None,     lambda m: (m.hidden,), _mixers),
    "decoder.layers.{l}.self_attention.linear_qkv.weight":     Parameter(Axis.OUT, lambda m: (_qkv_rows(m), m.hidden), _attention),
    "decoder.layers.{l}.self_attention.linear_qkv.bias":       Parameter(Axis.OUT, lambda m: (_qkv_rows(m),), _attention),
    "decoder.layers.{l}.self_attention.q_layernorm.weight":    Parameter(None,     lambda m: (m.q_lora or m.head_dim,), _attention),
    "decoder.layers.{l}.self_attention.k_layernorm.weight":    Parameter(None,     lambda m: (m.head_dim,), _attention),
    "decoder.layers.{l}.self_attention.linear_proj.weight":
        Parameter(Axis.IN,  lambda m: (m.hidden, _read_heads(m)), _attention),
    "decoder.layers.{l}.self_attention.linear_proj.bias":      Parameter(None,     lambda m: (m.hidden,), _attention),
    "decoder.layers.{l}.self_attention.core_attention.softmax_offset": Parameter(Axis.OUT, lambda m: (m.heads,), _attention),

    "decoder.layers.{l}.self_attention.linear_q_proj.weight":  Parameter(Axis.OUT, lambda m: (_q_rows(m), m.hidden), _attention),
    "decoder.layers.{l}.self_attention.linear_q_down_proj.weight":
        Parameter(Axis.OUT, lambda m: (m.q_lora, m.hidden), _attention),
    "decoder.layers.{l}.self_attention.linear_q_up_proj.weight":
        Parameter(Axis.OUT, lambda m: (_q_rows(m), m.q_lora), _attention),
    "decoder.layers.{l}.self_attention.linear_kv_down_proj.weight":
        Parameter(Axis.OUT, lambda m: (m.kv_lora + m.rope_dim, m.hidden), _attention),
    "decoder.layers.{l}.self_attention.kv_layernorm.weight":   Parameter(None,     lambda m: (m.kv_lora,), _attention),
    "decoder.layers.{l}.self_attention.linear_kv_up_proj.weight":
        Parameter(Axis.OUT, lambda m: (m.heads * (m.nope_dim + m.v_dim), m.kv_lora), _attention),

    # Of attention and MLPs whose outputs are normed.
    "decoder.layers.{l}.self_attention.linear_proj.post_layernorm.weight": Parameter(None, lambda m: (m.hidden,)),
    "decoder.layers.{l}.mlp.linear_fc2.post_layernorm.weight": Parameter(None, lambda m: (m.hidden,), _dense),

    # Of sparse attention. Every rank holds an indexer whole.
    "decoder.layers.{l}.self_attention.core_attention.indexer.linear_wq_b.weight":
        Parameter(None, lambda m: (m.index_heads * m.index_dim, m.q_lora), _indexed),
    "decoder.layers.{l}.self_attention.core_attention.indexer.linear_wk.weight":
        Parameter(None, lambda m: (m.index_dim, m.hidden), _indexed),
    "decoder.layers.{l}.self_attention.core_attention.indexer.k_norm.weight": Parameter(None, lambda m: (m.index_dim,), _indexed),
    "decoder.layers.{l}.self_attention.core_attention.indexer.k_norm.bias":   Parameter(None, lambda m: (m.index_dim,), _indexed),
    "decoder.layers.{l}.self_attention.core_attention.indexer.linear_weights_proj.weight":
        Parameter(None, lambda m: (m.index_heads, m.hidden), _indexed),

    "decoder.layers.{l}.pre_mlp_layernorm.weight":             Parameter(None,     lambda m: (m.hidden,), _mlps),
    "decoder.layers.{l}.mlp.linear_fc1.weight":
        Parameter(Axis.OUT, lambda m: (_halves(m) * m.ffn, m.hidden), _dense),
    "decoder.layers.{l}.mlp.linear_fc2.weight":                Parameter(Axis.IN,  lambda m: (m.hidden, m.ffn), _dense),

    "decoder.layers.{l}.mlp.router.weight":                    Parameter(None,     lambda m: (m.experts, m.hidden), _sparse),
    "decoder.layers.{l}.mlp.router.expert_bias":               Parameter(None,     lambda m: (m.experts,), _sparse),
    "decoder.layers.{l}.mlp.router.bias":                      Parameter(None,     lambda m: (m.experts,), _sparse),
    "decoder.layers.{l}.mlp.experts.{e}.linear_fc1.bias":      Parameter(Axis.OUT, lambda m: (_halves(m) * m.expert_ffn,), _sparse),
    "decoder.layers.{l}.mlp.experts.{e}.linear_fc2.bias":      Parameter(None,     lambda m: (m.hidden,), _sparse),
    "decoder.layers.{l}.mlp.experts.{e}.linear_fc1.weight":
        Parameter(Axis.OUT, lambda m: (_halves(m) * m.expert_ffn, m.latent or m.hidden), _sparse),
    "decoder.layers.{l}.mlp.experts.{e}.linear_fc2.weight":
        Parameter(Axis.IN,  lambda m: (m.latent or m.hidden, m.expert_ffn), _sparse),
    "decoder.layers.{l}.mlp.shared_experts.linear_fc1.weight":
        Parameter(Axis.OUT, lambda m: (_halves(m) * m.shared_ffn, m.hidden), _sparse),
    "decoder.layers.{l}.mlp.shared_experts.linear_fc2.weight":
        Parameter(Axis.IN,  lambda m: (m.hidden, m.shared_ffn), _sparse),
    "decoder.layers.{l}.mlp.shared_experts.gate_weight":       Parameter(None,     lambda m: (1, m.hidden), _sparse),
    "decoder.layers.{l}.mlp.fc1_latent_proj.weight":           Parameter(None,     lambda m: (m.latent, m.hidden), _sparse),
    "decoder.layers.{l}.mlp.fc2_latent_proj.weight":           Parameter(None,     lambda m: (m.hidden, m.latent), _sparse),

    # Of linear attention. Megatron has one in_proj of both, which canonical names part: no engine quantizes b and a.
    "decoder.layers.{l}.self_attention.in_proj.weight":
        Parameter(Axis.OUT, lambda m: (2 * m.delta.keys + 2 * m.delta.values, m.hidden), _linear),
    "decoder.layers.{l}.self_attention.in_proj_ba.weight":
        Parameter(Axis.OUT, lambda m: (2 * m.delta.value_heads, m.hidden), _linear),
    "decoder.layers.{l}.self_attention.conv1d.weight":
        Parameter(Axis.OUT, lambda m: (2 * m.delta.keys + m.delta.values, 1, m.delta.kernel), _linear),
    "decoder.layers.{l}.self_attention.dt_bias":               Parameter(Axis.OUT, lambda m: (m.delta.value_heads,), _linear),
    "decoder.layers.{l}.self_attention.A_log":                 Parameter(Axis.OUT, lambda m: (m.delta.value_heads,), _linear),
    "decoder.layers.{l}.self_attention.out_norm.weight":       Parameter(None,     lambda m: (m.delta.value_width,), _linear),
    "decoder.layers.{l}.self_attention.out_proj.weight":
        Parameter(Axis.IN,  lambda m: (m.hidden, m.delta.values), _linear),

    "decoder.layers.{l}.mixer.in_proj.weight":
        Parameter(Axis.OUT, lambda m: (sum(m.mamba.segments), m.hidden), _mamba),
    "decoder.layers.{l}.mixer.conv1d.weight":
        Parameter(Axis.OUT, lambda m: (sum(m.mamba.convolved), 1, m.mamba.kernel), _mamba),
    "decoder.layers.{l}.mixer.conv1d.bias":                    Parameter(Axis.OUT, lambda m: (sum(m.mamba.convolved),), _mamba),
    "decoder.layers.{l}.mixer.A_log":                          Parameter(Axis.OUT, lambda m: (m.mamba.heads,), _mamba),
    "decoder.layers.{l}.mixer.D":                              Parameter(Axis.OUT, lambda m: (m.mamba.heads,), _mamba),
    "decoder.layers.{l}.mixer.dt_bias":                        Parameter(Axis.OUT, lambda m: (m.mamba.heads,), _mamba),
    "decoder.layers.{l}.mixer.norm.weight":                    Parameter(Axis.OUT, lambda m: (m.mamba.inner,), _mamba),
    "decoder.layers.{l}.mixer.out_proj.weight":                Parameter(Axis.IN,  lambda m: (m.hidden, m.mamba.inner), _mamba),

    # Of a layer that predicts one more token, beside what every layer has.
    "decoder.layers.{l}.enorm.weight":                         Parameter(None,     lambda m: (m.hidden,), _joining),
    "decoder.layers.{l}.hnorm.weight":                         Parameter(None,     lambda m: (m.hidden,), _joining),
    "decoder.layers.{l}.eh_proj.weight":                       Parameter(Axis.OUT, lambda m: (m.hidden, 2 * m.hidden), _joining),
    "decoder.layers.{l}.final_layernorm.weight":               Parameter(None,     lambda m: (m.hidden,), _last),

    # Of an EAGLE-3 draft, beside what every model has. Its first layer reads an embedding beside a hidden state.
    "fc.weight":                                               Parameter(None,     lambda m: (m.hidden, m.read * m.hidden)),
    "enorm.weight":                                            Parameter(None,     lambda m: (m.hidden,)),
    "decoder.layers.0.input_layernorm.weight":                 Parameter(None,     lambda m: (m.hidden,)),
    "decoder.layers.0.self_attention.linear_qkv.weight":
        Parameter(Axis.OUT, lambda m: (_qkv_rows(m), 2 * m.hidden)),
    **{
        f"decoder.layers.{{l}}.medusa_layers.{block}.linear.{leaf}": Parameter(None, _of_block(block, leaf))
        for block in range(4)
        for leaf in ("weight", "bias")
    },
    "decoder.layers.{l}.lm_head.weight":                       Parameter(Axis.OUT, lambda m: (m.vocab, m.hidden)),

    # Of Medusa's heads that are written with their base. {h} is a head.
    **{
        f"medusa_heads.{{h}}.medusa_layers.{block}.linear.{leaf}": Parameter(None, _of_block(block, leaf))
        for block in range(4)
        for leaf in ("weight", "bias")
    },
    "medusa_heads.{h}.lm_head.weight":                         Parameter(Axis.OUT, lambda m: (m.vocab, m.hidden)),
    "d2t":                                                     Parameter(None,     lambda m: (_mapped(m),)),
}
# fmt: on
PADDED = (
    "embedding.word_embeddings.weight",
    "output_layer.weight",
    "decoder.layers.{l}.lm_head.weight",
    "medusa_heads.{h}.lm_head.weight",
)  # fmt: skip
# Megatron's local spec cuts these; those of Transformer Engine and ModelOpt hold them whole. Their shapes show which.
EITHER = ("linear_q_down_proj", "linear_kv_down_proj")
KEPT = {"expert_bias": "F32", "d2t": "I64"}  # everything else becomes bfloat16
_LAYER, _EXPERT = re.compile(r"\.layers\.\d+\."), re.compile(r"\.experts\.\d+\.")
_HEAD = re.compile(r"^medusa_heads\.\d+\.")


def cut_of(canonical: str) -> Axis | None:
    """The axis that tensor parallelism cuts of a canonical parameter; experts' names may be without their number."""
    name = _HEAD.sub("medusa_heads.{h}.", _EXPERT.sub(".experts.", _LAYER.sub(".layers.{l}.", canonical, count=1)))
    return PARAMETERS[re.sub(r"(?<!shared_)experts\.", "experts.{e}.", name)].cut


def is_expert(canonical: str) -> bool:
    """Whether a parameter or module belongs to a routed expert, or to the experts of a layer together."""
    return ".mlp.experts." in canonical


def pooled(canonical: str) -> str:
    """The name without the expert's number: experts of a layer are measured together, as engines give their inputs one scale."""
    return _EXPERT.sub(".experts.", canonical)


def makes_keys(canonical: str) -> bool:
    """Whether a KV cache keeps the outputs of this parameter, so that the scales of the cache stand beside it."""
    return canonical.endswith("self_attention.linear_qkv.weight")


HEAD = "output_layer.weight"  # which a recipe may quantize, if it names it


def is_linear_weight(canonical: str) -> bool:
    """Whether a format may quantize a parameter: Megatron calls the matrix products inside a layer linear_*, and those of linear
    attention and Mamba in_proj and out_proj; and all matrices of Medusa's heads that are written with their base.

    Those of an indexer stay as they are: engines join wk and weights_proj without quantization, and NVIDIA's own checkpoints leave
    out all three.
    """
    module, _, leaf = canonical.rpartition(".")
    name = module.rpartition(".")[2]
    inside = name.startswith("linear_") or name in ("in_proj", "out_proj") or canonical.startswith("medusa_heads.")
    return leaf == "weight" and inside and ".indexer." not in module
