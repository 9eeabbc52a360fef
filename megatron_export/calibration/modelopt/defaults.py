"""Settings of ModelOpt's quantizers whose buffers were saved without them: those of the formats that the buffers fit."""

from math import prod

from ...checkpoint.torch_dist_addons import Attributes, has_blocks
from ...common.errors import report
from .quantizers import Quantizers, by_module
from .settings import CACHES, LINEARS, grouped

_CHAIN = {"weight_quantizer": 0, "weight_quantizer.0": 0, "weight_quantizer.1": 1}  # which of a weight's quantizers


def supposed(
    quantizers: Quantizers, columns: dict[str, int], format: str | None, kv_cache: str | None, where: object
) -> Quantizers:
    """The quantizers, those without settings with what they must have had.

    `columns` are the inputs of each linear, `format` and `kv_cache` what is asked for; `ExportError`, which begins with `where`, if
    several fit and none is asked for, or another one.
    """
    found, problems = dict(quantizers), []
    for module, parts in by_module(quantizers).items():
        if all("_num_bits" in attributes for attributes in parts.values()):
            continue
        cached = any("_bmm_" in name for name in parts)
        fits = [name for name, settings in CACHES.items() if settings] if cached else _fitting(parts)
        flag, asked = ("kv-cache", kv_cache) if cached else ("format", format)
        kind = asked or (fits[0] if len(fits) == 1 else None)
        if kind not in fits:
            problems.append((f"they fit {' and '.join(fits)}: say --{flag}" if fits else "they fit no format", module))
            continue
        for name, attributes in (parts if cached else {"input_quantizer": {}} | parts).items():  # one without buffers
            owner = f"{module}.core_attention" if cached else module
            found[f"{owner}.{name}"] = _settings(kind, name, attributes, columns.get(module, 0)) | attributes
    first = {problem: module for problem, module in reversed(problems)}
    report(
        [
            f"{where}: nothing says how the quantizers of {module} round: it was saved without its _extra_state, and by their "
            f"buffers {problem}"
            for problem, module in first.items()
        ]
    )
    return found


def _fitting(parts: dict[str, Attributes]) -> list[str]:
    """The formats that the buffers of a linear's quantizers fit."""
    weights = parts.get("weight_quantizer.0") or parts.get("weight_quantizer", {})
    inputs = parts.get("input_quantizer", {})
    if "_amax" not in weights:
        return []
    several, smoothed = prod(weights["_amax"].shape) > 1, "_pre_quant_scale" in inputs
    by_row = several and not smoothed and weights["_amax"].shape[1:] == (1,)
    seen = (
        several and not by_row,
        by_row,
        "weight_quantizer.1" in parts,
        "_amax" in inputs,
        smoothed,
    )
    return [
        name
        for name, its in LINEARS.items()
        if its.weights
        and (8, 0) not in its.weights[0].get("_block_sizes", {}).values()  # which need no amax
        and seen
        == (
            has_blocks(its.weights[0]),
            "_axis" in its.weights[0],
            len(its.weights) > 1,
            its.inputs is not None and "_dynamic" not in its.inputs,
            its.smoothed,
        )
    ]


def _settings(kind: str, name: str, attributes: Attributes, columns: int) -> Attributes:
    """The settings of one quantizer of a format."""
    inputs = LINEARS[kind].inputs if name == "input_quantizer" else None
    if inputs and "_dynamic" in inputs:
        return inputs
    if "_amax" not in attributes:
        return {"_num_bits": 8, "_disabled": True}
    if "_bmm_" in name:
        return CACHES[kind]
    if name in _CHAIN:
        first = LINEARS[kind].weights[_CHAIN[name]]
        return grouped(first, columns // attributes["_amax"].shape[-1]) if has_blocks(first) else first
    return LINEARS[kind].inputs
