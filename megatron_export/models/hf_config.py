"""What an HF config.json says about a model's sizes.

It is read as a raw dict: transformers 5 rewrites `rope_theta`, `rope_scaling` and `torch_dtype`, and both spellings must be read.
"""

from ..common.errors import ExportError, report
from ..common.safe_files import shown
from ..common.text import near, some
from .architecture import Architecture
from .hf_config_limits import wrong_values
from .indexers import indexed_layers
from .layer_kinds import Kind, Layers, attention_first
from .registry import ARCHITECTURES, architecture_name, known
from .shape import DeltaNet, Mamba, ModelShape

REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "rms_norm_eps",
)
_OTHERS = (
    "GemmaForCausalLM",
    "MinistralForCausalLM",
    "PhiForCausalLM",
    "PhimoeForCausalLM",
)  # of another model, and almost called like one here
# How architectures spell the number of routed experts of a layer.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def text_of(config: dict) -> dict:
    """config.json's dict of the language model, with the usual keys, as if it were not part of another model.

    Of a model inside another one, the outer one says whether its output layer is the embedding, where it says so at all.
    """
    inner = config.get("text_config", {})
    if not isinstance(inner, dict):
        raise ExportError(f"config.json: text_config is {shown(inner)}, not a table of settings. Fetch it again")
    outer = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
    text = config | inner | outer | {"architectures": config.get("architectures")}
    architecture = known(text)
    if architecture is None:
        return text
    text |= {usual: text[own] for usual, own in architecture.keys.items() if own in text}
    return text | {key: value for key, value in architecture.implied(text).items() if text.get(key) is None}


def architecture_of(config: dict) -> Architecture:
    """The table of config.json's architecture; `ExportError` if it is unknown, or not right for some setting in config.json."""
    name, architecture = architecture_name(config), known(config)
    if architecture is None:
        raise ExportError(
            f"unknown architecture {shown(name)} in config.json.{_meant(name)} Known: {some(list(ARCHITECTURES))} in docs/models.md"
        )
    text = text_of(config)
    report(
        [
            f"config.json: {name} with {key} = {shown(text.get(key))} is not supported; only {allowed[0]!r} is"
            for key, allowed in architecture.only.items()
            if text.get(key) not in allowed
        ]
    )
    return architecture


def _meant(name: str) -> str:
    """What may have been meant by an architecture that is unknown. Another number is another model, and so are some other names."""
    if name.endswith("Model"):
        return " It ends before its output layer, as embedding models do, and only models that write text are exported."
    alike = [one for one in ARCHITECTURES if _digits(name) in ("", _digits(one)) and name not in _OTHERS]
    meant = near(name, alike) if alike else None
    return f" Did you mean {meant!r}?" if meant else ""


def _digits(name: str) -> str:
    return "".join(filter(str.isdigit, name))


def shape_of(config: dict) -> ModelShape:
    """Read the sizes from config.json's dict. `ExportError` lists every key that is missing or wrong."""
    architecture, table, config = architecture_name(config), known(config), text_of(config)
    if table and table.sizes:
        return table.sizes(config)
    spelled = table.keys if table else {}
    if missing := [spelled.get(key, key) for key in REQUIRED if config.get(key) is None]:
        raise ExportError(f"config.json of a {architecture} lacks {', '.join(missing)}")
    report(wrong_values(config, spelled))
    needed = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim") if config.get("kv_lora_rank") else ()
    needed += ("index_n_heads", "index_head_dim") if config.get("index_topk") else ()
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
    kinds = (table.layers if table else attention_first)(config, _sparse(config))
    return ModelShape(
        architecture=architecture,
        layers=config["num_hidden_layers"],
        hidden=hidden,
        heads=heads,
        groups=groups,
        head_dim=config.get("head_dim") or hidden // heads,
        ffn=config.get("intermediate_size_mlp") or config["intermediate_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        **(
            _experts_of(config, table.shared if table else 0)
            if any(Kind.EXPERTS in of_layer for of_layer in kinds)
            else {}
        ),
        kinds=kinds,
        mtp=len(kinds) - config["num_hidden_layers"],
        q_lora=config.get("q_lora_rank") or 0,
        kv_lora=config.get("kv_lora_rank") or 0,
        nope_dim=config.get("qk_nope_head_dim") or 0,
        rope_dim=config.get("qk_rope_head_dim") or 0,
        v_dim=config.get("v_head_dim") or 0,
        index_heads=config.get("index_n_heads") or 0,
        index_dim=config.get("index_head_dim") or 0,
        indexed=indexed_layers(config),
        **_mixers_of(config, kinds),
        output_gate=bool(table and table.settings.get("attention_output_gate")),
        ungated=bool(table) and table.settings.get("gated_linear_unit") is False,
        latent=config.get("moe_latent_size") or 0,
        **_vocabulary_of(config, table is not None and table.draft),
        **(table.more_sizes(config) if table else {}),
    )


def _vocabulary_of(config: dict, draft: bool) -> dict:
    """The fields of `ModelShape` that are about tokens, and about what a draft reads of its base."""
    if not draft:
        return {"vocab": config["vocab_size"]}
    said = config.get("eagle_config")
    ids = said.get("eagle_aux_hidden_state_layer_ids") if isinstance(said, dict) else None
    if not isinstance(ids, list) or not ids:
        raise ExportError("config.json of a draft lacks eagle_config.eagle_aux_hidden_state_layer_ids")
    known = config.get("draft_vocab_size") or config["vocab_size"]
    return {"vocab": known, "base_vocab": config["vocab_size"], "read": len(ids)}


_DELTA = {
    "key_heads": "linear_num_key_heads",
    "value_heads": "linear_num_value_heads",
    "key_width": "linear_key_head_dim",
    "value_width": "linear_value_head_dim",
    "kernel": "linear_conv_kernel_dim",
}
_MAMBA = {
    "heads": "mamba_num_heads",
    "width": "mamba_head_dim",
    "groups": "n_groups",
    "state": "ssm_state_size",
    "kernel": "conv_kernel",
}


def _mixers_of(config: dict, kinds: Layers) -> dict:
    """The fields of `ModelShape` that are about linear attention and Mamba, none for a model without."""
    found = {}
    for name, kind, made, keys in (("delta", Kind.LINEAR, DeltaNet, _DELTA), ("mamba", Kind.MAMBA, Mamba, _MAMBA)):
        if any(kind in of_layer for of_layer in kinds):
            said = f"config.json of a model with layers of {kind.value} lacks "
            report([said + key for key in keys.values() if not config.get(key)])
            found[name] = made(**{field: config[key] for field, key in keys.items()})
    for many, few, by in (("value_heads", "key_heads", "delta"), ("heads", "groups", "mamba")):
        if by in found and getattr(found[by], many) % getattr(found[by], few):
            words = _DELTA if by == "delta" else _MAMBA
            raise ExportError(
                f"config.json: {words[many]} {config[words[many]]} is not a multiple of {words[few]} {config[words[few]]}. Give "
                "the config.json that belongs to these weights"
            )
    return found


def _experts_of(config: dict, shared: int) -> dict:
    """The fields of `ModelShape` that are about experts, none for a model without; `shared` experts if no key says how many."""
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
    return {
        "experts": experts,
        "expert_ffn": ffn,
        "shared_ffn": config.get("moe_shared_expert_intermediate_size")
        or (config.get("n_shared_experts") or 0) * ffn
        or config.get("shared_expert_intermediate_size")
        or shared * ffn,
    }


def _sparse(config: dict) -> tuple[int, ...]:
    """The layers of the decoder that have experts."""
    if not any(config.get(key) for key in _EXPERTS):
        return ()
    if config.get("moe_layers") is not None:
        return tuple(config["moe_layers"])
    every = config.get("decoder_sparse_step") or config.get("interleave_moe_layer_step") or 1
    dense = config.get("mlp_only_layers") or ()
    layers = range(config.get("first_k_dense_replace") or 0, config["num_hidden_layers"])
    return tuple(layer for layer in layers if layer not in dense and (layer + 1) % every == 0)
