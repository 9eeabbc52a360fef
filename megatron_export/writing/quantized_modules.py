"""Checks which modules of a written checkpoint are quantized: the plan, the scales and the exclude lists on disk must agree."""

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..common.file_names import CONFIG, QUANT_CONFIG
from ..formats import SCALES, module_of
from ..planning.contents import Contents
from ..planning.tensor_spec import Output


def is_scale(name: str) -> bool:
    """Whether a tensor holds scales: of weights, inputs, keys and values."""
    return "scale" in name.rpartition(".")[2]


def module_problems(folder: Path, contents: Contents) -> list[str]:
    """Where the files, the exclude lists and the contents disagree on what is quantized."""
    outputs = [output for file in contents.files.values() for output in file]
    scaled = {module for module, local in (module_of(output.name) for output in outputs) if local in SCALES}
    meant = set(contents.quantized)
    problems = [f"{folder}: {module} has scales, but was to be left alone" for module in sorted(scaled - meant)]
    problems += [f"{folder}: {module} has no scales, but was to be quantized" for module in sorted(meant - scaled)]
    if not contents.quantized:
        return problems
    left = {module_of(output.name)[0] or output.name for output in outputs if _is_matrix(output)} - scaled
    inner = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["quantization_config"]
    outer = folder / QUANT_CONFIG
    outer = json.loads(outer.read_text(encoding="utf-8"))["quantization"] if QUANT_CONFIG in contents.jsons else {}
    for file, excluded in lists_in(inner, outer).items():
        matched = {module for module in scaled | left if any(covers(entry, module) for entry in excluded)}
        problems += [f"{folder / file} excludes {module}, which is quantized" for module in sorted(matched & scaled)]
        problems += [
            f"{folder / file} does not exclude {module}, which is not quantized" for module in sorted(left - matched)
        ]
    return problems


def _is_matrix(output: Output) -> bool:
    """Whether it is the weight of a linear, an embedding or a stack of experts."""
    return len(output.shape) > 1 and not is_scale(output.name) and not output.name.endswith("bias")


def covers(entry: str, module: str) -> bool:
    """Whether an entry of an exclude list is about a module: by its name, a glob, or that of what it is in."""
    return fnmatchcase(module, entry) or fnmatchcase(module, f"{entry}.*")


def lists_in(inner: dict, outer: dict) -> dict[str, Any]:
    """The exclude lists, by file, of config.json's `quantization_config` and hf_quant_config.json's `quantization`; {} has none."""
    lists = {CONFIG: inner.get("ignore") or inner.get("modules_to_not_convert")} if inner else {}
    return lists | ({QUANT_CONFIG: outer.get("exclude_modules")} if outer else {})
