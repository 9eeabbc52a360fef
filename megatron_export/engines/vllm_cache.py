"""The KV cache that vLLM makes for a checkpoint."""

from .checkpoint_view import CheckpointView
from .gpus import BLACKWELL, GPUS
from .kv_scales import check_kv_scales
from .quant_configs import Reading
from .verdict import Findings


def check_cache(checkpoint: CheckpointView, reading: Reading, gpu: str | None, findings: Findings) -> None:
    """New findings about its scales and its format."""
    kv = checkpoint.indexed.kv
    if reading.algorithm is not None and not checkpoint.latent:
        check_kv_scales(checkpoint.indexed, findings, pairs=bool(reading.kv))
    if checkpoint.latent:
        if reading.kv == "NVFP4":
            findings.add("kv latent", "it has no NVFP4 cache for latent attention", way="--kv-cache none")
        elif kv:
            findings.add("kv mla", "its FP8 cache of latent attention has a scale of 1", way="--kv-cache none")
        return
    if reading.kv == "NVFP4" and kv and reading.layers and reading.where == "ignore":
        why = "scales of an NVFP4 cache are not read beside quantized_layers: its cache has a scale of 1"
        findings.add("mixed cache", why, way="--kv-cache fp8")
    if reading.kv == "NVFP4":
        _check_nvfp4(checkpoint, gpu, findings)
    if (reading.kv or kv) and reading.dialect == "native":
        findings.add("kv dialect", "its FP8 KV cache with --kv-cache-dtype fp8")
    if reading.kv and reading.algorithm is not None:
        found = {at for spelled, places in kv.items() for at in places if spelled.endswith(("k_scale", "v_scale"))}
        layers = checkpoint.caching
        if len(found) < layers and (found or reading.kv != "FP8"):
            findings.add("kv scales", f"KV scales are there for {len(found)} of {layers} layers; the cache of others "
                         "has a scale of 1", way="export with --kv-cache fp8")  # fmt: skip


def _check_nvfp4(checkpoint: CheckpointView, gpu: str | None, findings: Findings) -> None:
    """FlashInfer reads such a cache of heads of 64 with its own kernels for B200 and B300 alone."""
    size = checkpoint.number("head_dim") or checkpoint.number("hidden_size") // (
        checkpoint.number("num_attention_heads") or 1
    )
    narrow = " and, as heads are 64 wide, on B200 and B300" if size == 64 else ""
    findings.add("kv nvfp4", f"its NVFP4 KV cache with FlashInfer{narrow} only")
    if gpu is not None and (GPUS[gpu] < 80 or (narrow and GPUS[gpu] // 10 != BLACKWELL // 10)):
        findings.add("gpu", f"no NVFP4 KV cache{' of heads of 64' if narrow else ''} on {gpu}", way="--kv-cache fp8")
