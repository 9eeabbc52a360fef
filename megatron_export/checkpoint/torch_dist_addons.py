"""What ModelOpt and Megatron-Bridge leave in a `torch_dist` checkpoint beside the weights: LoRA adapters and quantizers."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

from ..common.errors import ExportError
from ..common.safe_files import shown
from ..models import without_additions
from .torch_dist_keys import Home, by_rank, entries, home, in_order, named, part_of
from .torch_dist_metadata import Stored
from .torch_dist_settings import MODELOPT, RUN_CONFIG, modes_of
from .torch_dist_storage import Storage

_BRIDGE = re.compile(r"(.+?)(?:\.adapter)?\.linear_(in|out)\.weight")
_MODELOPT = re.compile(r"(.+)\.lora_(a|b)_(\w+)\.weight")
_HALVES = {"in": "first", "a": "first", "out": "second", "b": "second"}
_QUANTIZER = re.compile(r"(.+)\.(\w+_quantizer(?:\.\d+)*)\.(_\w+)")
_BUFFERS = ("_amax", "_global_amax", "_pre_quant_scale")
_STATE = re.compile(r"(.+)\._extra_state/shard_(\d{1,9}(?:\.\d{1,9})*)_[\d.]+")
_LARGEST = 1e30  # of scales that have a meaning
_ONE_LAYER = re.compile(r"layers\.[\d\[?]")


@dataclass(frozen=True)
class StoredAdapter:
    """A LoRA adapter on disk: `scale * second @ first` is added to a weight; first [rank, in], second [out, rank]."""

    first: tuple[Home, ...]
    second: tuple[Home, ...]
    scale: float

    @property
    def rank(self) -> int:
        return self.shapes[1][0]

    @property
    def homes(self) -> tuple[Home, ...]:
        return (*self.first, *self.second)

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shape of the second factor, and that of the first."""
        rows = [sum(one.shape[0] for one in homes) for homes in (self.second, self.first)]
        return (rows[0], *self.second[0].shape[1:]), (rows[1], *self.first[0].shape[1:])


def is_adapter(key: str) -> bool:
    """Whether a key names a part of an adapter."""
    return without_additions(key) is None and "_quantizer." not in key


def adapters_in(
    storage: Storage, run: dict[str, Any], canonical: Callable[[str], str], experts: int
) -> dict[str, list[StoredAdapter]]:
    """Canonical weight -> its LoRA adapters, Megatron-Bridge's or ModelOpt's, in a model with `experts` in a layer.

    `run` is its run_config.yaml; `canonical` makes the names of a model alone on its rank canonical. `ExportError` for an adapter
    that is no product of two matrices, or has no scale.
    """
    found: dict[tuple[str, str], dict[str, dict[str, Home]]] = {}
    for key, tensor in storage.tensors.items():
        if not is_adapter(key):
            continue
        whole, part = part_of(key)
        match = _BRIDGE.fullmatch(whole) or _MODELOPT.fullmatch(whole)
        if match is None or ".adapter" in match[1] or len(tensor.shape) < 2 or 0 in tensor.shape:
            raise ExportError(
                f"{storage.folder}: {shown(key)[1:-1]} is of an adapter that is not merged here, only the product of two matrices "
                "is. Merge it with the library that made it, and export the merged model"
            )
        owner, half, *label = match.groups()
        for name, lead in entries(f"{owner}.weight", tensor.shape, 2, experts):
            halves = found.setdefault((name, "".join(label)), {})
            halves.setdefault(_HALVES[half], {})[part] = home(tensor, lead)
    scale_of = _scales(storage.folder, run, {label for _, label in found})
    adapters: dict[str, list[StoredAdapter]] = {}
    for (name, label), halves in found.items():
        if len(halves) < 2:
            half = f"half of the adapter of {shown(name)[1:-1]}"
            raise ExportError(f"{storage.folder}: {half} is missing. Save the checkpoint again")
        first, second = (in_order(halves[half]) for half in ("first", "second"))
        if label and ".linear_fc1." in name:  # ModelOpt saves it without telling gates from ups
            second = by_rank(second[0])
        scale = scale_of(name, label, sum(one.shape[0] for one in first))
        adapters.setdefault(canonical(name), []).append(StoredAdapter(first, second, scale))
    return adapters


def _scales(folder: Path, run: dict[str, Any], labels: set[str]) -> Callable[[str, str, int], float]:
    """A function (weight, label of ModelOpt's adapter or "" of Megatron-Bridge's, rank) -> scale of the adapter."""
    peft = run.get("peft")
    alpha = peft.get("alpha") if isinstance(peft, dict) else None
    modes = modes_of(folder) if labels - {""} else []
    settings = {str(found.get("adapter_name")): found.get("adapter_cfg") for mode, found in modes if mode == "peft"}

    def scale_of(name: str, label: str, rank: int) -> float:
        scales = _by_pattern(name.removesuffix(".weight"), settings.get(label)) if label else [alpha]
        good = all(type(scale) in (int, float) and abs(scale) < _LARGEST for scale in scales)
        if not scales or not good or min(scales) != max(scales):
            where = MODELOPT if label else f"peft.alpha in {RUN_CONFIG}"
            raise ExportError(
                f"{folder}: {where} does not say by how much the adapter of {shown(name)[1:-1]} is scaled. Copy the whole folder "
                "of the iteration"
            )
        return scales[0] if label else scales[0] / rank

    return scale_of


def _by_pattern(module: str, settings: object) -> list[Any]:
    """The scales of ModelOpt's patterns that match an adapter, or name single layers by their number in a pipeline stage."""
    said = settings.items() if isinstance(settings, dict) else ()
    return [
        found.get("scale")
        for pattern, found in said
        if isinstance(found, dict) and (fnmatchcase(module, str(pattern)) or _ONE_LAYER.search(str(pattern)))
    ]


def quantizers_in(storage: Storage, canonical: Callable[[str], str], experts: int) -> dict[str, dict[str, Any]]:
    """Canonical name -> settings and buffers of every quantizer of ModelOpt, in a model with `experts` in a layer.

    Settings come from a module's `_extra_state`, and may be missing; buffers are tensors. Amaxes of blocks are many: they are not
    read, a `Home` stands for them.
    """
    buffers = {key: found for key in storage.tensors if (found := _QUANTIZER.fullmatch(key))}
    if not buffers and not any("quantize" in mode for mode, _ in modes_of(storage.folder)):
        return {}
    storage.check(storage.tensors[key] for key in buffers)
    held: dict[str, dict[str, tuple[Stored, tuple[int, ...]]]] = {}
    for key, found in buffers.items():
        owner, quantizer, buffer = found.groups()
        tensor = storage.tensors[key]
        for name, lead in entries(f"{owner}.weight", tensor.shape, 0, experts):
            module = canonical(name).removesuffix(".weight")
            held.setdefault(f"{module}.{quantizer}", {})[buffer] = tensor, lead
    quantizers = _settings(storage, canonical, held.keys())
    for name, some in held.items():
        attributes = quantizers.setdefault(name, {})
        for buffer, (tensor, lead) in some.items():
            unknown = "_num_bits" not in attributes and prod(tensor.shape[len(lead) :]) > 1
            many = buffer == "_amax" and (has_blocks(attributes) or unknown)
            attributes[buffer] = home(tensor, lead) if many else storage.entry(tensor, lead)
    return quantizers


def _settings(storage: Storage, canonical: Callable[[str], str], held: Collection[str]) -> dict[str, dict[str, Any]]:
    """Canonical name of a quantizer -> its settings; `held` are the names of those that have buffers.

    Experts in one module have a numbered quantizer each for their weights. All are alike: the first stands for them.
    """
    found = {}
    for key in storage.objects:
        match = _STATE.fullmatch(key)
        state = storage.object_in_bytes(key) if match else None
        said = state.get("modelopt_quantizer_state") if isinstance(state, dict) else None
        if said is None:
            continue
        name = named(f"{match[1]}.weight", tuple(map(int, match[2].split("."))))
        module = canonical(name).removesuffix(".weight")
        grouped = f"{module}.weight_quantizer" in held
        for quantizer, settings in said.items() if isinstance(said, dict) else [("", said)]:
            if grouped and (numbered := re.fullmatch(r"weight_quantizer\.(\d+)", str(quantizer))):
                if numbered[1] != "0":
                    continue
                quantizer = "weight_quantizer"
            if not _is_sane(settings):
                raise ExportError(
                    f"{storage.folder}: what {shown(key)[1:-1]} says of a quantizer is nothing that ModelOpt says. Copy or save "
                    "the checkpoint again, or do not trust it"
                )
            found[f"{module}.{quantizer}"] = {at: one for at, one in settings.items() if at not in _BUFFERS}
    return found


def _is_sane(settings: object) -> bool:
    """Whether a value can be the settings of a quantizer: with numbers of bits, and sizes of blocks by axis or none."""
    if not isinstance(settings, dict) or not _is_bits(settings.get("_num_bits")):
        return False
    blocks = settings.get("_block_sizes")
    if blocks is None:
        return True
    sizes = [blocks[axis] for axis in (-1, -2) if axis in blocks] if isinstance(blocks, dict) else []
    right = bool(sizes) and all(type(size) is int and size > 0 for size in sizes)
    return right and _is_bits(blocks.get("scale_bits", 8))


def _is_bits(said: object) -> bool:
    return type(said) is int or (isinstance(said, tuple | list) and all(type(bits) is int for bits in said))


Attributes = dict[str, Any]


def has_blocks(attributes: Attributes) -> bool:
    """Whether a quantizer keeps an amax for every block, and not one for all."""
    blocks = attributes.get("_block_sizes") or {}
    return bool(blocks) and blocks.get("type", "static") == "static"
