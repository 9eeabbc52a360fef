"""Calibration statistics on disk: one safetensors file, named by HF module, for any topology.

Of every linear (fused ones under each of their HF names), [in] being its input channels:

    {module}.input_amax                float32 []
    {module}.input_channel_amax        float32 [in]           where an AWQ format was measured, as all that follows
    {module}.pre_quant_scale.{search}  float32 [in]           the vector that the search chose
    {module}.alpha.{search}            float32 []             and its alpha,
    {module}.losses.{search}           float64 [11]           among the losses of all alphas
    {module}.clip.{search}             uint8 [out, in/group]  with clipping, for int4: codes of its groups' ratios
    {module}.clip_ratio.{search}       float32 []             with clipping, for nvfp4

of the experts of a layer, which are measured together but for their clipping, under the name of one without its number:

    {experts}.tokens                   int64 [experts]        how many tokens each was given

and of every layer, for the KV cache: k_proj.k_amax and v_proj.v_amax float32 [], v_proj.v_channel_amax float32 [rows].
In memory the names are those of Megatron modules, and codes end in `.{layout part}`. A search is `int4_g128`,
`int4_g64`, `nvfp4`, or, for o_proj under grouped queries, also `nvfp4_shared`. The file's metadata holds the sizes of
the model that it was measured on. A file serves every format that needs no more than it holds.
"""

import json
import math
import os
import re
from dataclasses import asdict
from pathlib import Path
from secrets import token_hex

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..common.errors import ExportError, report
from ..common.safe_files import opened, parsed, shown
from ..models import is_expert, is_linear_weight, makes_keys, parameters_of, pooled, shape_of
from ..models.statistic_names import experts_module, input_key, kv_keys

KIND = "megatron_export statistics 1"
_INT4, _NVFP4 = r"int4_g(?:128|64)", r"nvfp4(?:_shared)?"
_KINDS = (
    *("input_amax", "input_channel_amax", "k_amax", "v_amax", "v_channel_amax", "tokens"),
    *(
        rf"(?:pre_quant_scale|alpha|losses)\.(?:{_INT4}|{_NVFP4})",
        rf"clip\.{_INT4}(?:\.\w+)?",
        rf"clip_ratio\.{_NVFP4}",
    ),
)
_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "U8")
_KEY = re.compile(rf"(.+?)\.({'|'.join(_KINDS)})")


def hf_keys(config: dict) -> dict[str, list[str]]:
    """Name in memory of every statistic that each file has -> its names on disk (by HF module)."""
    keys = []
    for name in parameters_of(config):
        keys += [input_key(name)] if is_linear_weight(name) else []
        keys += kv_keys(name) if makes_keys(name) else []
        keys += [f"{experts_module(name)}.tokens"] if is_expert(name) else []
    homes = _homes(config)
    return {key: _on_disk(key, homes) for key in dict.fromkeys(keys)}


def _homes(config: dict) -> dict[str, dict[str, str]]:
    """Megatron module -> the HF module of each of its parts; of an attention, those of its keys and values."""
    homes = {}
    for name, source in parameters_of(config).items():
        if is_linear_weight(name):
            parts = {part: hf.removesuffix(".weight") for part, hf in source.pooled_names().items()}
            homes[pooled(name).removesuffix(".weight")] = parts
            if is_expert(name):  # each has its own clipping
                own = {part: hf.removesuffix(".weight") for part, hf in source.names().items()}
                homes[name.removesuffix(".weight")] = own
            if is_expert(name):
                homes[experts_module(name)] = {"": next(iter(parts.values())).rpartition(".")[0]}
            if makes_keys(name):
                homes[name.rsplit(".", 2)[0]] = {"k": parts["k"], "v": parts["v"]}
    return homes


def _on_disk(key: str, homes: dict[str, dict[str, str]]) -> list[str]:
    """The names on disk of a statistic in memory."""
    module, kind = _KEY.fullmatch(key).groups()
    parts = homes[module]
    if kind[:2] in ("k_", "v_"):
        return [f"{parts[kind[0]]}.{kind}"]
    stem, _, part = kind.rpartition(".")
    if kind.startswith("clip.") and part in parts:
        return [f"{parts[part]}.{stem}"]
    return [f"{hf}.{kind}" for hf in parts.values()]


def _in_memory(hf: str, owners: dict[str, tuple[str, str]]) -> str | None:
    """The name in memory of a tensor on disk, None for one that is no statistic of this model."""
    found = _KEY.fullmatch(hf)
    if found is None or found[1] not in owners:
        return None
    (module, part), kind = owners[found[1]], found[2]
    if kind[:2] in ("k_", "v_"):
        if kind[0] != part:
            return None
        module = module.rpartition(".")[0]
    by_part = f".{part}" if kind.startswith("clip.") and part else ""
    return f"{module}.{kind}{by_part}"


def save(statistics: dict[str, Tensor], file: Path, config: dict) -> None:
    """Write the statistics of a model of config.json's dict to `file`, replacing it in one step."""
    report(
        [
            f"the statistics have no {key}: they are of another model"
            for key in hf_keys(config).keys() - statistics.keys()
        ]
    )
    homes = _homes(config)
    tensors = {hf: tensor.clone() for key, tensor in statistics.items() for hf in _on_disk(key, homes)}
    partial = file.with_name(f".{file.name}.{token_hex(4)}.partial")
    # one entry: safetensors writes several in any order, and the same statistics shall be the same file
    save_file(tensors, partial, metadata={KIND: json.dumps(sizes_of(config))})
    umask = os.umask(0)
    os.umask(umask)
    partial.chmod(0o666 & ~umask)  # safetensors makes files that only their owner can read
    partial.replace(file)


def sizes_of(config: dict) -> dict:
    """The sizes of a model as JSON has them: those of experts and of latent attention only where it has them."""
    sizes = asdict(shape_of(config))
    return {
        key: list(size) if isinstance(size, tuple) else size for key, size in sizes.items() if size or key == "tied"
    }


def check_kind(file: Path) -> None:
    """Raise unless `file` is one that `save` wrote, so that it may be replaced by another."""
    _opened(file)


def load(file: Path, config: dict) -> dict[str, Tensor]:
    """Read statistics back. `ExportError` when the file is not one, or was measured on a model of other sizes."""
    if not file.is_file():
        raise ExportError(f"no calibration file {file}. Write one with --save-calibration")
    held, theirs = _opened(file)
    ours = sizes_of(config)
    odd = [k for k in ours | theirs if theirs.get(k) != ours.get(k)]
    said = {k: (k if k.isidentifier() else shown(k), shown(theirs.get(k)), shown(ours.get(k))) for k in odd}
    report([f"{file}: measured on another model: its {k} is {has}, here {means}" for k, has, means in said.values()])
    found = set(held.keys())
    keys = hf_keys(config)
    report([f"{file}: {hf} is missing" for on_disk in keys.values() for hf in on_disk if hf not in found])
    homes = _homes(config)
    owners = {
        hf: (module, part)
        for module, parts in homes.items()
        if not module.endswith(".self_attention")
        for part, hf in parts.items()
    }
    sources = parameters_of(config).values()
    widest = max(max(source.shape) for source in sources)
    groups = max(math.prod(source.shape) for source in sources if is_linear_weight(source.canonical)) // 64
    copies: dict[str, list[Tensor]] = {}
    for hf in sorted(found):
        key = _in_memory(hf, owners)
        if key is None:
            raise ExportError(f"{file}: {hf} is no statistic of this model. Write it again with --save-calibration")
        part, most = held.get_slice(hf), groups if ".clip." in key else widest
        if part.get_dtype() not in _DTYPES or math.prod(part.get_shape()) > most:
            raise ExportError(
                f"{file}: {hf} is {part.get_dtype()} {shown(part.get_shape())}, which no statistic of this model is. Write it "
                "again with --save-calibration"
            )
        copies.setdefault(key, []).append(held.get_tensor(hf))
    wanted = {hf for key in copies for hf in _on_disk(key, homes)}
    report([f"{file}: {hf} is missing" for hf in sorted(wanted - found)])
    return {key: _merged(file, key, tensors) for key, tensors in copies.items()}


def _merged(file: Path, key: str, tensors: list[Tensor]) -> Tensor:
    """One statistic from the copies that fused linears have of it."""
    if len({(tensor.dtype, tensor.shape) for tensor in tensors}) > 1:
        raise ExportError(f"{file}: the fused linears of {key} have it in several sizes or types. Write it again")
    if key.endswith("amax"):
        return torch.stack(tensors).amax(0)
    if not all(torch.equal(tensors[0], other) for other in tensors[1:]):
        raise ExportError(f"{file}: the fused linears of {key} differ, but share one. Write it again")
    return tensors[0]


def _opened(file: Path) -> tuple[safe_open, dict]:
    """A file of statistics, and the sizes of the model that they were measured on."""
    again = "Write it again with --save-calibration"
    found = opened(file, again)
    metadata = found.metadata() or {}
    if KIND not in metadata:
        raise ExportError(f"{file}: not a calibration file written by --save-calibration. Give another")
    try:
        sizes = parsed(metadata[KIND].encode())
        if not isinstance(sizes, dict):
            raise ValueError(f"they are {shown(sizes)}")
    except ValueError as error:
        raise ExportError(
            f"{file}: the sizes of the model it was measured on are not readable ({error}). {again}"
        ) from error
    return found, sizes
