"""DeepseekV32ForCausalLM: a DeepSeek V3 whose attention is sparse: an indexer chooses for every token those that it sees."""

from dataclasses import replace

from ..common.errors import ExportError
from ..common.safe_files import shown
from . import deepseek_v3
from .architecture import Settings
from .blocks import INDEXER
from .shape import ModelShape


def sparse(config: dict, shape: ModelShape) -> dict:
    """Sizes of the indexer. HF says twice which layers have experts."""
    first, kinds = config.get("first_k_dense_replace") or 0, config.get("mlp_layer_types")
    if kinds and kinds != ["dense"] * first + ["sparse"] * (shape.layers - first):
        raise ExportError(
            f"config.json: mlp_layer_types is {shown(kinds)}, and first_k_dense_replace {first}. Give the config.json that belongs "
            "to these weights"
        )
    return {
        "experimental_attention_variant": "dsa",
        "dsa_indexer_n_heads": shape.index_heads,
        "dsa_indexer_head_dim": shape.index_dim,
        "dsa_indexer_topk": config["index_topk"],
    }


def respelled(config: dict) -> dict:
    """Which layers have an indexer, in letters: vLLM does not read `indexer_types`, which is all that transformers writes."""
    kinds = config.get("indexer_types")
    return {"index_topk_pattern": "".join("F" if kind == "full" else "S" for kind in kinds)} if kinds else {}


def unlike(config: dict, length: int) -> str:
    """A sample of as many tokens as the indexer chooses, or fewer, is seen whole: then attention is DeepSeek V3's."""
    if length <= (most := config["index_topk"]):
        return ""
    said = f"samples of {length} tokens: beyond index_topk {most} attention is sparse"
    return f"{said}, which Megatron-Core computes with Transformer Engine alone. Give shorter samples"


def written(said: Settings) -> dict:
    """Which layers have an indexer is said where not all have one. HF numbers layers from 0, Megatron from 1."""
    found = deepseek_v3.ARCHITECTURE.written(said) | {
        "index_n_heads": said["dsa_indexer_n_heads"],
        "index_head_dim": said["dsa_indexer_head_dim"],
        "index_topk": said["dsa_indexer_topk"],
    }
    if (woven := said["dsa_indexer_rope_interleaved"]) is not None:  # versions that do not know it rotate halves
        found["indexer_rope_interleave"] = woven
    if (every := said["dsa_indexer_topk_freq"] or 1) > 1:
        found |= {"index_topk_freq": every, "index_skip_topk_offset": max(said["dsa_indexer_skip_topk_offset"] or 0, 1)}
    return found


ARCHITECTURE = replace(
    deepseek_v3.ARCHITECTURE,
    rules=deepseek_v3.ARCHITECTURE.rules | INDEXER,
    computed=sparse,
    unlike=unlike,
    respelled=respelled,
    model_type="deepseek_v32",
    written=written,
)
