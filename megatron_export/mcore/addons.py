"""What ModelOpt and Megatron-Bridge put into a Megatron model, found by its attributes: quantizers and LoRA adapters."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from ..common.errors import ExportError
from ..models import is_expert, without_additions
from ..models.lora import Adapter
from .model import Model, canonical_modules, chunks_of, local_experts_of

_QUANTIZER = re.compile(r"(\w+_quantizer)((?:\.\d+)*)")


def quantizers_of(model: Model) -> dict[str, dict[str, Any]]:
    """Canonical name -> attributes and buffers of every quantizer of this rank, as calibration/modelopt/quantizers.py wants them.

    Where one module holds several experts, each expert gets its own numbered quantizer, or the one that all share.
    """
    found = {}
    for chunk in chunks_of(model):
        experts = local_experts_of(chunk)
        for owner, module in canonical_modules(chunk):
            found |= _quantizers(owner, module, experts)
    return found


def quantizers_below(name: str, module: nn.Module) -> dict[str, dict[str, Any]]:
    """The same of a module that is called `name` and has no experts."""
    found = {}
    for inner, owner in module.named_modules():
        if without_additions(inner) is not None:
            found |= _quantizers(f"{name}.{inner}".rstrip("."), owner, [])
    return found


def _quantizers(owner: str, module: nn.Module, experts: list[int]) -> dict[str, dict[str, Any]]:
    """Those in a linear or an attention."""
    found = {}
    if not any(name.endswith("_quantizer") for name, _ in module.named_children()):
        return found
    for name, quantizer in module.named_modules():
        if (kind := _QUANTIZER.fullmatch(name)) and hasattr(quantizer, "_num_bits"):
            buffers = {key: value for key, value in quantizer._buffers.items() if value is not None}
            found |= dict.fromkeys(_names(owner, *kind.groups(), experts), vars(quantizer) | buffers)
    return found


def is_quantized(model: Model) -> bool:
    """Whether any of ModelOpt's quantizers on this rank is on."""
    return any(not quantizer.get("_disabled") for quantizer in quantizers_of(model).values())


def _names(owner: str, kind: str, numbers: str, experts: list[int]) -> Iterator[str]:
    """The names of quantizer `kind` with its `numbers` in module `owner`: several names if experts share it."""
    layer, _, linear = owner.rpartition(".")
    if not (is_expert(f"{owner}.") and layer.endswith(".experts")):
        yield f"{owner}.{kind}{numbers}"
        return
    first, *others = numbers.split(".")[1:] or [""]
    for expert in [experts[int(first)]] if first else experts:
        yield ".".join([layer, str(expert), linear, kind, *others])


def adapters_of(model: Model) -> dict[str, list[Adapter]]:
    """Canonical module -> its LoRA adapters, Megatron-Bridge's or ModelOpt's, that are switched on.

    `ExportError` for an adapter that is not a product of two matrices.
    """
    found: dict[str, list[Adapter]] = {}
    for chunk in chunks_of(model):
        experts = local_experts_of(chunk)
        for name, module in canonical_modules(chunk):
            layer, _, linear = name.rpartition(".")
            grouped = is_expert(f"{name}.") and layer.endswith(".experts")
            for adapter in _adapters(name, module):
                if not grouped:
                    found.setdefault(name, []).append(adapter)
                    continue
                shared = adapter.first.dim() == 2
                for n, expert in enumerate(experts):  # which share an adapter, or have a slice of it each
                    own = adapter if shared else replace(adapter, first=adapter.first[n], second=adapter.second[n])
                    found.setdefault(f"{layer}.{expert}.{linear}", []).append(own)
    return found


def _adapters(name: str, module: nn.Module) -> Iterator[Adapter]:
    """The adapters that a module has or is."""
    for held in getattr(module, "_lora_adapters", {}).values():  # ModelOpt's
        if held["enable"]:
            yield Adapter(held["lora_a"].weight, held["lora_b"].weight, held["rank"], held["scale"])
    wrapped = hasattr(module, "to_wrap")
    if not (wrapped or hasattr(module, "linear_in")) or not getattr(module, "_adapter_enabled", True):
        return
    adapter = module.adapter if wrapped else module  # Megatron-Bridge's, around a linear or a linear itself
    activation = getattr(adapter, "activation", None)
    if (
        not all(hasattr(getattr(adapter, half, None), "weight") for half in ("linear_in", "linear_out"))
        or hasattr(adapter, "weight_magnitude")
        or not isinstance(activation, nn.Identity | None)
    ):
        raise ExportError(
            f"{name}: adapters of {type(module).__name__} are not merged here, only the product of two matrices is. Merge "
            "them with the library that made them, and export the merged model"
        )
    yield Adapter(adapter.linear_in.weight, adapter.linear_out.weight, adapter.dim, adapter.alpha / adapter.dim)
