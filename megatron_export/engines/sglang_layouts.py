"""How SGLang lays out the linears and experts of a quantized model: what it joins, in which blocks, and what it takes apart."""

from .architectures import Built, as_built, built_by
from .checkpoint_view import CheckpointView, Group
from .exclude_lists import IN_FILES, JOINED, Partly, full
from .gpus import BLACKWELL, GPUS
from .hybrids import NEXT, rows_of_parts
from .quant_configs import AlgorithmOf, Reading
from .tensor_specs import SCALAR
from .verdict import Findings

_NUMBERS = ("weight_scale", "weight_scale_2", "input_scale")


def check_layouts(
    checkpoint: CheckpointView, reading: Reading, algorithm_of: AlgorithmOf, gpu: str | None, findings: Findings
) -> None:
    """New findings about how linears and experts are stored."""
    if checkpoint.architecture == "GptOssForCausalLM" and reading.dialect == "modelopt":
        why = f"it does not load this architecture in {reading.algorithm or 'a mix'}"
        findings.add("gpt_oss", why, way="--format bf16")
    built = built_by("sglang", checkpoint)
    blackwell = gpu is not None and GPUS[gpu] >= BLACKWELL
    for group in checkpoint.indexed.groups:
        if group.mtp or not group.quantized:
            continue
        _check_architecture(checkpoint, reading, built, group, findings)
        if any("weight_scale_inv" in module for module in group.members.values()) or reading.algorithm == "MXFP8":
            _check_blocks(checkpoint, built, group, findings)
        _check_inputs(group, algorithm_of, blackwell, findings)


def _check_architecture(
    checkpoint: CheckpointView, reading: Reading, built: Built, group: Group, findings: Findings
) -> None:
    if checkpoint.architecture.startswith("Llama4"):
        _check_llama4(group, findings)
    if group.kind == "head" and not built.head:
        why = "it does not load a quantized output layer of this architecture"
        findings.add("head", why, *group.members, way="leave lm_head as it is")
    if group.kind == "linear" and group.parts in IN_FILES:
        _check_joined_file(group, findings)
    _check_hybrid(checkpoint, reading, group, findings)
    if reading.layers:
        _check_mixed(checkpoint, reading, built, group, findings)
    if checkpoint.latent and ".self_attn" in group.parent:
        _check_latent(group, findings)


def _check_joined_file(group: Group, findings: Findings) -> None:
    if _in_four_bits(group) and "input_scale" not in next(iter(group.members.values())):
        findings.add("joined file", "in W4A16_NVFP4 it fills no weight_scale_2 of what it would join by itself", *group.members,
                     way="--format nvfp4, or another for it")  # fmt: skip


def _check_mixed(checkpoint: CheckpointView, reading: Reading, built: Built, group: Group, findings: Findings) -> None:
    """It looks for the names of its own modules in quantized_layers: for joined linears, and for each expert of Mixtral alone."""
    group = as_built(group, built)
    said = {reading.layers.get(name) for name in group.members}
    joined = full(group.parent, JOINED.get(group.parts, ""))
    if group.parts in JOINED and not built.joining and reading.layers.get(joined) not in said - {None}:
        parts, name = ", ".join(group.parts), JOINED[group.parts]
        findings.add("mixed joined", f"it does not find {parts} of this architecture in quantized_layers", group.parent,
                     way=f"list {name} beside them there, in the same algorithm")  # fmt: skip
    if group.kind == "experts" and checkpoint.architecture == "MixtralForCausalLM" and None in said:
        findings.add("mixed joined", "it looks for each expert of this architecture in quantized_layers", group.parent,
                     way="quantize all of it in one algorithm")  # fmt: skip


def _check_llama4(group: Group, findings: Findings) -> None:
    module = next(iter(group.members.values()))
    if group.kind == "stack" and "weight_scale_2" in module:
        findings.add("stack", "does not load stacked experts in nvfp4", *group.members, way="--format fp8")
    if "q_proj" in group.parts and _in_four_bits(group):
        findings.add("rotated", "it puts rows of q and k in another order", group.parent, way="--exclude q, k and v")


def _check_hybrid(checkpoint: CheckpointView, reading: Reading, group: Group, findings: Findings) -> None:
    """Input projections of linear attention and Mamba, which it loads by itself, and q, k and v beside the former."""
    module, four = next(iter(group.members.values())), _in_four_bits(group)
    if group.parts == ("in_proj_qkvz",) and any(one in module and module[one].shape in SCALAR for one in _NUMBERS):
        findings.add("hybrid linear", "it expects four numbers where a scale is one", *group.members,
                     way="--exclude it, or --format fp8_pb or mxfp8")  # fmt: skip
    if group.parts == ("in_proj",) and four and "input_scale" not in module:
        findings.add("hybrid linear", "of weight_scale_2 it fills one of five numbers in W4A16_NVFP4", *group.members,
                     way="--exclude it, or --format nvfp4")  # fmt: skip
    if checkpoint.architecture == NEXT and "q_proj" in group.parts and four and reading.algorithm:
        findings.add("next qkv", "it builds q, k and v in bfloat16 where all of a model is in four bits", group.parent,
                     way="--exclude them, or give them --set GLOB=fp8")  # fmt: skip


def _check_inputs(group: Group, algorithm_of: AlgorithmOf, blackwell: bool, findings: Findings) -> None:
    """What becomes of the inputs of weights in four bits."""
    of_experts = group.kind == "experts"
    smoothed = any("pre_quant_scale" in module for module in group.members.values())
    if _in_four_bits(group) and smoothed and (of_experts or not blackwell):
        where = " to experts" if of_experts else " but on Blackwell"
        findings.add("awq", f"it does not apply pre_quant_scale{where}", group.parent, way="--awq-output folded")
    if not (of_experts and blackwell):
        return
    try:
        algorithm = algorithm_of(group)
    except Partly:
        return
    if algorithm == "W4A16_NVFP4":
        findings.add("expert inputs", "it rounds inputs of these experts to four bits, with a scale of 1", group.parent,
                     way="--format nvfp4, whose scales are measured, or --moe-runner-backend marlin")  # fmt: skip


def _in_four_bits(group: Group) -> bool:
    return next(iter(group.members.values()))["weight"].dtype == "U8"


def _check_blocks(checkpoint: CheckpointView, built: Built, group: Group, findings: Findings) -> None:
    """Of MXFP8 the loader itself renames weight_scale to weight_scale_inv, and that architecture's loses it likewise."""
    if not built.inverse and group.kind == "linear":
        findings.add("llama blocks", "this architecture's loader loses weight_scale_inv and computes without", group.parent,
                     way="--format fp8 or nvfp4, or a version with its pull request 30234")  # fmt: skip
    for name, module in group.members.items():
        parts = rows_of_parts(checkpoint, name) or (module["weight"].shape[0],)
        latent = name.endswith("kv_a_proj_with_mqa")  # the last of two that it takes for one
        joined = (
            len(group.parts) > 1
            or len(parts) > 1
            or (group.kind == "experts" and not name.endswith(("down_proj", "w2")))
        )
        in_blocks = module.get("weight_scale_inv", module["weight"]).dtype == "F32"
        odd = next((rows for rows in parts if rows % 128), 0)
        if in_blocks and joined and not latent and odd:
            findings.add("blocks", f"its {odd} rows are no whole blocks of 128, which SGLang wants of joined linears", name,
                         way="--format fp8 or nvfp4, or --exclude it and those that it is joined with")  # fmt: skip


def _check_latent(group: Group, findings: Findings) -> None:
    if group.parts == ("kv_b_proj",) and _in_four_bits(group):
        why = "it loads kv_b_proj in bfloat16, FP8 or blocks of FP8 alone"
        findings.add("latent", why, group.parent, way="without --quantize-mla")
    scales = [header for one in group.members.values() for suffix, header in one.items() if "scale" in suffix]
    if len(group.parts) == 2 and any(header.shape == (1,) for header in scales):
        way = "write them as numbers without dims"
        findings.add("latent scale", "its scales have a dim", group.parent, way=way)
