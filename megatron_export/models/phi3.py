"""Phi3ForCausalLM: Phi 3, 3.5 and 4. One tensor of queries, keys and values, and one of gate and up."""

from .architecture import Architecture, Settings
from .blocks import GQA, TOP, dense
from .mistral import window_of
from .rules import Table, fused_gate_up, fused_qkv
from .written_keys import window

# fmt: off
FUSED: Table = {
    "decoder.layers.{l}.self_attention.linear_qkv.weight": fused_qkv("model.layers.{l}.self_attn.qkv_proj.weight"),
    "decoder.layers.{l}.mlp.linear_fc1.weight":            fused_gate_up("model.layers.{l}.mlp.gate_up_proj.weight"),
}
# fmt: on


def written(said: Settings) -> dict:
    """With the length before any scaling, which transformers would take for 4,096."""
    own = {name: said[name] for name in ("original_max_position_embeddings",) if said.get(name)}
    return window(said) | {"original_max_position_embeddings": said["max_position_embeddings"]} | own


ARCHITECTURE = Architecture(
    rules=TOP | GQA | dense("mlp") | FUSED,
    computed=lambda config, shape: window_of(config.get("sliding_window")),
    only={"hidden_act": ("silu", None), "attention_bias": (False, None)},
    model_type="phi3",
    written=written,
)
