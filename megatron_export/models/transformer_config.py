"""The Megatron settings that an HF config.json implies: how a model of these sizes computes."""

from collections.abc import Callable
from dataclasses import dataclass, field

from ..common.errors import ExportError
from ..common.safe_files import shown
from .hf_config import architecture_of, shape_of, text_of
from .layer_kinds import Kind
from .registry import known
from .shape import ModelShape

_YARN = ("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

# Settings that are a number, or a list of 0 and 1 for all layers: what the number means for a layer, counted from 0.
_EACH_LAYER: dict[str, Callable[[int, int], bool]] = {
    "moe_layer_freq": lambda layer, every: layer % every == 0,
    "linear_attention_freq": lambda layer, every: (layer + 1) % every != 0,
    "window_attn_skip_freq": lambda layer, every: (layer + 1) % every != 0,
    "no_rope_freq": lambda layer, every: (layer + 1) % every == 0,
}


def each_layer(name: str, value: object, layers: int) -> object:
    """A setting, as a list for all layers where it may be a number or a list, and is a number."""
    if name not in _EACH_LAYER or type(value) is not int or value < 1:
        return value
    return [int(_EACH_LAYER[name](layer, value)) for layer in range(layers)]


def settings_of(config: dict) -> dict:
    """The fields of Megatron's `TransformerConfig` that config.json decides and that change what a model computes."""
    architecture = architecture_of(config)
    shape, config = shape_of(config), text_of(config)
    return {
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_query_groups": shape.groups,
        "kv_channels": shape.head_dim,
        "ffn_hidden_size": shape.ffn,
        "layernorm_epsilon": config["rms_norm_eps"],
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": "silu",
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        **(_expert_settings(config, shape) if shape.experts else {}),
        **(_latent_settings(config, shape) if shape.kv_lora else {}),
        **({"mtp_num_layers": len(shape.having(Kind.JOIN))} if shape.mtp else {}),
        **architecture.computed(config, shape),
        **architecture.settings,
        **{field: bool(config.get(key)) for key, (field, _) in architecture.where.items()},
    }


def check_computed(config: dict, length: int) -> None:
    """Raise `ExportError` if Megatron-Core computes samples of `length` tokens otherwise than HF: they cannot calibrate."""
    rope_of(config)
    config = text_of(config)
    groups, kept, topk = config.get("n_group") or 1, config.get("topk_group"), config.get("num_experts_per_tok")
    if groups > 1 and topk != 2 * kept:
        raise ExportError(
            f"config.json: {topk} experts of {kept} of {groups} groups: HF ranks groups by their best two experts, Megatron-Core "
            f"by their best {topk / kept:g}, so activations cannot be calibrated"
        )
    if why := architecture_of(config).unlike(config, length):
        raise ExportError(why)


def _expert_settings(config: dict, shape: ModelShape) -> dict:
    group = config.get("n_group") or 1
    return {
        "num_moe_experts": shape.experts,
        "moe_layer_freq": [int(Kind.EXPERTS in shape.kinds[layer]) for layer in range(shape.layers)],
        "moe_ffn_hidden_size": shape.expert_ffn,
        "moe_shared_expert_intermediate_size": shape.shared_ffn or None,
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": not config.get("norm_topk_prob", True),
        "moe_router_num_groups": group if group > 1 else None,
        "moe_router_group_topk": config["topk_group"] if group > 1 else None,
        "moe_router_topk_scaling_factor": config.get("routed_scaling_factor"),
    }


def _latent_settings(config: dict, shape: ModelShape) -> dict:
    """With the settings of rotary embeddings, which Megatron's latent attention makes itself."""
    rope = _rope_of(config)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    yarn = kind == "yarn"
    return {
        "multi_latent_attention": True,
        "q_lora_rank": shape.q_lora or None,
        "kv_lora_rank": shape.kv_lora,
        "qk_head_dim": shape.nope_dim,
        "qk_pos_emb_head_dim": shape.rope_dim,
        "v_head_dim": shape.v_dim,
        "rope_type": "yarn" if yarn else "rope",
        "rotary_base": rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
        "rotary_scaling_factor": _factor(rope) if yarn else 1,
        **({name: rope[name] for name in _YARN if name in rope} if yarn else {}),
    }


def unscaled_rope_settings(config: dict) -> dict:
    """Arguments of Megatron's `GPTModel` for rotary embeddings, without their scaling."""
    architecture = known(config)
    if architecture is not None and not architecture.rotated:
        return {"position_embedding_type": "none"}
    width, config = shape_of(config).head_dim if text_of(config).get("rotary_dim") else 1, text_of(config)
    if config.get("kv_lora_rank"):
        return {"position_embedding_type": "rope"}
    theta = _rope_of(config).get("rope_theta") or config.get("rope_theta") or 10000.0
    part = _rope_of(config).get("partial_rotary_factor") or config.get("partial_rotary_factor") or 0
    part = part or (config.get("rotary_dim") or width) / width  # MiniMax says how many numbers of a head are rotated
    return {"position_embedding_type": "rope", "rotary_base": theta, **({"rotary_percent": part} if part != 1 else {})}


def _rope_of(config: dict) -> dict:
    """Of two kinds of layers that rotate otherwise, those that see all."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return found.get("full_attention") or found


def _factor(rope: dict) -> float:
    if rope.get("factor") is None:
        raise ExportError(
            f"config.json: rope scaling {shown(rope)} lacks factor. Give the config.json of these weights"
        )
    return rope["factor"]


@dataclass(frozen=True)
class Rope:
    """How positions are rotated.

    arguments  of Megatron's `GPTModel`
    llama3     numbers of the Llama 3 scaling, which are constants in Megatron's `RotaryEmbedding`; empty for another
    yarn       attributes of Megatron's `TransformerConfig`; empty for another scaling
    """

    arguments: dict
    llama3: dict = field(default_factory=dict)
    yarn: dict = field(default_factory=dict)


def rope_of(config: dict) -> Rope:
    """Rotary embeddings, however config.json spells them; `ExportError` for a scaling that Megatron-Core cannot compute."""
    arguments, config = unscaled_rope_settings(config), text_of(config)
    if arguments["position_embedding_type"] == "none":
        return Rope(arguments)
    rope = _rope_of(config)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    latent = bool(config.get("kv_lora_rank"))
    if kind == "default" or (kind == "yarn" and latent):
        return Rope(arguments)
    if kind == "linear" and not latent:
        return Rope(arguments | {"seq_len_interpolation_factor": _factor(rope)})
    if kind == "llama3" and not latent and all(name in rope for name in _LLAMA3):
        return Rope(arguments, llama3={name: rope[name] for name in _LLAMA3})
    whole = "rotary_percent" not in arguments  # Megatron's yarn knows no partial rotation
    if kind == "yarn" and whole and rope.get("factor") and rope.get("attention_factor") is None:
        original = rope.get("original_max_position_embeddings") or config.get("max_position_embeddings")
        if original is None:
            lacks = "lacks original_max_position_embeddings, and max_position_embeddings is not there"
            raise ExportError(f"config.json: rope scaling 'yarn' {lacks}")
        return Rope(
            arguments | {"position_embedding_type": "yarn"},
            yarn={
                "yarn_rotary_scaling_factor": rope["factor"],
                "yarn_original_max_position_embeddings": original,
                "yarn_beta_fast": rope.get("beta_fast") or 32.0,
                "yarn_beta_slow": rope.get("beta_slow") or 1.0,
                "yarn_mscale": rope.get("mscale") or None,
                "yarn_mscale_all_dim": rope.get("mscale_all_dim") or None,
                "yarn_correction_range_round_to_int": rope.get("truncate", True),
            },
        )
    raise ExportError(
        f"config.json: Megatron-Core cannot compute rope scaling {shown(rope)}, so activations cannot be calibrated. "
        "It knows no scaling, 'linear', 'yarn', and 'llama3' with its four numbers"
    )


def megatron_llama3(factor: float) -> dict:
    """The rotary scaling that Megatron's `RotaryEmbedding` computes with `rope_scaling`: but for the factor, its constants."""
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
