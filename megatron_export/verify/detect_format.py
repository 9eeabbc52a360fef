"""What a finished checkpoint says that it is, in three places that no engine compares: the dtypes and scales of its tensors,
hf_quant_config.json, and config.json's `quantization_config`.

The tensors are believed; where a config says something else, that is a problem of the config.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

from ..formats import Options
from .folder import Finished, json_of

# quant_algo -> dtype of the codes, the tensor of scales, its dtype, its dims, which other scales are there
# fmt: off
SIGNS = {
    "FP8":              ("F8_E4M3", "weight_scale",     "F32",     0, {"input_scale"}),
    "FP8_PB_WO":        ("F8_E4M3", "weight_scale",     "F32",     4, set()),
    "FP8_BLOCK_SCALES": ("F8_E4M3", "weight_scale_inv", "F32",     2, set()),
    "NVFP4":            ("U8",      "weight_scale",     "F8_E4M3", 2, {"input_scale", "weight_scale_2"}),
    "W4A16_AWQ":        ("U8",      "weight_scale",     "F32",     2, set()),
    "W4A8_AWQ":         ("U8",      "weight_scale",     "F32",     2, {"input_scale", "weight_scale_2"}),
}
FORMATS = {
    "FP8": "fp8", "FP8_PB_WO": "fp8_pb", "FP8_BLOCK_SCALES": "fp8_pb", "NVFP4": "nvfp4", "W4A16_AWQ": "int4_awq",
    "W4A8_AWQ": "w4a8_awq",
}
# fmt: on
_SCALED = re.compile(r"(.+?)([._])(weight_scale(?:_inv|_2)?|input_scale|pre_quant_scale)")
_CODES = ("U8", "F8_E4M3")


@dataclass(frozen=True)
class Described:
    """What a checkpoint is.

    algorithm   as the tensors show it, None for a checkpoint that is not quantized
    format      its name here, with its options
    kv          name of the KV cache's format
    quantized   HF modules, or stacks of experts, that have codes or scales
    excludes    by file, the modules that it names as not quantized
    problems    where configs and tensors contradict one another
    """

    algorithm: str | None
    format: str
    options: Options
    kv: str
    quantized: frozenset[str]
    excludes: dict[str, list[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def described(found: Finished) -> Described:
    """Read what a checkpoint is off its headers and its two configs."""
    inner = _table(json_of(found.folder, "config.json").get("quantization_config"))
    outer = _table(json_of(found.folder, "hf_quant_config.json").get("quantization"))
    quantized = _quantized(found)
    claims = {
        "config.json": _claimed(inner.get("quant_algo") or _native(inner)),
        "hf_quant_config.json": _claimed(outer.get("quant_algo")),
    }
    claims = {file: claim for file, claim in claims.items() if claim or (file == "config.json") or outer}
    algorithm = _algorithm(found, quantized, {_plain(claim) for claim in claims.values()})
    problems = [
        f"{file} says quant_algo {claim}, but the tensors are those of {algorithm or 'a model that is not quantized'}"
        for file, claim in claims.items()
        if _plain(claim) != algorithm
    ]
    caches = {file: _cache(said) for file, said in (("config.json", inner), ("hf_quant_config.json", outer)) if said}
    kv = next((cache for cache in caches.values() if cache), None)
    if len(set(caches.values())) > 1:
        told = " but ".join(f"{cache or 'none'} in {file}" for file, cache in caches.items())
        problems.append(f"the KV cache is {told}")
    scaled = sorted(name for name in found if name.endswith((".k_scale", ".v_scale")))
    if scaled and kv is None:
        problems.append(f"{scaled[0]} is there, but no config says that the KV cache is quantized")
    kept = any(name.endswith("pre_quant_scale") for name in found) or "NVFP4_AWQ" in claims.values()
    kept = kept and algorithm == "NVFP4"
    return Described(
        algorithm=algorithm,
        format="bf16" if algorithm is None else FORMATS[algorithm] + "_awq" * kept,
        options=Options(
            group_size=_group_size(found, quantized) if algorithm in ("W4A16_AWQ", "W4A8_AWQ") else 128,
            fp8_pb_spelling="modelopt" if algorithm == "FP8_PB_WO" else "native",
            awq_output="modelopt" if kept else "folded",
        ),
        kv=kv or ("fp8" if scaled else "none"),
        quantized=frozenset(quantized),
        excludes=_excludes(inner, outer),
        problems=problems,
    )


def module_of(name: str) -> tuple[str, str]:
    """A tensor's module, or the stack of experts that it belongs to, and its own name in it."""
    if found := _SCALED.fullmatch(name):
        return found[1], found[3]
    return (
        (name.removesuffix(".weight"), "weight") if name.endswith((".weight", "_up_proj", ".down_proj")) else ("", name)
    )


def _quantized(found: Finished) -> dict[str, dict[str, str]]:
    """Module -> name in it -> tensor, of every module that has codes or scales."""
    modules: dict[str, dict[str, str]] = {}
    for name in found:
        module, local = module_of(name)
        modules.setdefault(module, {})[local] = name
    return {
        module: tensors
        for module, tensors in modules.items()
        if module and (len(tensors) > 1 or ("weight" in tensors and found.spelled(tensors["weight"]) in _CODES))
    }


def _algorithm(found: Finished, quantized: dict[str, dict[str, str]], claims: set[str | None]) -> str | None:
    """The algorithm whose signs most modules bear; of two alike, the one that a config names."""
    votes: Counter[str] = Counter()
    for tensors in quantized.values():
        for algorithm, (codes, scale, dtype, dims, others) in SIGNS.items():
            votes[algorithm] += (
                ("weight" in tensors and found.spelled(tensors["weight"]) == codes)
                + (scale in tensors and found.spelled(tensors[scale]) == dtype)
                + (scale in tensors and len(found.shape(tensors[scale])) == dims)
                + ({"weight_scale_2", "input_scale"} & tensors.keys() == others)
            )
    return max(votes, key=lambda algorithm: (votes[algorithm], algorithm in claims)) if votes else None


def _group_size(found: Finished, quantized: dict[str, dict[str, str]]) -> int:
    sizes = Counter(
        found.shape(tensors["weight"])[-1] // found.shape(tensors["weight_scale"])[-1]
        for tensors in quantized.values()
        if {"weight", "weight_scale"} <= tensors.keys() and found.shape(tensors["weight_scale"])
    )
    most = sizes.most_common(1)[0][0] if sizes else 128
    return most if most in (64, 128) else 128


def _table(said: object) -> dict:
    return said if isinstance(said, dict) else {}


def _native(inner: dict) -> str | None:
    return "FP8_BLOCK_SCALES" if inner.get("quant_method") == "fp8" and inner.get("weight_block_size") else None


def _claimed(said: object) -> str | None:
    return said.upper() if isinstance(said, str) else None


def _plain(claim: str | None) -> str | None:
    return "NVFP4" if claim == "NVFP4_AWQ" else claim


def _cache(said: dict) -> str | None:
    """The KV cache's format that one config means."""
    scheme = said.get("kv_cache_quant_algo") or said.get("kv_cache_scheme")
    if isinstance(scheme, dict):
        scheme = {8: "FP8", 4: "NVFP4"}.get(scheme.get("num_bits"))
    return scheme.lower() if isinstance(scheme, str) else None


def _excludes(inner: dict, outer: dict) -> dict[str, list[str]]:
    lists = {"config.json": inner.get("ignore") or inner.get("modules_to_not_convert")} if inner else {}
    lists |= {"hf_quant_config.json": outer.get("exclude_modules")} if outer else {}
    return {file: [str(entry) for entry in said] if isinstance(said, list) else [] for file, said in lists.items()}
