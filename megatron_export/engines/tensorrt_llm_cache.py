"""The KV cache that TensorRT-LLM makes for a checkpoint."""

from .checkpoint_view import CheckpointView, Group
from .exclude_lists import Partly
from .kv_scales import check_kv_scales
from .quant_configs import AlgorithmOf, Reading
from .verdict import Findings

_HOLDING = ("FP8", "NVFP4", "NVFP4_AWQ")  # algorithms whose joined q, k and v hold KV scales
_SCALE, _OTHER = "k_proj.k_scale", "v_proj.v_scale"


def check_cache(checkpoint: CheckpointView, reading: Reading, algorithm_of: AlgorithmOf, findings: Findings) -> None:
    """New findings about its scales and its format."""
    view = checkpoint.whole
    joined = {group.parent: _algorithm(group, algorithm_of) for group in view.groups if "q_proj" in group.parts}
    if reading.kv == "NVFP4":
        for parent, algorithm in joined.items():
            if algorithm is not None and algorithm not in _HOLDING:
                why = f"q, k and v in {algorithm} hold no scales, which attention takes for an NVFP4 cache"
                findings.add("kv nvfp4", why, parent, way="--kv-cache fp8")
    if not view.kv:
        return
    if _SCALE not in view.kv:
        findings.add("kv spelling", "it reads KV scales as k_proj.k_scale alone, so its cache has a scale of 1")
        return
    if reading.algorithm is not None:
        check_kv_scales(view, findings, pairs=False)
    alone = set(view.kv[_SCALE]) - set(view.kv.get(_OTHER, ()))
    holding = [at for at in alone if joined.get(at, "") in (*_HOLDING, *([None] if reading.kv == "NVFP4" else []))]
    if holding:
        findings.add("kv half", "it has no v_scale", *holding, way="export with --kv-cache fp8")
    if reading.kv is None and reading.dialect == "native":
        findings.add("kv dialect", "its FP8 KV cache with kv_cache_config.dtype fp8")
    elif reading.kv == "FP8":
        findings.add("kv fp8", "scales of an FP8 cache are not handed to attention: its cache has a scale of 1")


def _algorithm(group: Group, algorithm_of: AlgorithmOf) -> str | None:
    try:
        return algorithm_of(group)
    except Partly:
        return ""
