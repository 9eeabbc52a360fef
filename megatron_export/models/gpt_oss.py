"""GptOssForCausalLM: biases on all linears, experts stacked with the rows of gate and up in turn, an offset in the softmax of
every head, windows of attention in every other layer."""

from ..common.errors import ExportError
from ..common.safe_files import shown
from . import written_keys
from .architecture import Architecture
from .blocks import BIASES, GQA, QKV_BIAS, TOP, moe, stacked
from .shape import ModelShape
from .written_keys import local


def windows(config: dict, shape: ModelShape) -> dict:
    """Windows of attention in some layers, every other one if config.json does not say which; a bound on activations."""
    kinds = config.get("layer_types") or [
        "full_attention" if n % 2 else "sliding_attention" for n in range(shape.layers)
    ]
    known = isinstance(kinds, list) and all(kind in ("full_attention", "sliding_attention") for kind in kinds)
    if not known or len(kinds) != shape.layers:
        raise ExportError(
            f"config.json: layer_types is {shown(kinds)}, not 'full_attention' or 'sliding_attention' for each of "
            f"num_hidden_layers {shape.layers}. Give the config.json that belongs to these weights"
        )
    window = config.get("sliding_window", 128)
    return {
        "window_size": (window - 1, 0) if window else None,
        "window_attn_skip_freq": [int(kind == "sliding_attention") for kind in kinds] if window else None,
        "activation_func_clamp_value": config.get("swiglu_limit", 7.0),
    }


ARCHITECTURE = Architecture(
    rules=stacked("mlp", TOP | GQA | QKV_BIAS | moe("mlp", router="router") | BIASES, woven=True),
    settings={
        "activation_func": "quick_gelu",
        "glu_linear_offset": 1.0,
        "softmax_type": "learnable",
        "add_bias_linear": True,
        "add_qkv_bias": True,
    },
    computed=windows,
    only={"swiglu_alpha": (1.702, None), "attention_bias": (True, None), "hidden_act": ("silu", None)},
    formats=("bf16", "fp8", "nvfp4", "mxfp4"),
    unsmoothed="up_proj has a bias and an offset that cannot be smoothed",
    stacked=True,
    published="mxfp4",
    model_type="gpt_oss",
    written=lambda said: (
        local(said) | written_keys.windows(said) | {"swiglu_limit": said["activation_func_clamp_value"]}
    ),
)
