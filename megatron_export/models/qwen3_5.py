"""Qwen3_5ForConditionalGeneration and Qwen3_5MoeForConditionalGeneration (Qwen 3.5 and 3.6), and both without a vision tower: as
Qwen3-Next, with the input linears of linear attention apart, dense MLPs or experts in all layers."""

from dataclasses import replace

from . import qwen3_next
from .architecture import Settings
from .blocks import dense, renamed, zero_centred
from .layouts import Split
from .qwen3_next import ATTENTION, EXPERTS, LINEAR, MTP, segments
from .rules import Rule, Table
from .segment_layouts import Segments
from .written_keys import numbered

# fmt: off
APART: Table = LINEAR | {
    "decoder.layers.{l}.self_attention.in_proj.weight":
        Rule("model.layers.{l}.linear_attn.in_proj_{part}.weight",
             lambda shape: Segments(segments(shape), (3, 1), ("qkv", "z"))),
    "decoder.layers.{l}.self_attention.in_proj_ba.weight":
        Rule("model.layers.{l}.linear_attn.in_proj_{part}.weight", lambda shape: Split(("b", "a"))),
}
# fmt: on
RULES = ATTENTION | APART | zero_centred(MTP)
SEES = "model.language_model."  # where the language model is in one that sees
_NEXT = qwen3_next.ARCHITECTURE


def _respelled(config: dict) -> dict:
    """Also that no layer of the vision tower has a merger of its own: SGLang makes three where nothing is said."""
    found = qwen3_next.respelled(config)
    said = "deepstack_visual_indexes" in config.get("vision_config", {"deepstack_visual_indexes": []})
    return found if said else found | {"vision_config": {"deepstack_visual_indexes": []}}


def written(said: Settings) -> dict:
    """Experts are in all layers, and their weights always sum up to 1."""
    experts = numbered(said)
    kept = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
    return qwen3_next.linear(said) | {key: experts[key] for key in kept if experts} | qwen3_next.shared_size(said)


TEXT = replace(
    _NEXT,
    left={},
    left_why="",
    rules=RULES | zero_centred(dense("mlp")),
    only={key: values for key, values in _NEXT.only.items() if key != "norm_topk_prob"}
    | {"attn_output_gate": (True, None)},
    model_type="qwen3_5_text",
    written=qwen3_next.linear,
)
MOE_TEXT = replace(TEXT, rules=RULES | EXPERTS, model_type="qwen3_5_moe_text", written=written)
_SEEING = {"copied": ("model.visual.",), "respelled": _respelled, "on_disk": ((r"^model\.", SEES),)}
DENSE = replace(TEXT, rules=renamed("model.", SEES, TEXT.rules), **_SEEING)
MOE = replace(MOE_TEXT, rules=renamed("model.", SEES, MOE_TEXT.rules), **_SEEING)
