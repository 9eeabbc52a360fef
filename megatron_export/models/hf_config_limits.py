"""What the values of config.json's keys may be: it may come from anybody, and a wrong number must not become a wrong loop."""

from collections.abc import Mapping

from ..common.safe_files import shown

MOST_LAYERS = 1000
_SIZE, _TOKENS, _NUMBER = 1 << 24, 1 << 40, 1e30  # the most that a size, a count of tokens or another number may be

# Whole numbers: the least and the most that they may be.
_WHOLE: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("num_hidden_layers",), (1, MOST_LAYERS)),
    **dict.fromkeys(("num_nextn_predict_layers", "first_k_dense_replace"), (0, MOST_LAYERS)),
    **dict.fromkeys(("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"), (1, _SIZE)),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "moe_intermediate_size", "intermediate_size_mlp"), (1, _SIZE)),
    **dict.fromkeys(("decoder_sparse_step", "interleave_moe_layer_step", "no_rope_layer_interval"), (1, _SIZE)),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts"), (0, _SIZE)),
    **dict.fromkeys(("shared_expert_intermediate_size", "num_experts_per_tok", "n_group", "topk_group"), (0, _SIZE)),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), (0, _SIZE)),
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
_ROPE_ABOVE_0 = (
    *("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
    *("attention_factor", "rope_theta"),
)
_ROPE_FROM_0 = ("mscale", "mscale_all_dim")
_LAYERS = ("mlp_only_layers", "moe_layers")  # which they are, by number


def wrong_values(config: dict, spelled: Mapping[str, str]) -> list[str]:
    """What is wrong with the values of a language model's settings that are there, and not null, as sentences; they call a key as
    `spelled` does.
    """
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
    if type(value) is not int or value < least:  # True and False are none either
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
    if (
        not isinstance(value, list)
        or len(value) > layers
        or any(type(n) is not int or not 0 <= n < layers for n in value)
    ):
        return f"{key} is {shown(value)}, not a list of layers below num_hidden_layers {layers}"
    return None


def _wrong_lists(there: dict, layers: int) -> list[str]:
    """Of lists that say something of every layer."""
    problems = []
    if there.get("no_rope_layers", []) != []:
        uses = there["no_rope_layers"]
        if not isinstance(uses, list) or any(type(use) not in (int, bool) or use not in (0, 1) for use in uses):
            problems.append(f"no_rope_layers is {shown(uses)}, not a list of 0 and 1")
        elif len(uses) != layers:
            problems.append(f"no_rope_layers names {len(uses)} layers, num_hidden_layers is {layers}")
    kinds = there.get("layer_types", [""] * layers)
    if not isinstance(kinds, list) or len(kinds) != layers or not all(isinstance(kind, str) for kind in kinds):
        problems.append(f"layer_types is {shown(kinds)}, not a kind for each of num_hidden_layers {layers}")
    if there.get("first_k_dense_replace", 0) > layers:
        problems.append(
            f"first_k_dense_replace {there['first_k_dense_replace']} is more than num_hidden_layers {layers}"
        )
    return problems


def _wrong_rope(there: dict) -> list[str | None]:
    problems = []
    for key in ("rope_parameters", "rope_scaling"):
        rope = there.get(key, {})
        if not isinstance(rope, dict):
            problems.append(f"{key} is {shown(rope)}, not a table of settings")
            continue
        rope = {f"{key}.{name}": value for name, value in rope.items() if value is not None}
        for names, zero in ((_ROPE_ABOVE_0, False), (_ROPE_FROM_0, True)):
            known = [f"{key}.{name}" for name in names if f"{key}.{name}" in rope]
            problems += [_above(name, rope[name], _NUMBER, zero) for name in known]
        if f"{key}.partial_rotary_factor" in rope:
            problems.append(_above(f"{key}.partial_rotary_factor", rope[f"{key}.partial_rotary_factor"], 1))
        if f"{key}.truncate" in rope:
            problems.append(_yes_or_no(f"{key}.truncate", rope[f"{key}.truncate"]))
        problems += [
            f"{key}.{name} is {shown(rope[f'{key}.{name}'])}, not a name"
            for name in ("rope_type", "type")
            if not isinstance(rope.get(f"{key}.{name}", ""), str)
        ]
    return problems
