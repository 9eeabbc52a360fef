"""Gemma3ForCausalLM: the language model of Gemma 3. Zero-centred norms before and after attention and MLP; in five of six layers
windows, with a rotary base of their own; embeddings times the root of their size.
"""

from ..common.errors import ExportError
from ..common.safe_files import shown
from . import written_keys
from .architecture import Architecture, Settings
from .blocks import GQA, QK_NORM, TOP, dense, zero_centred
from .rules import Table, same
from .shape import ModelShape

DEFAULTS = {  # of Gemma3TextConfig; Google's files leave out what equals them
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "tie_word_embeddings": True,
}
# fmt: off
NORMS: Table = {
    "decoder.layers.{l}.self_attention.linear_proj.post_layernorm.weight":
        same("model.layers.{l}.post_attention_layernorm.weight"),
    "decoder.layers.{l}.pre_mlp_layernorm.weight":
        same("model.layers.{l}.pre_feedforward_layernorm.weight"),
    "decoder.layers.{l}.mlp.linear_fc2.post_layernorm.weight":
        same("model.layers.{l}.post_feedforward_layernorm.weight"),
}
# fmt: on


def windows(config: dict, shape: ModelShape) -> dict:
    """Which layers attend in windows, by `layer_types`, or all but every sixth; and the factor of scores, which is its own."""
    every = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    usual = ["sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(shape.layers)]
    kinds = config.get("layer_types") or usual
    if not {*kinds} <= {"sliding_attention", "full_attention"}:
        raise ExportError(
            f"config.json: layer_types is {shown(kinds)}, not 'full_attention' or 'sliding_attention' for each layer. Give the "
            "config.json that belongs to these weights"
        )
    return {
        "window_size": (config["sliding_window"] - 1, 0),
        "window_attn_skip_freq": [int(kind == "sliding_attention") for kind in kinds],
        "softmax_scale": config["query_pre_attn_scalar"] ** -0.5,
    }


def local_base(config: dict) -> float:
    """The rotary base of layers with windows."""
    of_windows = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    return of_windows.get("rope_theta") or config["rope_local_base_freq"]


_LEAST = 1e-6  # of factors of scores: that of a head with a million million numbers


def written(said: Settings) -> dict:
    """The factor of scores is the root of a whole number."""
    scale = said["softmax_scale"]
    return written_keys.windows(said) | (
        {"query_pre_attn_scalar": round(scale**-2)} if scale and scale > _LEAST else {}
    )


ARCHITECTURE = Architecture(
    rules=zero_centred(TOP | GQA | QK_NORM | dense("mlp") | NORMS),
    implied=lambda config: DEFAULTS,
    settings={"layernorm_zero_centered_gamma": True, "activation_func": "fast_gelu", "qk_layernorm": True},
    computed=windows,
    only={
        "hidden_activation": ("gelu_pytorch_tanh", None),
        "attention_bias": (False, None),
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "use_bidirectional_attention": (False, None),
    },
    sandwiched=local_base,
    model_type="gemma3_text",
    written=written,
    unsaid=("query_pre_attn_scalar", "rope_local_base_freq"),
)
