"""A dense decoder that is in no table: its linears are found by the names that most models have, all else is copied as it is."""

import re
from collections.abc import Collection

from ..common.errors import ExportError
from .architecture import Architecture
from .rules import Rule, gated, qkv, same, vocab

FORMATS = ("bf16", "fp8", "fp8_pb", "nvfp4", "w4a16_nvfp4")  # which fold nothing into what is copied
_LINEAR = re.compile(r"(.*\blayers)\.\d+\.(\w+)\.(q|k|v|o|gate|up|down)_proj\.weight")
_ATTENTION, _MLP = {"q", "k", "v", "o"}, {"gate", "up", "down"}


def other_architecture(name: str, tensors: Collection[str]) -> Architecture:
    """The architecture of a live model of class `name` with these tensors; `ExportError` where they are not all found so."""
    found: dict[tuple[str, str], set[str]] = {}
    for layers, block, part in (match.groups() for match in map(_LINEAR.fullmatch, tensors) if match):
        found.setdefault((layers, block), set()).add(part)
    embedding = [one for one in tensors if one.endswith("embed_tokens.weight")]
    parts = {frozenset(some) for some in found.values()}
    if len(found) != 2 or parts != {frozenset(_ATTENTION), frozenset(_MLP)} or len(embedding) != 1:
        raise ExportError(
            f"{name} is in no table here, and its linears are not found by name: layers.N.BLOCK with q_proj, k_proj, v_proj and "
            "o_proj, one with gate_proj, up_proj and down_proj, and embed_tokens. docs/add-a-model.md shows how to add it"
        )
    (layers, attention), (_, mlp) = sorted(found, key=lambda block: "q" not in found[block])
    block, dense = f"{layers}.{{l}}.{attention}", f"{layers}.{{l}}.{mlp}"
    rules: dict[str, Rule] = {
        "embedding.word_embeddings.weight": vocab(embedding[0]),
        "output_layer.weight": vocab("lm_head.weight"),
        "decoder.layers.{l}.self_attention.linear_qkv.weight": qkv(f"{block}.{{part}}_proj.weight"),
        "decoder.layers.{l}.self_attention.linear_proj.weight": same(f"{block}.o_proj.weight"),
        "decoder.layers.{l}.mlp.linear_fc1.weight": gated(f"{dense}.{{part}}.weight"),
        "decoder.layers.{l}.mlp.linear_fc2.weight": same(f"{dense}.down_proj.weight"),
    }
    return Architecture(
        rules=rules,
        copied=("",),
        formats=FORMATS,
        unsmoothed="AWQ folds vectors into what is only copied here",
        keys={"rms_norm_eps": "layer_norm_eps"},
    )
