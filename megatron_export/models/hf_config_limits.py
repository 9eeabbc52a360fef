"""Which values config.json's keys may have: anybody may have written it, and a wrong number must not become an endless loop."""

from collections.abc import Mapping

from ..common.safe_files import shown

MOST_LAYERS = 1000
_SIZE, _TOKENS, _NUMBER = 1 << 24, 1 << 40, 1e30  # the largest size, count of tokens, and other number

# Whole numbers: the least and the most that they may be.
_WHOLE: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("num_hidden_layers",), (1, MOST_LAYERS)),
    **dict.fromkeys(("num_nextn_predict_layers", "first_k_dense_replace"), (0, MOST_LAYERS)),
    **dict.fromkeys(("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"), (1, _SIZE)),
    **dict.fromkeys(("draft_vocab_size", "rotary_dim"), (1, _SIZE)),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "moe_intermediate_size", "intermediate_size_mlp"), (1, _SIZE)),
    **dict.fromkeys(("decoder_sparse_step", "interleave_moe_layer_step", "no_rope_layer_interval"), (1, _SIZE)),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts"), (0, _SIZE)),
    **dict.fromkeys(("shared_expert_intermediate_size", "num_experts_per_tok", "n_group", "topk_group"), (0, _SIZE)),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), (0, _SIZE)),
    **dict.fromkeys(("index_n_heads", "index_head_dim", "index_skip_topk_offset"), (0, _SIZE)),
    **dict.fromkeys(("index_topk", "index_topk_freq"), (1, _TOKENS)),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim"), (1, _SIZE)),
    **dict.fromkeys(("linear_value_head_dim", "linear_conv_kernel_dim", "full_attention_interval"), (1, _SIZE)),
    **dict.fromkeys(("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel"), (1, _SIZE)),
    **dict.fromkeys(("moe_latent_size", "moe_shared_expert_intermediate_size"), (0, _SIZE)),
    **dict.fromkeys(("attention_chunk_size", "floor_scale", "max_position_embeddings"), (1, _TOKENS)),
    "sliding_window": (0, _TOKENS),
}
# Numbers above 0, up to these.
_ABOVE_0: dict[str, float] = {
    "rms_norm_eps": 1,
    "partial_rotary_factor": 1,
    "rope_theta": _NUMBER,
    "routed_scaling_factor": _NUMBER,
    "swiglu_limit": _NUMBER,
}
_YES_OR_NO = ("tie_word_embeddings", "attention_bias", "use_qk_norm", "norm_topk_prob", "attn_temperature_tuning")
# Of rotary embeddings: the most that a number may be, and whether it may be 0.
_ROPE: dict[str, tuple[float, bool]] = {
    **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor", "attention_factor"), (_NUMBER, False)),
    **dict.fromkeys(("original_max_position_embeddings", "beta_fast", "beta_slow", "rope_theta"), (_NUMBER, False)),
    **dict.fromkeys(("mscale", "mscale_all_dim"), (_NUMBER, True)),
    "partial_rotary_factor": (1, False),
}
_LAYERS = ("mlp_only_layers", "moe_layers")  # lists of layers, by number


def wrong_values(config: dict, spelled: Mapping[str, str]) -> list[str]:
    """What is wrong with the values of a language model's settings, a sentence each; `spelled`: key -> its word in config.json."""
    there = {key: value for key, value in config.items() if value is not None}
    named = {key: spelled.get(key, key) for key in there}
    problems = [_whole(named[key], there[key], *ends) for key, ends in _WHOLE.items() if key in there]
    problems += [_above(named[key], there[key], most) for key, most in _ABOVE_0.items() if key in there]
    problems += [_yes_or_no(named[key], there[key]) for key in _YES_OR_NO if key in there]
    problems += _wrong_rope(there)
    if not any(problems):  # then the number of layers is known
        problems += [_numbers(named[key], there[key], there["num_hidden_layers"]) for key in _LAYERS if key in there]
        problems += _wrong_lists(there, there["num_hidden_layers"])
    return [f"config.json: {problem}" for problem in problems if problem]


def _whole(key: str, value: object, least: int, most: int) -> str | None:
    if type(value) is not int or value < least:  # True is an int for isinstance
        return f"{key} is {shown(value)}, not a whole number" + (" above 0" if least else " of at least 0")
    if value > most:
        return f"{key} is {shown(value)}, more than {most:,}. Give the config.json that belongs to these weights"
    return None


def _above(key: str, value: object, most: float, zero: bool = False) -> str | None:
    if type(value) in (int, float) and (0 < value <= most or (zero and value == 0)):
        return None
    return f"{key} is {shown(value)}, not a number {'of at least' if zero else 'above'} 0 and up to {most:g}"


def _yes_or_no(key: str, value: object) -> str | None:
    return None if isinstance(value, (bool, int)) else f"{key} is {shown(value)}, not true or false"


def _numbers(key: str, value: object, layers: int) -> str | None:
    right = isinstance(value, list) and len(value) <= layers and all(type(n) is int and 0 <= n < layers for n in value)
    return None if right else f"{key} is {shown(value)}, not a list of layers below num_hidden_layers {layers}"


def _wrong_lists(there: dict, layers: int) -> list[str]:
    """What is wrong with lists that have an entry for every layer, and with a count of layers."""
    problems = []
    if (uses := there.get("no_rope_layers", [])) != []:
        if not isinstance(uses, list) or any(type(use) not in (int, bool) or use not in (0, 1) for use in uses):
            problems.append(f"no_rope_layers is {shown(uses)}, not a list of 0 and 1")
        elif len(uses) != layers:
            problems.append(f"no_rope_layers names {len(uses)} layers, num_hidden_layers is {layers}")
    kinds = there.get("layer_types", [""] * layers)
    if not isinstance(kinds, list) or len(kinds) != layers or not all(isinstance(kind, str) for kind in kinds):
        problems.append(f"layer_types is {shown(kinds)}, not a kind for each of num_hidden_layers {layers}")
    if (dense := there.get("first_k_dense_replace", 0)) > layers:
        problems.append(f"first_k_dense_replace {dense} is more than num_hidden_layers {layers}")
    return problems


def _wrong_rope(there: dict) -> list[str | None]:
    problems = []
    for key in ("rope_parameters", "rope_scaling"):
        rope = there.get(key, {})
        if not isinstance(rope, dict):
            problems.append(f"{key} is {shown(rope)}, not a table of settings")
            continue
        for name, value in ((name, value) for name, value in rope.items() if value is not None):
            if name in _ROPE:
                problems.append(_above(f"{key}.{name}", value, *_ROPE[name]))
            elif name == "truncate":
                problems.append(_yes_or_no(f"{key}.truncate", value))
            elif name in ("rope_type", "type") and not isinstance(value, str):
                problems.append(f"{key}.{name} is {shown(value)}, not a name")
    return problems
