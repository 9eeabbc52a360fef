"""One canonical name per Megatron parameter, whichever layer spec built the model and whichever rank holds it.

Canonical names are those of the local spec, with global numbers of layers and experts from 0; Megatron numbers both from 0 on every
rank and model chunk. Layers that predict one more token (MTP) follow those of the decoder, as in HF. The Transformer Engine spec
keeps norms inside the linear that follows them, and all experts of a rank in one module. Adapters (Megatron-Bridge's and ModelOpt's
LoRA) and ModelOpt's quantizers have no place in canonical names.
"""

import re

_LAYER = re.compile(
    r"(decoder|mtp)\.layers\.(\d+)\.(?:transformer_layer\.|mtp_model_layer\.(?:layers\.(\d+)\.)?)?(?=\w)"
)
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
    "self_attention.in_proj.layer_norm_weight": "input_layernorm.weight",
    "mixer.in_proj.layer_norm_weight": "input_layernorm.weight",
    "norm.weight": "input_layernorm.weight",  # of a Mamba layer
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "mixer.conv1d_weight": "mixer.conv1d.weight",  # from Megatron-Core 0.19 on
    "mixer.conv1d_bias": "mixer.conv1d.bias",
}
_EXPERT = re.compile(
    r"mlp\.experts\.(?:local_experts\.(\d+)\.(linear_fc[12])\.|(linear_fc[12])\.(?=weight\d|bias\d))(.+)"
)
_ADDED = re.compile(r"\.(?:adapter|linear_in|linear_out|lora_[ab]_\w+|\w+_quantizer)\.")


def without_additions(name: str) -> str | None:
    """The name of a parameter, buffer or module in a model without adapters and quantizers; None for a part of these."""
    return None if _ADDED.search(f".{name}.") else name.replace(".to_wrap.", ".").removesuffix(".to_wrap")


def canonical(name: str, numbers: dict[str, list[int]], experts: list[int]) -> str:
    """The canonical name of parameter `name` of one model chunk.

    Global numbers: `numbers["decoder"][i]` of its layer i, `numbers["mtp"][i]` of the first and `numbers["last"][i]` of the last
    layer in layer i of its MTP, `experts[i]` of expert i.
    """
    found = _LAYER.match(name)
    if found is None:
        return name.replace("decoder.final_norm.", "decoder.final_layernorm.")  # of a `HybridModel`
    local = name[found.end() :]
    first = "last" if found[1] == "mtp" and local.startswith("final_layernorm.") else found[1]
    number = numbers[first][int(found[2])] + int(found[3] or 0)
    return f"decoder.layers.{number}.{_FUSED_NORMS.get(local) or _expert(local, experts)}"


def _expert(local: str, experts: list[int]) -> str:
    found = _EXPERT.fullmatch(local)
    if found is None:
        return local
    number, linear, grouped, leaf = found.groups()
    if grouped:
        leaf, number = re.fullmatch(r"(\D+)(\d+)", leaf).groups()
    return f"mlp.experts.{experts[int(number)]}.{linear or grouped}.{leaf}"
