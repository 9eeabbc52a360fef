"""What a rule is: the HF name of a Megatron parameter, and the surgery between the two."""

from collections.abc import Callable
from dataclasses import dataclass

from .layouts import QKV, Copies, Fused, Identity, Layout, Split, Vocab
from .segment_layouts import OneMore
from .shape import ModelShape


@dataclass(frozen=True)
class Rule:
    """One row of a table.

    `hf` is the HF tensor name, with {l} for the layer, {e} for the expert and {part} for the layout's part, or the word for it in
    `words`. `copy` is the HF name of the copy in each layer of MTP; `stack` that of the tensor in which HF keeps all experts of a
    layer, their parts `woven` or not. A `zero_centred` norm multiplies by 1 more than its weight says.
    """

    hf: str
    layout: Callable[[ModelShape], Layout]
    words: tuple[tuple[str, str], ...] = ()
    copy: str | None = None
    stack: str | None = None
    woven: bool = False
    as_stored: bool = False
    cut_shape: Callable[[ModelShape], tuple[int, ...]] | None = None
    zero_centred: bool = False


Table = dict[str, Rule]  # canonical Megatron name -> rule


def same(hf: str) -> Rule:
    """The tensor as it is."""
    return Rule(hf, lambda shape: Identity())


def copies(hf: str, *names: str) -> Rule:
    """The same tensor under several names, as engines call it differently."""
    return Rule(hf, lambda shape: Copies(names))


def as_stored(hf: str) -> Rule:
    """The tensor as it is, in float32 where the original has it so."""
    return Rule(hf, lambda shape: Identity(), as_stored=True)


def of_all_heads(hf: str, heads: Callable[[ModelShape], int]) -> Rule:
    """A norm over all heads together, of which each rank has the weights of its own."""
    return Rule(hf, lambda shape: Identity(), cut_shape=lambda shape: (heads(shape) * shape.head_dim,))


def vocab(hf: str, copy: str | None = None) -> Rule:
    """The first `vocab_size` rows; each layer of MTP has them again under the name `copy`."""
    return Rule(hf, lambda shape: Vocab(shape.vocab, ("", *map(str, shape.predicting if copy else ()))), copy=copy)


def gated(hf: str, gate: str = "gate_proj", up: str = "up_proj") -> Rule:
    """gate_proj over up_proj, or what an architecture calls them."""
    return Rule(hf, lambda shape: Split(("gate", "up")), (("gate", gate), ("up", up)))


def qkv(hf: str) -> Rule:
    """q_proj, k_proj and v_proj, interleaved by query group; q_proj with the gates of queries, if they have any."""
    return Rule(hf, lambda shape: QKV(shape.heads // shape.groups, shape.head_dim, shape.output_gate))


def fused_qkv(hf: str) -> Rule:
    """All queries over all keys over all values."""

    def layout(shape: ModelShape) -> Layout:
        heads = (shape.heads, shape.groups, shape.groups)
        return Fused(QKV(shape.heads // shape.groups, shape.head_dim), tuple(n * shape.head_dim for n in heads))

    return Rule(hf, layout)


def fused_gate_up(hf: str) -> Rule:
    """Gate over up in one tensor."""
    return Rule(hf, lambda shape: Fused(Split(("gate", "up")), (shape.ffn, shape.ffn)))


def one_more(hf: str) -> Rule:
    """A norm that HF has plain and Megatron zero-centred; in float32 where the original has it so."""
    return Rule(hf, lambda shape: OneMore(), as_stored=True)
