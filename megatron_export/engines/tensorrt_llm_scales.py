"""Which scales TensorRT-LLM's loaders of joined linears and of experts take, and from where."""

from .checkpoint_view import Group
from .checks import AGAIN
from .quant_configs import Reading
from .verdict import Findings

_IN_INT4 = ("W4A16_AWQ", "W4A8_AWQ")
_OTHERS = "--format fp8 or nvfp4"


def check_inputs(group: Group, algorithm: str | None, reading: Reading, findings: Findings) -> None:
    """Scales of inputs that joined linears share, and AWQ's groups."""
    if group.kind != "linear":
        return
    joined, modules = len(group.parts) > 1, group.members.values()
    if joined and algorithm == "FP8" and len({"input_scale" in module for module in modules}) > 1:
        why = "some of its joined linears have an input_scale, and some have none"
        findings.add("joined inputs", why, group.parent, way=AGAIN)
    dropping = (algorithm or "").startswith("NVFP4") and "q_proj" in group.parts
    if joined and (dropping or algorithm == "W4A16_AWQ") and any("pre_quant_scale" in module for module in modules):
        why = "it does not read pre_quant_scale of what it joins"
        findings.add("joined factor", why, group.parent, way="fold it into the norm")
    sized = reading.group_size or any(one in reading.sizes for one in group.members)
    if algorithm in _IN_INT4 and not sized:
        findings.add(
            "group size", f"the config does not say the group_size of {algorithm}", way='set "group_size": 128'
        )


def check_experts(group: Group, algorithm: str | None, findings: Findings) -> None:
    """The scales of routed experts that are written one by one."""
    modules = group.members.values()
    if algorithm == "modelopt blocks":
        findings.add("block experts", "it reads scales of experts as weight_scale_inv alone", group.parent,
                     way="--fp8-pb-spelling native")  # fmt: skip
    elif algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
        findings.add("expert codes", "it has no loader of experts in this", group.parent, way=_OTHERS)
    elif algorithm in ("W4A16_AWQ", "W4A8_MXFP4_FP8"):
        findings.add(
            "expert int4", f"it loads experts in {algorithm} with an input_scale alone", group.parent, way=_OTHERS
        )
    elif algorithm == "W4A8_NVFP4_FP8":
        findings.add("expert backend", "with moe_config.backend TRTLLM")
    elif algorithm == "FP8" and not all("input_scale" in module for module in modules):
        findings.add(
            "expert inputs", "an expert has no input_scale, which is then left to chance", group.parent, way=AGAIN
        )
    elif algorithm == "W4A8_AWQ" and not all("pre_quant_scale" in module for module in modules):
        why = "an expert has no pre_quant_scale, as where norms have taken it over"
        findings.add("expert factors", why, group.parent, way=_OTHERS)
