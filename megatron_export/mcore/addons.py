"""What ModelOpt and Megatron-Bridge put into a Megatron model, found by its attributes: quantizers and LoRA adapters."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from ..common.errors import ExportError
from ..models import is_expert
from ..models.lora import Adapter
from .model import canonical_modules, chunks_of, local_experts_of

_QUANTIZER = re.compile(r"(\w+_quantizer)((?:\.\d+)*)")


def quantizers_of(model: nn.Module | list[nn.Module]) -> dict[str, dict[str, Any]]:
    """Canonical name -> attributes and buffers of every quantizer of this rank, as quantizers.py wants them.

    Of experts in one module, those of their weights may be numbered; what they share is named for each of them.
    """
    found = {}
    for chunk in chunks_of(model):
        experts = local_experts_of(chunk)
        for owner, module in canonical_modules(chunk):
            for name, quantizer in module.named_modules() if _has_quantizers(module) else ():
                kind = _QUANTIZER.fullmatch(name)
                if kind is None or not hasattr(quantizer, "_num_bits"):
                    continue
                buffers = {key: value for key, value in quantizer._buffers.items() if value is not None}
                found |= dict.fromkeys(_names(owner, *kind.groups(), experts), vars(quantizer) | buffers)
    return found


def is_quantized(model: nn.Module | list[nn.Module]) -> bool:
    """Whether any of ModelOpt's quantizers on this rank is on."""
    return any(not quantizer.get("_disabled") for quantizer in quantizers_of(model).values())


def _has_quantizers(module: nn.Module) -> bool:
    return any(name.endswith("_quantizer") for name, _ in module.named_children())


def _names(owner: str, kind: str, numbers: str, experts: list[int]) -> Iterator[str]:
    """The names of the quantizer `kind` and its numbers in module `owner`; several for one that experts in one module share."""
    layer, _, linear = owner.rpartition(".")
    if not (is_expert(f"{owner}.") and layer.endswith(".experts")):
        yield f"{owner}.{kind}{numbers}"
        return
    first, *others = numbers.split(".")[1:] or [""]
    for expert in [experts[int(first)]] if first else experts:
        yield ".".join([layer, str(expert), linear, kind, *others])


def adapters_of(model: nn.Module | list[nn.Module]) -> dict[str, list[Adapter]]:
    """Canonical module -> its LoRA adapters, Megatron-Bridge's or ModelOpt's, that are switched on.

    Raises for adapters that do something else than add a product of two matrices.
    """
    found: dict[str, list[Adapter]] = {}
    for chunk in chunks_of(model):
        experts = local_experts_of(chunk)
        for name, module in canonical_modules(chunk):
            layer, _, linear = name.rpartition(".")
            grouped = is_expert(f"{name}.") and layer.endswith(".experts")
            for adapter in _adapters(name, module):
                for number, expert in enumerate(experts if grouped else [None]):
                    own = _own(adapter, number) if grouped else adapter
                    found.setdefault(name if expert is None else f"{layer}.{expert}.{linear}", []).append(own)
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


def _own(adapter: Adapter, number: int) -> Adapter:
    """What belongs to one of the experts that a module groups: they share an adapter, or each has a slice of it."""
    if adapter.first.dim() == 2:
        return adapter
    return replace(adapter, first=adapter.first[number], second=adapter.second[number])
