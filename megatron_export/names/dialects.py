"""One canonical name per Megatron parameter, whichever layer spec built the model and wherever the layer lives.

Canonical names are those of the local spec, with global layer numbers from 0. The Transformer Engine spec keeps the
norms inside the linear that follows them; a rank's own layer numbers restart at 0 on every pipeline stage and chunk.
"""

import re

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def canonical(name: str, layer_numbers: list[int]) -> str:
    """The canonical name of parameter `name` of one model chunk; `layer_numbers[i]` is its layer i's global number."""
    found = _LAYER.match(name)
    if found is None:
        return name
    local = name[found.end() :]
    return f"decoder.layers.{layer_numbers[int(found[1])]}.{_FUSED_NORMS.get(local, local)}"
