"""Settings of ModelOpt's quantizers whose buffers were saved without them: those of the formats that the buffers fit."""

from math import prod

from ...checkpoint.torch_dist_addons import Attributes
from ...common.errors import report
from .quantizers import Quantizers, by_module

_E4M3: Attributes = {"_num_bits": (4, 3)}
_NVFP4: Attributes = {"_num_bits": (2, 1), "_block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
_ROUNDING = {"fp8": _E4M3, "nvfp4": _NVFP4, "nvfp4_awq": _NVFP4, "w4a8_awq": _E4M3}  # with one amax for all
# Whether weights have an amax for each block, whether another quantizer follows that, whether inputs have an amax, and whether they
# are multiplied by a vector before.
_FITTING = {
    (False, False, True, False): ["fp8", "nvfp4"],
    (False, False, True, True): ["nvfp4_awq"],
    (True, False, False, False): ["fp8_pb"],
    (True, False, False, True): ["int4_awq"],
    (True, True, True, True): ["w4a8_awq"],
}


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
        fits, flag, asked = (["fp8", "nvfp4"], "kv-cache", kv_cache) if cached else (_fitting(parts), "format", format)
        kind = asked or (fits[0] if len(fits) == 1 else None)
        if kind not in fits:
            problems.append((f"they fit {' and '.join(fits)}: say --{flag}" if fits else "they fit no format", module))
            continue
        for name, attributes in parts.items():
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
    blocks, follows = prod(weights["_amax"].shape) > 1, "weight_quantizer.1" in parts
    return _FITTING.get((blocks, follows, "_amax" in inputs, "_pre_quant_scale" in inputs), [])


def _settings(kind: str, name: str, attributes: Attributes, columns: int) -> Attributes:
    """The settings of one quantizer of a format."""
    if "_amax" not in attributes:
        return {"_num_bits": 8, "_disabled": True}
    if name in ("weight_quantizer", "weight_quantizer.0") and kind == "fp8_pb":
        return {"_num_bits": (4, 3), "_block_sizes": {-1: 128, -2: 128}}
    if name in ("weight_quantizer", "weight_quantizer.0") and kind in ("int4_awq", "w4a8_awq"):
        return {"_num_bits": 4, "_block_sizes": {-1: columns // attributes["_amax"].shape[-1]}}
    return _ROUNDING[kind]
