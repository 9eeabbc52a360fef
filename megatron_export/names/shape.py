"""What an HF config.json says about a model: its sizes, and the Megatron settings they imply.

Works on the raw dict, never on a transformers config object: transformers 5 rewrites `rope_theta`, `rope_scaling` and
`torch_dtype` on load, and both spellings must be read.
"""

from dataclasses import dataclass

from ..errors import ExportError, report

REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "rms_norm_eps",
)
OPTIONAL = ("num_key_value_heads", "head_dim")


@dataclass(frozen=True)
class ModelShape:
    """The sizes that names, layouts and shapes depend on; all unsharded, vocabulary unpadded."""

    architecture: str
    layers: int
    hidden: int
    heads: int
    groups: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool


def shape_of(config: dict) -> ModelShape:
    """Read the sizes from config.json's dict. `ExportError` lists every key that is missing."""
    architectures = config.get("architectures") or ["(none)"]
    if missing := [key for key in REQUIRED if config.get(key) is None]:
        raise ExportError(f"config.json of a {architectures[0]} lacks {', '.join(missing)}")
    counts = [key for key in (*REQUIRED, *OPTIONAL) if key != "rms_norm_eps" and config.get(key) is not None]
    wrong = [key for key in counts if not isinstance(config[key], int) or config[key] < 1]
    report([f"config.json: {key} is {config[key]!r}, not a whole number above 0" for key in wrong])
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    groups = config.get("num_key_value_heads") or heads
    problems = []
    if heads % groups:
        problems.append(f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    if not config.get("head_dim") and hidden % heads:
        problems.append(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    report(problems)
    return ModelShape(
        architecture=architectures[0],
        layers=config["num_hidden_layers"],
        hidden=hidden,
        heads=heads,
        groups=groups,
        head_dim=config.get("head_dim") or hidden // heads,
        ffn=config["intermediate_size"],
        vocab=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def transformer_settings(config: dict) -> dict:
    """Fields of Megatron's `TransformerConfig` that every architecture here shares, derived from config.json."""
    shape = shape_of(config)
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
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def unscaled_rope_settings(config: dict) -> dict:
    """Arguments of Megatron's `GPTModel` for rotary embeddings, but for their scaling."""
    theta = _rope_of(config).get("rope_theta") or config.get("rope_theta") or 10000.0
    return {"position_embedding_type": "rope", "rotary_base": theta}


def _rope_of(config: dict) -> dict:
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def rope_settings(config: dict) -> dict:
    """Arguments of Megatron's `GPTModel` for rotary embeddings, from the old (`rope_theta`, `rope_scaling`) or the new
    (`rope_parameters`) spelling. Megatron knows no scaling, `linear`, and `llama3` with Llama 3's own constants.
    """
    rope, settings = _rope_of(config), unscaled_rope_settings(config)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return settings
    if kind == "linear":
        return settings | {"seq_len_interpolation_factor": rope["factor"]}
    constants = (
        rope.get("low_freq_factor"),
        rope.get("high_freq_factor"),
        rope.get("original_max_position_embeddings"),
    )
    if kind == "llama3" and constants == (1.0, 4.0, 8192):
        return settings | {"rope_scaling": True, "rope_scaling_factor": rope["factor"]}
    raise ExportError(
        f"config.json: Megatron-Core cannot compute rope scaling {rope}, so activations cannot be calibrated. "
        "It knows no scaling, 'linear', and 'llama3' with factors 1 and 4 over 8192 positions"
    )
