"""What an HF config.json says about a model's sizes.

Works on the raw dict, never on a transformers config object: transformers 5 rewrites `rope_theta`, `rope_scaling` and
`torch_dtype` on load, and both spellings must be read.
"""

from collections.abc import Mapping
from difflib import get_close_matches

from ..common.errors import ExportError, report
from ..common.safe_files import shown
from .architecture import Architecture
from .hf_config_limits import wrong_values
from .registry import ARCHITECTURES, architecture_name, known
from .shape import ModelShape

REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "rms_norm_eps",
)
# Each architecture has its own word for these; 0 where it has none.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_MLA = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def text_of(config: dict) -> dict:
    """config.json's dict of a language model, with the usual keys; of one that is a part of another model, as if it stood alone."""
    inner = config.get("text_config", {})
    if not isinstance(inner, dict):
        raise ExportError(f"config.json: text_config is {shown(inner)}, not a table of settings. Fetch it again")
    text = config | inner | {"architectures": config.get("architectures")}
    spelled = _spelled(text)
    return text | {usual: text[own] for usual, own in spelled.items() if own in text}


def _spelled(config: dict) -> Mapping[str, str]:
    """Usual key -> how config.json's architecture spells it, where that is another word."""
    architecture = known(config)
    return architecture.keys if architecture else {}


def architecture_of(config: dict) -> Architecture:
    """What the table says of config.json's architecture; `ExportError` with the known ones when it is not there, or with
    the settings that it is not right for.
    """
    name, architecture = architecture_name(config), known(config)
    if architecture is None:
        near = get_close_matches(name[:80], ARCHITECTURES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ExportError(f"unknown architecture {shown(name)} in config.json.{hint} Known: {', '.join(ARCHITECTURES)}")
    text = text_of(config)
    report(
        [
            f"config.json: {name} with {key} = {shown(text.get(key))} is not supported; only {allowed[0]!r} is"
            for key, allowed in architecture.only.items()
            if text.get(key) not in allowed
        ]
    )
    return architecture


def shape_of(config: dict) -> ModelShape:
    """Read the sizes from config.json's dict. `ExportError` lists every key that is missing or wrong."""
    architecture, spelled, config = architecture_name(config), _spelled(config), text_of(config)
    if missing := [spelled.get(key, key) for key in REQUIRED if config.get(key) is None]:
        raise ExportError(f"config.json of a {architecture} lacks {', '.join(missing)}")
    report(wrong_values(config, spelled))
    needed = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim") if config.get("kv_lora_rank") else ()
    if any(config.get(key) for key in _EXPERTS):
        needed += ("num_experts_per_tok", *(("topk_group",) if (config.get("n_group") or 1) > 1 else ()))
    report([f"config.json of a {architecture} lacks {key}" for key in needed if not config.get(key)])
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    groups = config.get("num_key_value_heads") or heads
    problems = []
    if heads % groups:
        problems.append(f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    if not config.get("head_dim") and hidden % heads:
        problems.append(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    report(problems)
    return ModelShape(
        architecture=architecture,
        layers=config["num_hidden_layers"],
        hidden=hidden,
        heads=heads,
        groups=groups,
        head_dim=config.get("head_dim") or hidden // heads,
        ffn=config.get("intermediate_size_mlp") or config["intermediate_size"],
        vocab=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        **_experts_of(config),
        mtp=config.get("num_nextn_predict_layers") or 0,
        **dict(
            zip(("q_lora", "kv_lora", "nope_dim", "rope_dim", "v_dim"), (config.get(k) or 0 for k in _MLA), strict=True)
        ),
    )


def _experts_of(config: dict) -> dict:
    """The fields of `ModelShape` that are about experts; nothing for a model without."""
    key = next((key for key in _EXPERTS if config.get(key)), None)
    if key is None:
        return {}
    experts = config[key]
    chosen, groups, kept = config["num_experts_per_tok"], config.get("n_group") or 1, config.get("topk_group") or 1
    if chosen > experts or experts % groups or kept > groups:
        raise ExportError(
            f"config.json: num_experts_per_tok {chosen} of {key} {experts}, topk_group {kept} of n_group {groups}: there are "
            "not as many. Give the config.json that belongs to these weights"
        )
    ffn = config.get("moe_intermediate_size") or config["intermediate_size"]
    every = config.get("decoder_sparse_step") or config.get("interleave_moe_layer_step") or 1
    count, dense = config["num_hidden_layers"], config.get("mlp_only_layers") or ()
    layers = range(config.get("first_k_dense_replace") or 0, count)
    sparse = tuple(layer for layer in layers if layer not in dense and (layer + 1) % every == 0)
    if config.get("moe_layers") is not None:
        sparse = tuple(config["moe_layers"])
    predicting = range(count, count + (config.get("num_nextn_predict_layers") or 0)) if count - 1 in sparse else ()
    architecture = known(config)
    return {
        "sparse": (*sparse, *predicting),
        "experts": experts,
        "expert_ffn": ffn,
        "shared_ffn": (config.get("n_shared_experts") or 0) * ffn
        or config.get("shared_expert_intermediate_size")
        or (architecture.shared if architecture else 0) * ffn,
    }
