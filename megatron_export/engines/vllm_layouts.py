"""How vLLM lays out the linears and experts of a quantized model: what it does not load, and in which blocks."""

from .architectures import Built, built_by
from .checkpoint_view import CheckpointView, Group
from .exclude_lists import Partly
from .hybrids import NEXT, rows_of_parts
from .quant_configs import AlgorithmOf, Reading
from .verdict import Findings


def check_queries(checkpoint: CheckpointView, findings: Findings) -> None:
    """Ministral 3's queries grow with their position, by the logarithm, beyond the first few thousand tokens."""
    said = checkpoint.text.get("rope_parameters")
    if not isinstance(said, dict) or not said.get("llama_4_scaling_beta") or checkpoint.text.get("llama_4_scaling"):
        return
    first = said.get("original_max_position_embeddings")
    read = f'{{"beta": {said["llama_4_scaling_beta"]}, "original_max_position_embeddings": {first}}}'
    findings.add("queries", f"it does not scale queries from position {first} on, as rope_parameters say",
                 way=f'set "llama_4_scaling": {read} beside rope_parameters')  # fmt: skip


def check_layouts(checkpoint: CheckpointView, reading: Reading, algorithm_of: AlgorithmOf, findings: Findings) -> None:
    """New findings about how linears and experts are stored."""
    if checkpoint.architecture == "GptOssForCausalLM" and reading.dialect == "native":
        return
    if checkpoint.architecture == "GptOssForCausalLM":
        why = f"it does not load this architecture in {reading.algorithm or 'a mix'}"
        findings.add("gpt_oss", why, way="--format bf16")
        return
    built = built_by("vllm", checkpoint)
    for group in checkpoint.indexed.groups:
        if group.mtp or not group.quantized:
            continue
        if group.kind == "stack" and checkpoint.architecture != "Llama4ForConditionalGeneration":
            findings.add("stack", f"it does not load stacked experts of {checkpoint.architecture} with scales",
                         *group.members, way="export it again: experts of this architecture are written one by one")  # fmt: skip
            continue
        try:
            algorithm = algorithm_of(group)
        except Partly:
            continue
        _check_group(checkpoint, built, group, algorithm, findings)


def _check_group(
    checkpoint: CheckpointView, built: Built, group: Group, algorithm: str | None, findings: Findings
) -> None:
    if group.kind == "head" and not built.head:
        findings.add("head", "it does not load a quantized output layer of this architecture", *group.members,
                     way="leave lm_head as it is")  # fmt: skip
    if group.kind == "experts" and algorithm in ("FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN"):
        way = "--fp8-pb-spelling native" if algorithm == "FP8_PB_WO" else "--format fp8 or fp8_pb"
        findings.add("block experts", f"it does not load experts in {algorithm}", group.parent, way=way)
    if algorithm in ("blocks", "FP8_PB_WO"):
        _check_blocks(checkpoint, group, algorithm, findings)
    if algorithm == "blocks" and not built.inverse:
        findings.add("inverse", "its model renames weight_scale_inv, and then does not know it", group.parent,
                     way="--format fp8 or nvfp4")  # fmt: skip


def _check_blocks(checkpoint: CheckpointView, group: Group, algorithm: str, findings: Findings) -> None:
    for name, module in group.members.items():
        rows, inputs = module["weight"].shape[-2:]
        last = name.rpartition(".")[2] == group.parts[-1] if group.parts else name.endswith(("down_proj", "w2"))
        inside = () if checkpoint.architecture == NEXT else rows_of_parts(checkpoint, name)
        parts = inside or (rows,)
        odd = next((part for part in (parts[:-1] if last else parts) if part % 128), 0)
        if algorithm == "blocks" and odd:
            findings.add("blocks", f"its {odd} rows are no whole blocks of 128, which vLLM wants of q, k, gate and experts",
                         name, way="--format fp8 or nvfp4, or --exclude it and those that it is joined with")  # fmt: skip
        if algorithm == "FP8_PB_WO" and inputs % 128:
            findings.add("inputs", f"its {inputs} inputs are no whole blocks of 128", name, way="--format fp8 or nvfp4")


def check_indexers(checkpoint: CheckpointView, built: Built, findings: Findings) -> None:
    """Layers of sparse attention with an indexer: it reads a pattern of letters, or a frequency, and not `indexer_types`."""
    if not built.patterned:
        return
    pattern, every = checkpoint.text.get("index_topk_pattern"), checkpoint.text.get("index_topk_freq", 1)
    first = checkpoint.text.get("index_skip_topk_offset", 2)
    if pattern is not None:
        mine = [letter != "S" for letter in pattern][: checkpoint.layers] if isinstance(pattern, str) else []
    elif isinstance(every, int) and every > 0 and isinstance(first, int):
        mine = [max(layer - first + 1, 0) % every == 0 for layer in range(checkpoint.layers)]
    else:
        mine = []
    there = {name.partition(".self_attn.")[0] for name in checkpoint.indexed.tensors if ".self_attn.indexer." in name}
    held = [f"model.layers.{layer}" in there for layer in range(checkpoint.layers)]
    if held != mine:
        letters = "".join("F" if one else "S" for one in held)
        findings.add("indexers", "config.json means other layers with an indexer than are there",
                     way=f'set "index_topk_pattern": "{letters}" there')  # fmt: skip
