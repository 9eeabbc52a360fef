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
    "decoder.layers.{l}.mlp.linear_fc1.weight":             gated("model.layers.{l}.mlp.{part}_proj.weight"),
    "decoder.layers.{l}.mlp.linear_fc2.weight":             same("model.layers.{l}.mlp.down_proj.weight"),
}
# fmt: on
