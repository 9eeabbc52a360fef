"""What a release of SGLang is too old for."""

from .architectures import built_by
from .checkpoint_view import CheckpointView
from .exclude_lists import Partly
from .quant_configs import AlgorithmOf, Reading
from .releases import CHANGES, has
from .verdict import Findings


def check_release(
    checkpoint: CheckpointView, reading: Reading, version: str, algorithm_of: AlgorithmOf, findings: Findings
) -> None:
    """New findings about formats that the release does not know, and about models that it does not load."""
    asked = {reading.algorithm}
    for name, algorithm in reading.spelled.items():
        of_experts = algorithm == "FP8_PB_WO" and ".experts" in name
        asked.add(f"{algorithm} of experts in a mix" if of_experts else f"{algorithm} in a mix")
    if checkpoint.architecture == "GptOssForCausalLM" and "swiglu_limit" not in checkpoint.text:
        asked.add("no swiglu_limit")
    if built_by("sglang", checkpoint).routed and _shares_in_fp8(checkpoint, algorithm_of):
        asked.add("FP8 in shared experts")
    for change in sorted(asked & CHANGES["sglang"].keys()):
        if not has("sglang", change, version):
            one = CHANGES["sglang"][change]
            findings.add("old", f"release {version} does not know {one.says}", way=f"serve with {one.since} or later")


def _shares_in_fp8(checkpoint: CheckpointView, algorithm_of: AlgorithmOf) -> bool:
    """Whether experts that all tokens share are in FP8, of one scale each: models/deepseek_v2.py asked for the size of blocks."""
    for group in checkpoint.indexed.groups:
        try:
            if ".shared_experts" in group.parent and not group.mtp and algorithm_of(group) == "FP8":
                return True
        except Partly:
            pass
    return False
