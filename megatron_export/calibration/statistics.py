"""Calibration statistics on disk: one safetensors file, for any topology. Names are those of HF modules and not Megatron's:
models/statistic_names.py lists them. The file's metadata holds the sizes of the model that it was measured on. A file serves
every format that needs no more than it holds.
"""

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from secrets import token_hex

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..common.errors import ExportError, report
from ..common.safe_files import exists, opened, parsed, shown
from ..models import is_linear_weight, parameters_of, shape_of
from ..models.layer_kinds import Kind
from ..models.statistic_names import hf_keys, homes_of, in_memory, is_amax, is_codes, on_disk, owners_of

KIND = "megatron_export statistics 1"
_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "U8")


def save(statistics: dict[str, Tensor], file: Path, config: dict) -> None:
    """Write the statistics of a model of config.json's dict to `file`, replacing it in one step. `ExportError` for missing ones."""
    missing = hf_keys(config).keys() - statistics.keys()
    report([f"the statistics have no {key}: they are of another model" for key in missing])
    homes = homes_of(config)
    tensors = {hf: tensor.clone() for key, tensor in statistics.items() for hf in on_disk(key, homes)}
    partial = partial_of(file)
    try:
        # one entry: safetensors writes several in any order, and the same statistics shall be the same file
        save_file(tensors, partial, metadata={KIND: json.dumps(sizes_of(config))})
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)  # safetensors makes files that only their owner can read
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


_LISTED = {"sparse": Kind.EXPERTS, "linear": Kind.LINEAR, "mamba": Kind.MAMBA}  # layers of some kinds, by number


def sizes_of(config: dict) -> dict:
    """The sizes of a model as JSON has them: those of experts and of latent attention only where it has them."""
    shape = shape_of(config)
    sizes = asdict(shape) | {name: shape.having(kind) for name, kind in _LISTED.items()}
    del sizes["kinds"]
    sizes = {key: size for key, size in sizes.items() if size or key == "tied"}
    return {key: list(size) if isinstance(size, tuple) else size for key, size in sizes.items()}


def partial_of(file: Path) -> Path:
    """A file that `save` writes before it is `file`."""
    return file.with_name(f".{file.name}.{token_hex(4)}.partial")


def check_kind(file: Path) -> None:
    """`ExportError` unless `file` is one that `save` wrote, so that it may be replaced by another."""
    _opened(file)


def load(file: Path, config: dict) -> dict[str, Tensor]:
    """Read statistics back. `ExportError` when the file is not one, or was measured on a model of other sizes."""
    if not exists(file) or not file.is_file():
        raise ExportError(f"no calibration file {file}. Write one with --save-calibration")
    held, theirs = _opened(file)
    ours = sizes_of(config)
    odd = [k for k in ours | theirs if theirs.get(k) != ours.get(k)]
    said = {k: (k if k.isidentifier() else shown(k), shown(theirs.get(k)), shown(ours.get(k))) for k in odd}
    report([f"{file}: measured on another model: its {k} is {has}, here {means}" for k, has, means in said.values()])
    found = set(held.keys())
    keys = hf_keys(config)
    report([f"{file}: {hf} is missing" for names in keys.values() for hf in names if hf not in found])
    homes = homes_of(config)
    owners = owners_of(homes)
    sources = parameters_of(config).values()
    widest = max(max(source.shape) for source in sources)
    groups = max(math.prod(source.shape) for source in sources if is_linear_weight(source.canonical)) // 64
    copies: dict[str, list[Tensor]] = {}
    for hf in sorted(found):
        key = in_memory(hf, owners)
        if key is None:
            raise ExportError(f"{file}: {hf} is no statistic of this model. Write it again with --save-calibration")
        part, most = held.get_slice(hf), groups if is_codes(key) else widest
        if part.get_dtype() not in _DTYPES or math.prod(part.get_shape()) > most:
            raise ExportError(
                f"{file}: {hf} is {part.get_dtype()} {shown(part.get_shape())}, which no statistic of this model is. Write it "
                "again with --save-calibration"
            )
        copies.setdefault(key, []).append(held.get_tensor(hf))
    wanted = {hf for key in copies for hf in on_disk(key, homes)}
    report([f"{file}: {hf} is missing" for hf in sorted(wanted - found)])
    return {key: _merged(file, key, tensors) for key, tensors in copies.items()}


def _merged(file: Path, key: str, tensors: list[Tensor]) -> Tensor:
    """One statistic from the copies that fused linears have of it."""
    if len({(tensor.dtype, tensor.shape) for tensor in tensors}) > 1:
        raise ExportError(f"{file}: the fused linears of {key} have it in several sizes or types. Write it again")
    if is_amax(key):
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
        said = f"the sizes of the model it was measured on are not readable ({error})"
        raise ExportError(f"{file}: {said}. {again}") from error
    return found, sizes
