"""How Megatron shapes and cuts each canonical parameter: one table for every architecture.

The cut is the weight axis that tensor parallelism divides, None for a parameter that every rank holds whole. It is
declared here and checked against the model's real shapes, never read off parameter attributes: those are missing or
wrong for several modules. The row count of a vocabulary is a lower bound, since Megatron pads it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from ..piece import Axis
from .shape import ModelShape


@dataclass(frozen=True)
class Parameter:
    """The axis that tensor parallelism cuts, and the unsharded shape."""

    cut: Axis | None
    shape: Callable[[ModelShape], tuple[int, ...]]


def _qkv_rows(m: ModelShape) -> int:
    return (m.heads + 2 * m.groups) * m.head_dim


# fmt: off
PARAMETERS: dict[str, Parameter] = {
    "embedding.word_embeddings.weight":                     Parameter(Axis.OUT, lambda m: (m.vocab, m.hidden)),
    "decoder.layers.{l}.input_layernorm.weight":            Parameter(None,     lambda m: (m.hidden,)),
    "decoder.layers.{l}.self_attention.linear_qkv.weight":  Parameter(Axis.OUT, lambda m: (_qkv_rows(m), m.hidden)),
    "decoder.layers.{l}.self_attention.linear_qkv.bias":    Parameter(Axis.OUT, lambda m: (_qkv_rows(m),)),
    "decoder.layers.{l}.self_attention.q_layernorm.weight": Parameter(None,     lambda m: (m.head_dim,)),
    "decoder.layers.{l}.self_attention.k_layernorm.weight": Parameter(None,     lambda m: (m.head_dim,)),
    "decoder.layers.{l}.self_attention.linear_proj.weight": Parameter(Axis.IN,  lambda m: (m.hidden, m.heads * m.head_dim)),
    "decoder.layers.{l}.pre_mlp_layernorm.weight":          Parameter(None,     lambda m: (m.hidden,)),
    "decoder.layers.{l}.mlp.linear_fc1.weight":             Parameter(Axis.OUT, lambda m: (2 * m.ffn, m.hidden)),
    "decoder.layers.{l}.mlp.linear_fc2.weight":             Parameter(Axis.IN,  lambda m: (m.hidden, m.ffn)),
    "decoder.final_layernorm.weight":                       Parameter(None,     lambda m: (m.hidden,)),
    "output_layer.weight":                                  Parameter(Axis.OUT, lambda m: (m.vocab, m.hidden)),
}
# fmt: on
PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")


def cut_of(canonical: str) -> Axis | None:
    """The axis that tensor parallelism cuts of a canonical parameter of any layer."""
    return PARAMETERS[re.sub(r"\.\d+\.", ".{l}.", canonical, count=1)].cut


def makes_keys(canonical: str) -> bool:
    """Whether its outputs are what a KV cache keeps, so that the scales of the cache belong beside it."""
    return canonical.endswith("self_attention.linear_qkv.weight")


def is_linear_weight(canonical: str) -> bool:
    """Whether a format may quantize it: Megatron calls the matrix products inside a layer, and only those, linear_*."""
    module, _, leaf = canonical.rpartition(".")
    return leaf == "weight" and module.rpartition(".")[2].startswith("linear_")
