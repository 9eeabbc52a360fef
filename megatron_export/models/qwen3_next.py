"""Qwen3NextForCausalLM: linear attention in three of four layers, gates on the outputs of attention, zero-centred norms, experts
with a shared one behind a gate of its own, and layers that predict one more token under `mtp.`."""

from .architecture import Architecture, Settings
from .blocks import GQA, QK_NORM, TOP, dense, moe, shared_experts, zero_centred
from .layer_kinds import Kind, by_layer_types
from .rules import Rule, Table, as_stored, one_more, same
from .segment_layouts import Heads, Segments
from .shape import ModelShape
from .written_keys import numbered

# fmt: off
LINEAR: Table = {
    "decoder.layers.{l}.self_attention.in_proj.weight":
        Rule("model.layers.{l}.linear_attn.in_proj_qkvz.weight", lambda shape: Heads(_widths(shape))),
    "decoder.layers.{l}.self_attention.in_proj_ba.weight":
        Rule("model.layers.{l}.linear_attn.in_proj_ba.weight", lambda shape: Heads((shape.delta.per_key,) * 2)),
    "decoder.layers.{l}.self_attention.conv1d.weight":
        Rule("model.layers.{l}.linear_attn.conv1d.weight", lambda shape: Segments(segments(shape)[:3], (3,))),
    "decoder.layers.{l}.self_attention.dt_bias":            same("model.layers.{l}.linear_attn.dt_bias"),
    "decoder.layers.{l}.self_attention.A_log":              as_stored("model.layers.{l}.linear_attn.A_log"),
    "decoder.layers.{l}.self_attention.out_norm.weight":    one_more("model.layers.{l}.linear_attn.norm.weight"),
    "decoder.layers.{l}.self_attention.out_proj.weight":    same("model.layers.{l}.linear_attn.out_proj.weight"),
}
MTP: Table = {
    "decoder.layers.{l}.enorm.weight":                      same("mtp.pre_fc_norm_embedding.weight"),
    "decoder.layers.{l}.hnorm.weight":                      same("mtp.pre_fc_norm_hidden.weight"),
    "decoder.layers.{l}.eh_proj.weight":                    same("mtp.fc.weight"),
    "decoder.layers.{l}.final_layernorm.weight":            same("mtp.norm.weight"),
}
SHARED: Table = shared_experts("mlp.shared_expert") | {
    "decoder.layers.{l}.mlp.shared_experts.gate_weight":    same("model.layers.{l}.mlp.shared_expert_gate.weight"),
}
# fmt: on
ATTENTION = zero_centred(TOP | GQA | QK_NORM)
EXPERTS = zero_centred(moe("mlp") | SHARED)


def segments(shape: ModelShape) -> tuple[int, ...]:
    """Rows of q, k, v and z."""
    return (shape.delta.keys, shape.delta.keys, shape.delta.values, shape.delta.values)


def _widths(shape: ModelShape) -> tuple[int, ...]:
    """The same for one head of keys."""
    return tuple(rows // shape.delta.key_heads for rows in segments(shape))


def computed(config: dict, shape: ModelShape) -> dict:
    """Which layers have linear attention, and its sizes."""
    delta = shape.delta
    found: dict[str, object] = {"moe_shared_expert_gate": True} if shape.shared_ffn else {}
    if delta is None:
        return found
    return found | {
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": [int(Kind.LINEAR in kinds) for kinds in shape.kinds[: shape.layers]],
        "linear_conv_kernel_dim": delta.kernel,
        "linear_key_head_dim": delta.key_width,
        "linear_value_head_dim": delta.value_width,
        "linear_num_key_heads": delta.key_heads,
        "linear_num_value_heads": delta.value_heads,
    }


def linear(said: Settings) -> dict:
    """Which layers have linear attention, and its sizes."""
    kinds = said["linear_attention_freq"] or [0] * said["num_layers"]
    sizes = ("conv_kernel_dim", "key_head_dim", "value_head_dim", "num_key_heads", "num_value_heads")
    return {
        "layer_types": ["linear_attention" if one else "full_attention" for one in kinds],
        **{f"linear_{size}": said[f"linear_{size}"] for size in sizes},
        "partial_rotary_factor": said["rotary_percent"],
    }


def shared_size(said: Settings) -> dict:
    """The size of the shared expert, of a model with experts."""
    size = said["moe_shared_expert_intermediate_size"]
    return {"shared_expert_intermediate_size": size or 0} if said["num_moe_experts"] else {}


def implied(config: dict) -> dict:
    """A quarter of every head is rotated where nothing else is said."""
    return {"partial_rotary_factor": 0.25, "intermediate_size": config.get("moe_intermediate_size")}


def respelled(config: dict) -> dict:
    """How often attention is not linear: SGLang reads no `layer_types`, which transformers 5 writes in place of it."""
    kinds = config.get("text_config", config).get("layer_types") or ()
    full = [number for number, kind in enumerate(kinds, 1) if kind == "full_attention"]
    if not full or full != list(range(full[0], len(kinds) + 1, full[0])):
        return {}
    found = {"full_attention_interval": full[0]}
    return {"text_config": found} if "text_config" in config else found


_IN_FOUR_BITS = ("nvfp4", "nvfp4_awq", "w4a16_nvfp4")

ARCHITECTURE = Architecture(
    rules=ATTENTION | zero_centred(dense("mlp")) | EXPERTS | LINEAR | zero_centred(MTP),
    predicting="mtp.layers.",
    keys={"num_nextn_predict_layers": "mtp_num_hidden_layers"},
    implied=implied,
    layers=by_layer_types,
    settings={"qk_layernorm": True, "attention_output_gate": True, "layernorm_zero_centered_gamma": True},
    computed=computed,
    respelled=respelled,
    left={"fp8": (".in_proj",), **dict.fromkeys(_IN_FOUR_BITS, (".in_proj", ".linear_qkv"))},
    left_why="in_proj_qkvz, and q, k and v in four bits, stay in bfloat16: SGLang does not load them so "
    "(--set GLOB=FORMAT quantizes them, for vLLM and TensorRT-LLM)",
    only={
        "norm_topk_prob": (True, False, None),
        "attention_bias": (False, None),
        "use_sliding_window": (False, None),
        "hidden_act": ("silu", None),
        "mtp_num_hidden_layers": (1, 0, None),
    },
    model_type="qwen3_next",
    written=lambda said: linear(said) | numbered(said) | shared_size(said),
)
