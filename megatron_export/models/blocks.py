"""The shared parts of the tables: canonical Megatron name -> rule. An architecture is a union of these."""

from dataclasses import replace
from operator import attrgetter

from .rules import Table, as_stored, gated, of_all_heads, qkv, same, vocab

# fmt: off
TOP: Table = {
    "embedding.word_embeddings.weight":                     vocab("model.embed_tokens.weight"),
    "decoder.final_layernorm.weight":                       same("model.norm.weight"),
    "output_layer.weight":                                  vocab("lm_head.weight"),
}
GQA: Table = {
    "decoder.layers.{l}.input_layernorm.weight":            same("model.layers.{l}.input_layernorm.weight"),
    "decoder.layers.{l}.self_attention.linear_qkv.weight":  qkv("model.layers.{l}.self_attn.{part}_proj.weight"),
    "decoder.layers.{l}.self_attention.linear_proj.weight": same("model.layers.{l}.self_attn.o_proj.weight"),
}
QKV_BIAS: Table = {
    "decoder.layers.{l}.self_attention.linear_qkv.bias":    qkv("model.layers.{l}.self_attn.{part}_proj.bias"),
}
QK_NORM: Table = {
    "decoder.layers.{l}.self_attention.q_layernorm.weight": same("model.layers.{l}.self_attn.q_norm.weight"),
    "decoder.layers.{l}.self_attention.k_layernorm.weight": same("model.layers.{l}.self_attn.k_norm.weight"),
}
QK_NORM_OF_ALL_HEADS: Table = {
    "decoder.layers.{l}.self_attention.q_layernorm.weight":
        of_all_heads("model.layers.{l}.self_attn.q_norm.weight", attrgetter("heads")),
    "decoder.layers.{l}.self_attention.k_layernorm.weight":
        of_all_heads("model.layers.{l}.self_attn.k_norm.weight", attrgetter("groups")),
}
MLA: Table = {
    "decoder.layers.{l}.input_layernorm.weight":                    same("model.layers.{l}.input_layernorm.weight"),
    "decoder.layers.{l}.self_attention.linear_q_proj.weight":       same("model.layers.{l}.self_attn.q_proj.weight"),
    "decoder.layers.{l}.self_attention.linear_q_down_proj.weight":  same("model.layers.{l}.self_attn.q_a_proj.weight"),
    "decoder.layers.{l}.self_attention.q_layernorm.weight":         same("model.layers.{l}.self_attn.q_a_layernorm.weight"),
    "decoder.layers.{l}.self_attention.linear_q_up_proj.weight":    same("model.layers.{l}.self_attn.q_b_proj.weight"),
    "decoder.layers.{l}.self_attention.linear_kv_down_proj.weight":
        same("model.layers.{l}.self_attn.kv_a_proj_with_mqa.weight"),
    "decoder.layers.{l}.self_attention.kv_layernorm.weight":        same("model.layers.{l}.self_attn.kv_a_layernorm.weight"),
    "decoder.layers.{l}.self_attention.linear_kv_up_proj.weight":   same("model.layers.{l}.self_attn.kv_b_proj.weight"),
    "decoder.layers.{l}.self_attention.linear_proj.weight":         same("model.layers.{l}.self_attn.o_proj.weight"),
}
INDEXER: Table = {
    "decoder.layers.{l}.self_attention.core_attention.indexer.linear_wq_b.weight":
        same("model.layers.{l}.self_attn.indexer.wq_b.weight"),
    "decoder.layers.{l}.self_attention.core_attention.indexer.linear_wk.weight":
        same("model.layers.{l}.self_attn.indexer.wk.weight"),
    "decoder.layers.{l}.self_attention.core_attention.indexer.k_norm.weight":
        as_stored("model.layers.{l}.self_attn.indexer.k_norm.weight"),
    "decoder.layers.{l}.self_attention.core_attention.indexer.k_norm.bias":
        as_stored("model.layers.{l}.self_attn.indexer.k_norm.bias"),
    "decoder.layers.{l}.self_attention.core_attention.indexer.linear_weights_proj.weight":
        as_stored("model.layers.{l}.self_attn.indexer.weights_proj.weight"),
}
BIASES: Table = {
    "decoder.layers.{l}.self_attention.linear_proj.bias":   same("model.layers.{l}.self_attn.o_proj.bias"),
    "decoder.layers.{l}.self_attention.core_attention.softmax_offset": same("model.layers.{l}.self_attn.sinks"),
    "decoder.layers.{l}.mlp.router.bias":                   same("model.layers.{l}.mlp.router.bias"),
    "decoder.layers.{l}.mlp.experts.{e}.linear_fc1.bias":   gated("model.layers.{l}.mlp.experts.{e}.{part}.bias"),
    "decoder.layers.{l}.mlp.experts.{e}.linear_fc2.bias":   same("model.layers.{l}.mlp.experts.{e}.down_proj.bias"),
}
EXPERT_BIAS: Table = {
    "decoder.layers.{l}.mlp.router.expert_bias":            same("model.layers.{l}.mlp.gate.e_score_correction_bias"),
}
MTP: Table = {  # also copies of the embedding and the output layer, which Megatron's share
    "embedding.word_embeddings.weight":
        vocab("model.embed_tokens.weight", copy="model.layers.{l}.embed_tokens.weight"),
    "output_layer.weight":
        vocab("lm_head.weight", copy="model.layers.{l}.shared_head.head.weight"),
    "decoder.layers.{l}.enorm.weight":                      same("model.layers.{l}.enorm.weight"),
    "decoder.layers.{l}.hnorm.weight":                      same("model.layers.{l}.hnorm.weight"),
    "decoder.layers.{l}.eh_proj.weight":                    same("model.layers.{l}.eh_proj.weight"),
    "decoder.layers.{l}.final_layernorm.weight":            same("model.layers.{l}.shared_head.norm.weight"),
}


def dense(block: str) -> Table:
    """The MLP at `model.layers.{l}.<block>`."""
    prefix = f"model.layers.{{l}}.{block}"
    return {
        "decoder.layers.{l}.pre_mlp_layernorm.weight":          same("model.layers.{l}.post_attention_layernorm.weight"),
        "decoder.layers.{l}.mlp.linear_fc1.weight":             gated(f"{prefix}.{{part}}.weight"),
        "decoder.layers.{l}.mlp.linear_fc2.weight":             same(f"{prefix}.down_proj.weight"),
    }


def moe(block: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj", router: str = "gate") -> Table:
    """Router and routed experts below `model.layers.{l}.<block>`, whose linears have these names."""
    prefix = f"model.layers.{{l}}.{block}"
    return {
        "decoder.layers.{l}.pre_mlp_layernorm.weight":          same("model.layers.{l}.post_attention_layernorm.weight"),
        "decoder.layers.{l}.mlp.router.weight":                 same(f"{prefix}.{router}.weight"),
        "decoder.layers.{l}.mlp.experts.{e}.linear_fc1.weight": gated(f"{prefix}.experts.{{e}}.{{part}}.weight", gate, up),
        "decoder.layers.{l}.mlp.experts.{e}.linear_fc2.weight": same(f"{prefix}.experts.{{e}}.{down}.weight"),
    }


def shared_experts(block: str) -> Table:
    """The shared expert, which every token passes, at `model.layers.{l}.<block>`."""
    prefix = f"model.layers.{{l}}.{block}"
    return {
        "decoder.layers.{l}.mlp.shared_experts.linear_fc1.weight": gated(f"{prefix}.{{part}}.weight"),
        "decoder.layers.{l}.mlp.shared_experts.linear_fc2.weight": same(f"{prefix}.down_proj.weight"),
    }
# fmt: on


def stacked(block: str, table: Table, woven: bool = False) -> Table:
    """The same table if HF keeps the experts of a layer in `experts.gate_up_proj` and `experts.down_proj` below `block`, and
    biases beside them; `woven`: rows of gate and up take turns.
    """
    made = dict(table)
    for linear, name in (("linear_fc1", "gate_up_proj"), ("linear_fc2", "down_proj")):
        for leaf, tail in (("weight", ""), ("bias", "_bias")):
            key, stack = f"decoder.layers.{{l}}.mlp.experts.{{e}}.{linear}.{leaf}", f"experts.{name}{tail}"
            if key in table:
                made[key] = replace(table[key], stack=f"model.layers.{{l}}.{block}.{stack}", woven=woven)
    return made


def zero_centred(table: Table) -> Table:
    """The same table if all norms multiply by 1 more than their weights say; TransformerConfig calls it
    `layernorm_zero_centered_gamma`.
    """
    return {name: replace(rule, zero_centred="norm" in name) for name, rule in table.items()}


def renamed(old: str, new: str, table: Table) -> Table:
    """The same table where HF names that begin with `old` begin with `new`."""
    return {
        name: replace(rule, hf=new + rule.hf.removeprefix(old)) if rule.hf.startswith(old) else rule
        for name, rule in table.items()
    }


def below(prefix: str, table: Table) -> Table:
    """The same table for a model inside another one, where HF names begin with `prefix`."""

    def inside(name: str | None) -> str | None:
        return name and prefix + name

    return {
        name: replace(rule, hf=prefix + rule.hf, stack=inside(rule.stack), copy=inside(rule.copy))
        for name, rule in table.items()
    }


def within(part: str, table: Table) -> Table:
    """The same table for a model that is the `part` of another one; the output layer is beside it."""

    def inside(name: str | None) -> str | None:
        return f"model.{part}.{name.removeprefix('model.')}" if name and name.startswith("model.") else name

    return {name: replace(rule, hf=inside(rule.hf), stack=inside(rule.stack)) for name, rule in table.items()}
