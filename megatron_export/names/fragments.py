"""The shared parts of the tables: canonical Megatron name -> rule. An architecture is a union of these."""

from .rules import Rule, gated, qkv, same, vocab

Table = dict[str, Rule]

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
DENSE: Table = {
    "decoder.layers.{l}.pre_mlp_layernorm.weight":          same("model.layers.{l}.post_attention_layernorm.weight"),
    "decoder.layers.{l}.mlp.linear_fc1.weight":             gated("model.layers.{l}.mlp.{part}.weight"),
    "decoder.layers.{l}.mlp.linear_fc2.weight":             same("model.layers.{l}.mlp.down_proj.weight"),
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
SHARED_EXPERTS: Table = {
    "decoder.layers.{l}.mlp.shared_experts.linear_fc1.weight":
        gated("model.layers.{l}.mlp.shared_experts.{part}.weight"),
    "decoder.layers.{l}.mlp.shared_experts.linear_fc2.weight":
        same("model.layers.{l}.mlp.shared_experts.down_proj.weight"),
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


def moe(block: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> Table:
    """Router and routed experts below `model.layers.{l}.<block>`, whose linears have these names."""
    prefix = f"model.layers.{{l}}.{block}"
    return {
        "decoder.layers.{l}.pre_mlp_layernorm.weight":          same("model.layers.{l}.post_attention_layernorm.weight"),
        "decoder.layers.{l}.mlp.router.weight":                 same(f"{prefix}.gate.weight"),
        "decoder.layers.{l}.mlp.experts.{e}.linear_fc1.weight": gated(f"{prefix}.experts.{{e}}.{{part}}.weight", gate, up),
        "decoder.layers.{l}.mlp.experts.{e}.linear_fc2.weight": same(f"{prefix}.experts.{{e}}.{down}.weight"),
    }
# fmt: on
