"""What SGLang reads of a hybrid's config.json with classes of its own, and how it builds layers that predict one more token."""

from .checkpoint_view import CheckpointView
from .hybrids import NEMOTRON, NEXT, QWEN35, QWEN35_SEES
from .quant_configs import Reading
from .verdict import Findings

_WORDS = {"mamba", "attention", "mlp", "moe"}
_GROUPS = 8  # what it takes where config.json says n_groups, which it does not read, and not mamba_n_groups


def check_hybrid_config(checkpoint: CheckpointView, findings: Findings) -> None:
    """New findings about layers, groups and mergers of the vision tower."""
    text, architecture = checkpoint.text, checkpoint.architecture
    if architecture in (NEXT, *QWEN35):
        _check_interval(text, findings)
    vision = checkpoint.config.get("vision_config")
    if architecture in QWEN35_SEES and isinstance(vision, dict) and "deepstack_visual_indexes" not in vision:
        findings.add("hybrid", "of no deepstack_visual_indexes it makes mergers that it never loads",
                     way='set "deepstack_visual_indexes": [] in vision_config')  # fmt: skip
    if architecture != NEMOTRON:
        return
    for key in ("layers_block_type", "mtp_layers_block_type"):
        kinds = text.get(key)
        if isinstance(kinds, list) and (odd := sorted({str(kind) for kind in kinds} - _WORDS)):
            findings.add("hybrid", f"{key} has {odd[0]}, and it knows {', '.join(sorted(_WORDS))}",
                         way="say mamba and attention there, as NVIDIA does")  # fmt: skip
    groups = text.get("mamba_n_groups", _GROUPS)
    if checkpoint.number("n_groups") != groups:
        findings.add("hybrid", f"it takes Mamba for one of {groups} groups, and config.json has n_groups of {text.get('n_groups')}",
                     way='set "mamba_n_groups" to the same number')  # fmt: skip


def _check_interval(text: dict, findings: Findings) -> None:
    interval, kinds = text.get("full_attention_interval"), text.get("layer_types")
    if not isinstance(interval, int) or interval < 1:
        findings.add("hybrid", "config.json does not say full_attention_interval",
                     way='set "full_attention_interval" to how often attention is not linear')  # fmt: skip
    elif isinstance(kinds, list):
        full = [number for number, kind in enumerate(kinds, 1) if kind == "full_attention"]
        if full != list(range(interval, len(kinds) + 1, interval)):
            findings.add(
                "hybrid", f"it takes every {interval}th layer for one of full attention, and layer_types has others"
            )


def quantizes_predicting(checkpoint: CheckpointView, reading: Reading) -> bool:
    """Whether it builds layers that predict one more token with the config: not those of Qwen 3.5 if all is in four bits, or a
    mix that lists none of them.
    """
    if checkpoint.architecture not in QWEN35 or reading.dialect != "modelopt":
        return True
    if reading.algorithm:
        return "NVFP4" not in reading.algorithm
    return any(name.startswith("mtp.") for name in reading.layers)
