"""Settings of Megatron as files state them, made sure of: each of its kind, all that is needed there, lists in place of numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from ..common.errors import report
from ..common.safe_files import shown
from .hf_config_limits import MOST_LAYERS
from .layer_kinds import LETTERS, Kind
from .stated_settings import decoder_of
from .transformer_config import each_layer

# Setting -> key of config.json with the same value, in the words of a Llama.
KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "ffn_hidden_size": "intermediate_size",
    "layernorm_epsilon": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "share_embeddings_and_output_weights": "tie_word_embeddings",
}
_SIZE, _TOKENS = 1 << 24, 1 << 40
_WHOLE = {
    **dict.fromkeys(("num_layers",), MOST_LAYERS),
    **dict.fromkeys(
        ("hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size"), _SIZE
    ),
    **dict.fromkeys(("vocab_size", "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim"), _SIZE),
    **dict.fromkeys(("v_head_dim", "num_moe_experts", "moe_ffn_hidden_size", "moe_router_topk"), _SIZE),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "moe_router_num_groups", "moe_router_group_topk"), _SIZE),
    **dict.fromkeys(("moe_latent_size", "mamba_num_heads", "mamba_head_dim", "mamba_num_groups"), _SIZE),
    **dict.fromkeys(
        ("mamba_state_dim", "linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim"), _SIZE
    ),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "dsa_indexer_n_heads"), _SIZE),
    **dict.fromkeys(("dsa_indexer_head_dim", "dsa_indexer_topk", "dsa_indexer_topk_freq"), _SIZE),
    **dict.fromkeys(("dsa_indexer_skip_topk_offset",), MOST_LAYERS),
    **dict.fromkeys(("mtp_num_layers",), MOST_LAYERS),
    **dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings"), _TOKENS),
    **dict.fromkeys(("yarn_original_max_position_embeddings",), _TOKENS),
}
_NUMBERS = (
    *("layernorm_epsilon", "rotary_base", "rotary_percent", "rotary_scaling_factor", "rope_scaling_factor"),
    *("seq_len_interpolation_factor", "moe_router_topk_scaling_factor", "activation_func_clamp_value", "softmax_scale"),
    *("glu_linear_offset", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "yarn_rotary_scaling_factor"),
    *("yarn_beta_fast", "yarn_beta_slow", "yarn_mscale", "yarn_mscale_all_dim"),
)
_YES_OR_NO = (
    *("share_embeddings_and_output_weights", "multi_latent_attention", "gated_linear_unit", "add_bias_linear"),
    *("add_qkv_bias", "qk_layernorm", "qk_l2_norm", "rope_scaling", "moe_router_pre_softmax", "rotary_interleaved"),
    *("moe_router_enable_expert_bias", "moe_shared_expert_gate", "attention_output_gate", "moe_apply_probs_on_input"),
    *("layernorm_zero_centered_gamma", "yarn_correction_range_round_to_int", "dsa_indexer_rope_interleaved"),
)
_FLAGS = ("moe_layer_freq", "linear_attention_freq", "window_attn_skip_freq", "no_rope_freq")
_WORDS = (
    *("normalization", "activation_func", "position_embedding_type", "rope_type", "softmax_type"),
    *(
        "experimental_attention_variant",
        "moe_router_score_function",
        "hybrid_layer_pattern",
        "mtp_hybrid_override_pattern",
    ),
)
_DISTRUST = ". Do not trust this checkpoint, or give "
_MOST_LETTERS = 4 * MOST_LAYERS
# Without these no config.json is derived: setting -> what the user gives in its place.
_NEEDED = {
    **{name: KEYS[name] for name in ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size")},
    **{name: KEYS[name] for name in ("layernorm_epsilon", "max_position_embeddings", "vocab_size")},
    **{"share_embeddings_and_output_weights": "tie_word_embeddings", "rotary_base": "rope_theta"},
}


@dataclass(frozen=True)
class Stated:
    """Settings of Megatron, as a file states them.

    where     what says so, as a sentence begins
    settings  by the names of `TransformerConfig`, as they were saved: any value may be anything
    provider  the class that made the model, "" if that is not said
    hf_model  the HF model that it was made of, "" if that is not said
    """

    where: str
    settings: Mapping[str, Any]
    provider: str = ""
    hf_model: str = ""

    @property
    def way_out(self) -> str:
        """The flag that says all; with the HF model that a file names, which only the user can know to be the right one."""
        return f"--hf-model (it was made of {shown(self.hf_model)})" if self.hf_model else "--hf-model"


def settled(stated: Stated, values: Mapping[str, Any]) -> dict[str, Any]:
    """All settings that are read here, each there and of its kind; lists for all layers in place of numbers. `ExportError` lists
    those that are of another kind, and those that are needed and not said.
    """
    said = {
        name: stated.settings.get(name) for name in (*_WHOLE, *_NUMBERS, *_YES_OR_NO, *_FLAGS, *_WORDS, "window_size")
    }
    given = {setting: values[key] for setting, key in _NEEDED.items() if key in values}
    own = {name: value for name, value in said.items() if name not in given}
    report([f"{stated.where} say {problem}{_DISTRUST}{stated.way_out}" for problem in _wrong(own)])
    report([f"--config-value {_NEEDED[problem.partition(' ')[0]]}: {problem}" for problem in _wrong(given)])
    said |= given
    said |= in_halves(said["hybrid_layer_pattern"])
    hybrid = said["hybrid_layer_pattern"]
    lacking = {
        setting: key
        for setting, key in _NEEDED.items()
        if said[setting] is None and not (setting == "rotary_base" and hybrid)
    }
    report(
        [
            f"{stated.where} do not say {setting}: give it with --config-value {key}=VALUE, or give {stated.way_out}"
            for setting, key in lacking.items()
        ]
    )
    said["num_query_groups"] = said["num_query_groups"] or said["num_attention_heads"]
    said["kv_channels"] = said["kv_channels"] or said["hidden_size"] // said["num_attention_heads"]
    said["moe_ffn_hidden_size"] = said["moe_ffn_hidden_size"] or said["ffn_hidden_size"]
    said["rotary_percent"] = 1.0 if said["rotary_percent"] is None else said["rotary_percent"]
    said["moe_layer_freq"] = said["moe_layer_freq"] or 1
    said |= {name: _in_layers(name, said[name], said["num_layers"]) for name in _FLAGS}
    wrong = [name for name in _FLAGS if said[name] is not None and len(said[name]) != said["num_layers"] and not hybrid]
    report(
        [
            f"{stated.where} say {name} for {len(said[name])} layers, of {said['num_layers']}{_DISTRUST}{stated.way_out}"
            for name in wrong
        ]
    )
    return said


def _in_layers(name: str, value: object, layers: int) -> list[int] | None:
    found = each_layer(name, value, layers)
    return [int(one) for one in found] if isinstance(found, list | tuple) else None


def in_halves(pattern: str | None) -> dict[str, Any]:
    """What a pattern of blocks says that makes of an attention and an MLP, or experts, the layer that other models have; {} for any
    other pattern.
    """
    blocks = decoder_of(pattern or "")
    mixers, rest = blocks[::2], blocks[1::2]
    attention, linear, dense, experts = (
        LETTERS[kind] for kind in (Kind.ATTENTION, Kind.LINEAR, Kind.MLP, Kind.EXPERTS)
    )
    if not blocks or len(blocks) % 2 or not {*mixers} <= {attention, linear} or not {*rest} <= {dense, experts}:
        return {}
    return {
        "hybrid_layer_pattern": None,
        "num_layers": len(mixers),
        "moe_layer_freq": [int(letter == experts) for letter in rest],
        "linear_attention_freq": [int(letter == linear) for letter in mixers] if linear in mixers else None,
    }


def _wrong(said: Mapping[str, Any]) -> list[str]:
    """What is wrong with the values of settings that are there, as the end of a sentence."""
    there = {name: value for name, value in said.items() if value is not None}
    problems = [
        f"{name} = {shown(there[name])}, not a whole number of at least {least} and up to {most:,}"
        for name, most in _WHOLE.items()
        for least in [int(name in _NEEDED)]
        if name in there and not (type(there[name]) is int and least <= there[name] <= most)
    ]
    problems += [
        f"{name} = {shown(there[name])}, not a number of at least 0 and up to 1e30"
        for name in _NUMBERS
        if name in there
        and not (type(there[name]) in (int, float) and isfinite(there[name]) and 0 <= there[name] <= 1e30)
    ]
    problems += [
        f"{name} = {shown(there[name])}, not true or false"
        for name in _YES_OR_NO
        if type(there.get(name, True)) is not bool
    ]
    problems += [
        f"{name} = {shown(there[name])}, not a number or a list of 0 and 1"
        for name in _FLAGS
        if not _is_flags(there.get(name))
    ]
    problems += [
        f"{name} = {shown(there[name])}, not a word"
        for name in _WORDS
        if not (isinstance(there.get(name, ""), str) and len(there.get(name, "")) <= _MOST_LETTERS)
    ]
    if (window := there.get("window_size")) is not None:
        pair = isinstance(window, tuple | list) and len(window) == 2 and all(type(one) is int for one in window)
        if not pair or not 0 <= window[0] < _TOKENS or window[1] != 0:
            problems.append(f"window_size = {shown(window)}, not how many tokens before are seen, and 0")
    return problems


def _is_flags(value: object) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= MOST_LAYERS and all(type(one) in (int, bool) and one in (0, 1) for one in value)
    return value is None or (type(value) is int and 0 < value <= MOST_LAYERS)
