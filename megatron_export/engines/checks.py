"""What every engine demands: files that fit the index, all tensors of the model, and for each linear the tensors of the algorithm
that the engine takes it for. Rules have the same names in each engine's table; their effects differ.
"""

import re
from collections.abc import Iterator, Mapping

from ..common.folder_kinds import HEADLESS, is_headless
from .architectures import ARCHITECTURES, Built
from .checkpoint_view import SCALES, CheckpointView, Group, Module, View, is_mtp, is_quantized
from .exclude_lists import Partly
from .gpus import GPUS
from .quant_configs import AlgorithmOf, Reading, group_size_in
from .tensor_parallel import check_shared
from .tensor_specs import HARMLESS, MXFP4_EXPERTS, named, size_of, wanted
from .verdict import Findings, Rule

Expected = dict[str, tuple[int, ...]]  # HF tensor -> shape
AGAIN = "fetch it again, or export it again"


def check_tensors(rules: dict[str, Rule], checkpoint: CheckpointView, view: View) -> Findings:
    """New findings of an engine with these rules: missing and extra files and tensors, however linears are quantized."""
    findings = Findings(rules)
    check_files(checkpoint, findings)
    _check_model(checkpoint, view, findings)
    return findings


def check_codes(
    checkpoint: CheckpointView,
    view: View,
    reading: Reading,
    algorithm_of: AlgorithmOf,
    optional: Mapping[str, frozenset[str]],
    tp: int,
    findings: Findings,
) -> bool:
    """Every linear against the algorithm that the engine takes it for, and against `tp` GPUs that share it.

    `optional` has for an algorithm the suffixes of tensors that the engine does not need. Returns False if there are codes and no
    config says which: then nothing more can be checked.
    """
    if reading.algorithm is None and any(group.quantized for group in view.groups):
        findings.add("unquantized", "weights are stored in codes, and neither config says so", way=AGAIN)
        return False
    known: dict[tuple, tuple[tuple[str, str, str], ...]] = {}
    for group in view.groups:
        if group.mtp:
            continue
        try:
            algorithm = algorithm_of(group)
        except Partly:
            parts, where = ", ".join(group.parts) or "experts", reading.where or "the config"
            why = f"{parts} are told apart in {where}, and the engine joins them"
            findings.add("partly", why, group.parent, way="exclude all of them, or none; one algorithm for all")
            continue
        group_size = group_size_in(reading, group, algorithm)
        alike = (algorithm, group_size, group.kind, group.parts)
        for name, module in group.members.items():
            key = (alike, id(module), shape := view.means.get(name))  # which alike modules share
            if key not in known and (algorithm is None or not is_quantized(module)):
                known[key] = tuple(_agree(module, algorithm, reading.where))
            elif key not in known:
                size = size_of(module, algorithm) if shape is None and group.kind != "stack" else (shape or ())[-2:]
                known[key] = tuple(
                    _problems(module, algorithm, size, group, group_size, optional.get(algorithm, frozenset()))
                )
            for rule, why, way in known[key]:
                findings.add(rule, why, name, way=way)
    check_shared(checkpoint, view, algorithm_of, reading, tp, findings)
    return True


def release_of(version: str) -> tuple[int, ...]:
    """The first three numbers of a version, 0 where it has fewer, or () if it has none; words behind a number do not count."""
    found = tuple(map(int, re.findall(r"(?:^v?|\.)(\d+)", version)))
    return (*found, 0, 0)[:3] if found else ()


def check_config(checkpoint: CheckpointView, built: Built, findings: Findings) -> None:
    """What config.json must say, quantized or not, and must not: dual chunk attention (Qwen 2.5 with a million tokens)."""
    if lacking := [key for key in built.needs if checkpoint.text.get(key) is None]:
        findings.add("keys", f"config.json does not say {', '.join(lacking)}, which this architecture's class reads",
                     way="set it there as its publisher does, or export it again")  # fmt: skip
    if checkpoint.text.get("dual_chunk_attention_config") is not None and built.chunked:
        findings.add("chunks", "config.json asks for dual chunk attention, which it cannot compute any more",
                     way="take dual_chunk_attention_config out of config.json; up to its chunk_size nothing changes")  # fmt: skip


def check_capability(reading: Reading, gpu: str | None, least: dict[str, int], other: int, findings: Findings) -> None:
    """The GPU against the compute capability that each algorithm of the model needs: `least`, times ten, or else `other`."""
    algorithms = sorted({one for one in (reading.algorithm, *reading.layers.values()) if one})
    algorithm = max(algorithms, key=lambda one: least.get(one, other), default="")
    needed = least.get(algorithm, other)
    if gpu is not None and GPUS[gpu] < needed:
        has = GPUS[gpu] / 10
        findings.add("gpu", f"{algorithm} needs compute capability {needed / 10:g}, {gpu} has {has:g}")


def check_files(checkpoint: CheckpointView, findings: Findings) -> None:
    """The files against the index."""
    if lacking := sorted(set((checkpoint.index or {}).values()) - set(checkpoint.files)):
        findings.add("files", "the index names it, and it is not there", *lacking, way="fetch it again")
    if consolidated := [name for name in checkpoint.files if name.startswith("consolidated")]:
        findings.add("consolidated", "a file of Mistral's own format", *consolidated, way="move it out of the folder")
    if sum(map(len, checkpoint.files.values())) == len(checkpoint.whole.tensors):
        return  # each is in one file
    homes: dict[str, str] = {}
    for file, tensors in checkpoint.files.items():
        if twice := homes.keys() & tensors.keys():
            first = min(twice)
            why = f"it has {first} too, as {homes[first]} does; the one that is read last stays"
            findings.add("twice", why, file, way="leave in the folder only the files of one export")
        homes |= dict.fromkeys(tensors, file)


def _check_model(checkpoint: CheckpointView, view: View, findings: Findings) -> None:
    """The tensors against those that config.json means, quantized codes apart."""
    expected, shown = checkpoint.expected, checkpoint.architecture or "none"
    if expected is None:
        findings.add("architecture", f"no rules about the architecture {shown}: its tensors were not checked")
        return
    if is_headless(view.tensors):
        findings.add("architecture", f"no rules about {HEADLESS}: its tensors were not checked")
        return
    if checkpoint.architecture not in ARCHITECTURES:
        findings.add("architecture", f"no rules about the architecture {shown}: nobody has read how it is loaded")
    written_one_by_one = {group.parent for group in view.groups if group.kind == "experts"}
    for name, header in view.unfit:
        if header is None:
            _missing(checkpoint, name, written_one_by_one, findings)
        else:
            why = f"it is {list(header.shape)}, and config.json means {list(expected[name])}"
            findings.add("shape", why, name, way="give the config.json that belongs to these weights")
    _check_names(checkpoint, expected, view, findings)


def _check_names(checkpoint: CheckpointView, expected: Expected, view: View, findings: Findings) -> None:
    """Whether the architecture has every tensor that is there."""
    for module in view.others:
        for suffix in view.modules[module]:
            if not _known(checkpoint, expected, module, suffix):
                findings.add("unknown", "no tensor of this architecture", f"{module}.{suffix}".strip("."),
                             way="move the file that has it out of the folder")  # fmt: skip


def _missing(checkpoint: CheckpointView, name: str, one_by_one: set[str], findings: Findings) -> None:
    container, inside, _ = name.partition(".experts.")
    if name.endswith("lm_head.weight") and checkpoint.tied:
        return
    if is_mtp(name, checkpoint.layers):
        why = "config.json means layers that predict one more token, and they are not there"
        findings.add("mtp", why, way="export with --mtp keep, or serve without speculative decoding")
    elif inside and f"{container}.experts" in one_by_one and name.rpartition(".")[0] == f"{container}.experts":
        return  # a stack that is written expert by expert
    elif inside:
        findings.add("experts", "a routed expert that is not there", name, way=AGAIN)
    else:
        findings.add("missing", "it is not there", name, way=AGAIN)


def _known(checkpoint: CheckpointView, expected: Expected, module: str, suffix: str) -> bool:
    """Whether the architecture has this tensor, in a checkpoint that may be quantized."""
    name = f"{module}.{suffix}"
    if name in expected or (suffix == "weight" and module in expected) or name.startswith(checkpoint.copied):
        return True
    if name.endswith(("lm_head.weight", "rotary_emb.inv_freq")):
        return True
    container, inside, _ = module.partition(".experts.")
    stacked = bool(inside) and f"{container}.experts.down_proj" in expected
    of_module = f"{module}.weight" in expected or module in expected or stacked
    return of_module and (suffix in SCALES or suffix == "weight" or (stacked and suffix == "bias"))


def check_mtp(view: View, findings: Findings, algorithm_of: AlgorithmOf) -> None:
    """Layers that predict one more token, which engines load with the same config for speculative decoding."""
    for group in view.groups:
        if not group.mtp or group.kind not in ("linear", "experts"):
            continue
        try:
            quantizes = algorithm_of(group) is not None
        except Partly:
            quantizes = not group.quantized
        if quantizes != group.quantized:
            how = "quantized and" if group.quantized else "in bfloat16 and not"
            why = f"speculative decoding with it fails: it is stored {how} left out"
            findings.add("mtp left out", why, group.parent, way="name its layer in the list with a star")


def _agree(module: Module, algorithm: str | None, ignored: str) -> Iterator[tuple[str, str, str]]:
    """Of a linear that the file has in bfloat16, or the engine takes for one: whether both agree."""
    if algorithm is None and is_quantized(module):
        why = f"it is stored in {module['weight'].dtype}, and by the config it is not quantized"
        yield "left out", why, f"take it out of {ignored}, or store it in bfloat16"
    elif algorithm is not None and not is_quantized(module):
        why = f"it is stored in {module['weight'].dtype}, and by the config it is quantized in {algorithm}"
        yield "not left out", why, f"name it in {ignored}"


def _problems(
    module: Module, algorithm: str, size: tuple[int, ...], group: Group, group_size: int, optional: frozenset[str]
) -> Iterator[tuple[str, str, str]]:
    if group.kind == "stack":
        yield from _of_stack(module, algorithm, size)
        return
    wants = wanted(algorithm, *size, group_size)
    joined = len(group.parts) > 1
    for suffix, (dtypes, shapes) in wants.items():
        header = module.get(suffix)
        if header is None:
            if suffix not in optional and not (suffix == "pre_quant_scale" and (joined or group.kind == "experts")):
                yield "scale", f"its {suffix} is not there, which {algorithm} needs", AGAIN
        elif header.dtype not in dtypes:
            yield "dtype", f"its {suffix} is {header.dtype}, and {algorithm} has {' or '.join(dtypes)}", ""
        elif header.shape not in shapes:
            yield "shape", f"its {suffix} is {list(header.shape)}, and {algorithm} has {named(shapes)}", ""
    for suffix in sorted(module.keys() - wants.keys() - HARMLESS - optional):
        yield "extra", f"its {suffix} is no tensor of {algorithm}", ""


def _of_stack(module: Module, algorithm: str, size: tuple[int, ...]) -> Iterator[tuple[str, str, str]]:
    """Experts in one tensor [experts, inputs, outputs]: their scales have its name with _weight_scale and so on."""
    fp4 = {"weight_scale", "weight_scale_2"}
    needs = {"FP8": {"weight_scale", "input_scale"}, "NVFP4": fp4 | {"input_scale"}, "W4A16_NVFP4": fp4}
    for suffix in sorted(needs.get(algorithm, {"weight_scale"}) - module.keys()):
        yield "scale", f"its {suffix} is not there, which {algorithm} needs", AGAIN
    if algorithm == MXFP4_EXPERTS:
        yield from _in_blocks(module, size)
        return
    packed = 2 if module["weight"].dtype == "U8" else 1
    if size and module["weight"].shape[-2:] != (size[0] // packed, size[1]):
        yield "shape", f"its weight is {list(module['weight'].shape)}, and experts are {list(size)}", AGAIN


def _in_blocks(module: Module, size: tuple[int, ...]) -> Iterator[tuple[str, str, str]]:
    """Experts as OpenAI has them: a scale for each block of 32 inputs, whose codes are 16 bytes."""
    for kept, suffix, codes in (("blocks", "weight", (16,)), ("scales", "weight_scale", ())):
        header, shape = module.get(suffix), (size[1], size[0] // 32, *codes)
        if header is not None and header.dtype != "U8":
            yield "dtype", f"its {kept} are {header.dtype}, and MXFP4 has U8", AGAIN
        elif header is not None and header.shape[1:] != shape:
            yield "shape", f"its {kept} are {list(header.shape)}, and each expert has {list(shape)}", AGAIN
