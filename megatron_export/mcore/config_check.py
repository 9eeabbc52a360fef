"""Where a live model and an HF config.json mean two different computations, though names and shapes agree."""

from torch import nn

from ..models.transformer_config import each_layer
from .model import ACTIVATIONS, Model, blocks_per_layer, chunks_of, layers_of, norms_heads, pattern_of


def contradictions(model: Model, settings: dict, rope: dict) -> list[str]:
    """A sentence for each field in which a model computes something else than config.json says.

    `settings` are fields of its TransformerConfig (dropout is not compared: only training uses it), `rope` its own attributes.
    """
    chunk = chunks_of(model)[0]
    computing = {
        "activation_func_clamp_value": None,
        "attention_output_gate": False,
        "experimental_attention_variant": None,
        "moe_shared_expert_gate": False,
        "glu_linear_offset": 0.0,
        "layernorm_zero_centered_gamma": False,
        "moe_apply_probs_on_input": False,
        "moe_expert_capacity_factor": None,
        "moe_input_jitter_eps": None,
        "moe_router_force_load_balancing": False,
        "no_rope_freq": None,
        "qk_l2_norm": False,
        "rotary_interleaved": False,
        "softmax_type": "vanilla",
        "window_size": None,
    }
    computing |= {name: value for name, value in settings.items() if "dropout" not in name}
    computing["activation_func"] = ACTIVATIONS[settings["activation_func"]]
    computing = {name: value for name, value in computing.items() if name not in _without_effect(settings)}
    found = {name: (getattr(chunk.config, name, None), value) for name, value in computing.items()}
    if "hybrid_layer_pattern" in settings:
        found["hybrid_layer_pattern"] = (pattern_of(chunk), settings["hybrid_layer_pattern"])
    if kinds := pattern_of(chunk):  # which says itself how many layers there are, and what they are
        step = blocks_per_layer(kinds)
        del found["experimental_attention_variant"]
        found["num_layers"] = (len(kinds) // step, settings["num_layers"])
        if "moe_layer_freq" in settings:
            found["moe_layer_freq"] = (
                [int(kind == "E") for kind in kinds[step - 1 :: step]],
                settings["moe_layer_freq"],
            )
        if "linear_attention_freq" in settings:
            found["linear_attention_freq"] = ([int(k == "G") for k in kinds[::step]], settings["linear_attention_freq"])
        rope = {name: value for name, value in rope.items() if not name.startswith("rotary_")}  # which it does not keep
    found |= {name: (getattr(chunk, name), value) for name, value in rope.items()}
    way_out = {"mtp_num_layers": ". Leave its layers out with --mtp drop"}
    return [
        f"the model has {name} = {has!r}, but config.json means {means!r}{way_out.get(name, '')}"
        for name, (has, means) in found.items()
        if _alike(name, has, chunk) != _alike(name, means, chunk)
    ] + [
        f"the model norms the queries and keys of layer {number}, which it does not rotate: HF's norms only rotated ones"
        for one in chunks_of(model)
        for number, layer in layers_of(one)
        if "no_rope_freq" in settings and settings["no_rope_freq"][number] and norms_heads(layer)
    ]


def _without_effect(settings: dict) -> set[str]:
    """Fields that a model with these settings does not read."""
    found = set()
    if settings.get("multi_latent_attention"):
        found |= {"kv_channels"} | ({"rotary_scaling_factor"} if settings["rope_type"] == "rope" else set())
    if settings.get("moe_router_score_function") == "sigmoid":
        found |= {"moe_router_pre_softmax"}
    if all(settings.get("moe_layer_freq") or [0]):
        found |= {"ffn_hidden_size"}
    return found


def _alike(name: str, value: object, chunk: nn.Module) -> object:
    """A setting in one of its spellings, where Megatron has several that mean the same."""
    if name in ("moe_router_topk_scaling_factor", "moe_router_num_groups", "moe_router_group_topk") and value == 1:
        return None
    if value == "yarn":  # how rotations are scaled is not compared
        return "rope"
    if isinstance(value, list) and name == "window_size":
        return tuple(value)
    return each_layer(name, value, chunk.config.num_layers)
