"""Calibration statistics on disk: one safetensors file of float32 scalars, named by HF module, for any topology.

    model.layers.0.self_attn.q_proj.input_amax     every linear, fused ones under each of their HF names
    model.layers.0.self_attn.k_proj.k_amax         and v_proj.v_amax, for the KV cache

The file's metadata holds the sizes of the model that it was measured on.
"""

import json
from dataclasses import asdict
from pathlib import Path
from secrets import token_hex

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import ExportError, report
from .names import is_linear_weight, makes_keys, parameters_of, shape_of

KIND = "megatron_export statistics 1"


def input_key(canonical: str) -> str:
    """The statistic of a linear weight's input."""
    return canonical.removesuffix("weight") + "input_amax"


def kv_keys(canonical: str) -> tuple[str, str]:
    """The statistics of the keys and the values that a fused qkv weight makes."""
    attention = canonical.rsplit(".", 2)[0]
    return f"{attention}.k_amax", f"{attention}.v_amax"


def hf_keys(config: dict) -> dict[str, list[str]]:
    """Name of every statistic in memory (by Megatron module) -> its names on disk (by HF module)."""
    keys = {}
    for name, source in parameters_of(config).items():
        if not is_linear_weight(name):
            continue
        modules = [hf.removesuffix("weight") for hf in source.names().values()]
        keys[input_key(name)] = [module + "input_amax" for module in modules]
        if makes_keys(name):
            k_amax, v_amax = kv_keys(name)
            keys |= {k_amax: [modules[1] + "k_amax"], v_amax: [modules[2] + "v_amax"]}
    return keys


def save(statistics: dict[str, Tensor], file: Path, config: dict) -> None:
    """Write the statistics of a model of config.json's dict to `file`, replacing it in one step."""
    tensors = {hf: statistics[name].clone() for name, on_disk in hf_keys(config).items() for hf in on_disk}
    partial = file.with_name(f".{file.name}.{token_hex(4)}.partial")
    save_file(tensors, partial, metadata={"kind": KIND, "model": json.dumps(asdict(shape_of(config)))})
    partial.replace(file)


def check_kind(file: Path) -> None:
    """Raise unless `file` is one that `save` wrote, so that it may be replaced by another."""
    _read(file)


def load(file: Path, config: dict) -> dict[str, Tensor]:
    """Read statistics back. `ExportError` when the file is not one, or was measured on a model of other sizes."""
    if not file.is_file():
        raise ExportError(f"no calibration file {file}. Write one with --save-calibration")
    metadata, found = _read(file)
    theirs, ours = json.loads(metadata["model"]), asdict(shape_of(config))
    report(
        [
            f"{file}: measured on another model: its {k} is {theirs.get(k)!r}, here {v!r}"
            for k, v in ours.items()
            if theirs.get(k) != v
        ]
    )
    keys = hf_keys(config)
    report([f"{file}: {hf} is missing" for on_disk in keys.values() for hf in on_disk if hf not in found])
    return {name: torch.stack([found[hf] for hf in on_disk]).amax(0) for name, on_disk in keys.items()}


def _read(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise ExportError(
            f"{file}: not a readable safetensors file ({error}). Write it again with --save-calibration"
        ) from error
    if metadata.get("kind") != KIND:
        raise ExportError(f"{file}: not a calibration file written by --save-calibration. Give another")
    return metadata, found
