"""The KV cache that SGLang makes for a checkpoint."""

from .architectures import built_by
from .checkpoint_view import CheckpointView
from .kv_scales import check_kv_scales
from .quant_configs import Reading
from .verdict import Findings


def check_cache(checkpoint: CheckpointView, reading: Reading, findings: Findings) -> None:
    """New findings about its scales and its format."""
    kv = checkpoint.indexed.kv
    keeps = built_by("sglang", checkpoint).caching
    if not (reading.kv or kv):
        return
    if reading.algorithm is not None and keeps:
        check_kv_scales(checkpoint.indexed, findings)
    if reading.kv == "NVFP4":
        findings.add("kv nvfp4", "its KV cache is in bfloat16, or in NVFP4 with --kv-cache-dtype nvfp4 on Blackwell")
    elif reading.algorithm == "blocks" or reading.kv != "FP8":
        findings.add("kv flag", "its FP8 KV cache with --kv-cache-dtype fp8_e4m3")
    if kv and checkpoint.expected is not None and not keeps:
        findings.add("kv ignored", "ignores the scales of this architecture's KV cache")
