"""Settings of Megatron as somebody else stated them, beside those that a config.json means: where they are of two models."""

from typing import Any

from .hf_config import shape_of
from .layer_kinds import Kind
from .transformer_config import each_layer, settings_of, unscaled_rope_settings

_COMPARED = (
    *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size"),
    *("layernorm_epsilon", "normalization", "gated_linear_unit", "add_bias_linear", "add_qkv_bias", "qk_layernorm"),
    *("rotary_base", "rotary_percent", "share_embeddings_and_output_weights", "multi_latent_attention"),
    *("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "mtp_num_layers"),
    *("num_moe_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_layer_freq"),
    *("moe_router_topk", "moe_router_score_function", "moe_router_pre_softmax", "moe_router_enable_expert_bias"),
    *("attention_output_gate", "layernorm_zero_centered_gamma", "linear_attention_freq", "linear_conv_kernel_dim"),
    *("hybrid_layer_pattern", "mamba_num_heads", "mamba_head_dim", "mamba_num_groups", "mamba_state_dim"),
    *("moe_latent_size", "linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads"),
    *("linear_num_value_heads", "moe_router_num_groups", "moe_router_group_topk", "moe_router_topk_scaling_factor"),
)
# Compared too where nothing else says which model it is: versions of Megatron spell some of them in their own ways.
_DECIDING = (
    *("activation_func", "activation_func_clamp_value", "glu_linear_offset", "softmax_type", "softmax_scale"),
    *("window_size", "window_attn_skip_freq", "position_embedding_type", "rotary_interleaved", "no_rope_freq"),
    *("qk_l2_norm", "experimental_attention_variant", "moe_shared_expert_gate", "moe_apply_probs_on_input"),
    *("dsa_indexer_n_heads", "dsa_indexer_head_dim", "dsa_indexer_topk"),
)
# If they are None, Megatron derives them from others.
_DERIVED = ("kv_channels", "ffn_hidden_size", "moe_ffn_hidden_size", "num_query_groups", "softmax_scale")
_PLAIN = {  # of a model whose config.json decides nothing about them
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "attention_output_gate": False,
    "layernorm_zero_centered_gamma": False,
    "rotary_percent": 1.0,
    "multi_latent_attention": False,
    "num_moe_experts": None,
    "mtp_num_layers": None,
}
_PLAIN_TOO = {  # as versions of Megatron compute that do not know them
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "softmax_type": "vanilla",
    "softmax_scale": None,
    "window_size": None,
    "rotary_interleaved": False,
    "no_rope_freq": None,
    "qk_l2_norm": False,
    "experimental_attention_variant": None,
    "moe_shared_expert_gate": False,
    "moe_apply_probs_on_input": False,
    "moe_router_enable_expert_bias": False,
    "hybrid_layer_pattern": None,
}
_NONE_IF_1 = ("moe_router_topk_scaling_factor", "moe_router_num_groups", "moe_router_group_topk")
_NONE_IF_0 = ("mtp_num_layers", "moe_shared_expert_intermediate_size", "moe_latent_size")


def differences(
    said: dict[str, Any], config: dict, *, mtp_dropped: bool = False, alone: bool = False
) -> list[tuple[str, object, object]]:
    """The name of each setting that is another one than config.json's dict means, what is said, and what is meant.

    What is not said is not compared. With `alone`, nothing but the settings says which model it is: all that decide that are
    compared, and what is not said is as Megatron computes without.
    """
    said = _PLAIN | _PLAIN_TOO | said if alone else said
    meant, found = _meant(config, alone), []
    hybrid = said.get("hybrid_layer_pattern") or said.get("hybrid_override_pattern")  # whose layers are halves
    for name in _COMPARED + (_DECIDING if alone else ()):
        if name not in said or name not in meant or (said[name] is None and name in _DERIVED):
            continue
        if (mtp_dropped and name == "mtp_num_layers") or (hybrid and name in ("num_layers", "moe_layer_freq")):
            continue
        has = said[name]
        if name == "hybrid_layer_pattern" and isinstance(hybrid, str):
            has = decoder_of(hybrid)
        if _spelled(name, has, meant["num_layers"]) != _spelled(name, meant[name], meant["num_layers"]):
            found.append((name, has, meant[name]))
    return found


def decoder_of(pattern: str) -> str:
    """The blocks of the decoder in a pattern of Megatron's: without the marks of stages, and what predicts one more token."""
    return pattern.partition("/")[0].replace("|", "")


def _meant(config: dict, alone: bool) -> dict[str, Any]:
    """The values that config.json means, without those that have no effect in its model."""
    shape = shape_of(config)
    meant = _PLAIN | (_PLAIN_TOO if alone else {}) | settings_of(config) | unscaled_rope_settings(config)
    meant["share_embeddings_and_output_weights"] = shape.tied
    without = set()
    if shape.kv_lora:
        without |= {"kv_channels", "num_query_groups", "rotary_percent", "rotary_interleaved"}
    if meant["add_bias_linear"]:  # which gives q, k and v theirs
        without.add("add_qkv_bias")
    if "qk_l2_norm" in settings_of(config):  # norms without weights, which have a setting of their own
        without.add("qk_layernorm")
    if not shape.having(Kind.MLP):
        without.add("ffn_hidden_size")
    if meant.get("moe_router_score_function") == "sigmoid":
        without.add("moe_router_pre_softmax")
    if not shape.experts:
        without |= {"moe_shared_expert_gate", "moe_apply_probs_on_input", "moe_router_enable_expert_bias"}
    if not meant.get("window_size"):
        without.add("window_attn_skip_freq")
    return {name: value for name, value in meant.items() if name not in without}


def _spelled(name: str, value: object, layers: int) -> object:
    """A value, in the same spelling for all values that mean the same."""
    if (name in _NONE_IF_1 and value == 1) or (name in _NONE_IF_0 and value == 0):
        return None
    if name == "position_embedding_type" and value == "yarn":  # how rotations are scaled is not compared
        return "rope"
    if name == "experimental_attention_variant" and value == "gdn":
        return "gated_delta_net"
    if name == "window_size" and isinstance(value, list):
        return tuple(value)
    return each_layer(name, value, layers)
