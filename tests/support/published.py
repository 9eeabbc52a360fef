"""Published quantized checkpoints: their configs as published, and files with headers of the right shapes and no data.

`golden/published.json.gz` has config.json and hf_quant_config.json of each, by its name on the Hub, as of August 2026. Models have
two experts of their many, so that headers stay small; layers, and lists of modules, are all there.
"""

import gzip
import json
from fnmatch import fnmatchcase
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from megatron_export.common.errors import ExportError
from megatron_export.engines import Header
from megatron_export.models import is_linear_weight, parameters_of
from megatron_export.models.sources import Source, expected_shapes, part_shapes

from .models import GOLDEN

EXPERTS = 2
_FEWER = {
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "num_experts_per_tok"), EXPERTS),
    **dict.fromkeys(("n_group", "topk_group"), 1),
}
_LISTS = ("ignore", "exclude_modules", "modules_to_not_convert")
_BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1, "I32": 4}


@cache
def published() -> dict[str, dict[str, Any]]:
    """Name on the Hub -> config and quant (None if there is no hf_quant_config.json), with fewer experts."""
    found = json.loads(gzip.decompress((GOLDEN / "published.json.gz").read_bytes()))
    for said in found.values():
        for part in (said["config"], said["config"].get("text_config", {})):
            part |= {key: min(part[key], most) for key, most in _FEWER.items() if isinstance(part.get(key), int)}
    return found


def stored(said: dict[str, Any]) -> dict[str, Header]:
    """The tensors of a checkpoint, each linear as the configs say that its publisher left it or quantized it."""
    inner = said["config"].get("text_config", {})
    inline = said["config"].get("quantization_config") or inner.get("quantization_config")
    section = (said["quant"] or {}).get("quantization") or inline
    held: dict[str, Header] = {}
    try:
        sources = parameters_of(said["config"])
    except ExportError:  # an architecture without rules: what its lists name
        return {f"{name}.weight": Header("BF16", (128, 128)) for name in ("lm_head", "model.layers.0.self_attn.q_proj")}
    for canonical, source in sources.items():
        if section.get("quant_method") == "mxfp4" and source.stack:
            held |= _stack_of_openai(source)
            continue
        dtype = "F32" if canonical.endswith("expert_bias") else "BF16"
        shapes = part_shapes(source)
        for part, name in source.names().items():  # with copies of other tensors, which have no shape of their own
            shape = shapes.get(part, source.shape)
            module = name.removesuffix(".weight")
            algorithm = _algorithm(module, section) if _may_be_quantized(canonical) else None
            tensors = coded(*shape, algorithm) if algorithm else {"weight": Header(dtype, shape)}
            held |= {f"{module}.{suffix}" if name != module else module: one for suffix, one in tensors.items()}
            if canonical.endswith("linear_qkv.weight") and part in ("k", "v") and _caches(section):
                held[f"{module}.{part}_scale"] = Header("F32", ())
    return held


def _may_be_quantized(canonical: str) -> bool:
    return (
        is_linear_weight(canonical)
        or canonical == "output_layer.weight"
        or canonical.endswith(("wq_b.weight", "wk.weight"))
    )


def _caches(section: dict[str, Any]) -> bool:
    return bool(section.get("kv_cache_quant_algo") or section.get("kv_cache_scheme"))


def _algorithm(module: str, section: dict[str, Any]) -> str | None:
    """What a publisher's config means a module to be stored in; None for bfloat16."""
    listed = [name for key in _LISTS for name in section.get(key) or ()]
    if any(fnmatchcase(module, name) or module.startswith(f"{name}.") for name in listed):
        return None
    if layers := section.get("quantized_layers"):
        experts = f"{module.partition('.experts.')[0]}.experts"
        found = layers.get(module) or (layers.get(experts) if ".experts." in module else None)
        return found["quant_algo"] if found else None
    method = section.get("quant_method")
    if module.endswith("lm_head") or method == "mxfp4":
        return None
    if method == "compressed-tensors":
        return "packed" if ".experts." in module else None
    return "blocks" if method == "fp8" else section["quant_algo"]


def _stack_of_openai(source: Source) -> dict[str, Header]:
    """The experts of a layer of GPT-OSS, as OpenAI stores them: rows of blocks of 32 inputs, two in a byte."""
    [(name, (count, *inputs, out))] = expected_shapes([source]).items()
    if not inputs:
        return {name: Header("BF16", (count, out))}
    blocks = inputs[0] // 32
    shapes = {"blocks": (count, out, blocks, 16), "scales": (count, out, blocks)}
    return {f"{name}_{kind}": Header("U8", shape) for kind, shape in shapes.items()}


def coded(rows: int, inputs: int, algorithm: str, mx_scale: str = "weight_scale") -> dict[str, Header]:
    """The tensors of a linear as ModelOpt, or of "blocks" as DeepSeek, stores it."""
    scalar = Header("F32", ())
    if algorithm == "blocks":
        blocks = -(-rows // 128), -(-inputs // 128)
        return {"weight": Header("F8_E4M3", (rows, inputs)), "weight_scale_inv": Header("F32", blocks)}
    if algorithm == "packed":  # by compressed-tensors: eight inputs of four bits in an integer
        packed = {"weight_packed": Header("I32", (rows, inputs // 8)), "weight_shape": Header("I32", (2,))}
        return packed | {"weight_scale": Header("BF16", (rows, inputs // 32))}
    if algorithm == "MXFP8":
        return {"weight": Header("F8_E4M3", (rows, inputs)), mx_scale: Header("U8", (rows, inputs // 32))}
    if algorithm == "FP8":
        return {"weight": Header("F8_E4M3", (rows, inputs)), "weight_scale": scalar, "input_scale": scalar}
    four = {"weight": Header("U8", (rows, inputs // 2)), "weight_scale": Header("F8_E4M3", (rows, inputs // 16))}
    return four | {"weight_scale_2": scalar} | ({"input_scale": scalar} if algorithm == "NVFP4" else {})


def write(folder: Path, said: dict[str, Any]) -> None:
    """A folder with the configs, and one file that is a header and a hole."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(said["config"]))
    if said["quant"]:
        (folder / "hf_quant_config.json").write_text(json.dumps(said["quant"]))
    header, offset = {}, 0
    for name, (dtype, shape) in stored(said).items():
        end = offset + prod(shape) * _BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
