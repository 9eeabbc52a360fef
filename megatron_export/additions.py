"""What ModelOpt and Megatron-Bridge put into a Megatron model, found by its attributes: quantizers and LoRA adapters."""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from .model import canonical_modules, chunks_of, local_experts_of
from .names import is_expert

_QUANTIZER = re.compile(r"(\w+_quantizer)((?:\.\d+)*)")


def quantizers_of(model: nn.Module | list[nn.Module]) -> dict[str, dict[str, Any]]:
    """Canonical name -> attributes and buffers of every quantizer of this rank, as quantizers.py wants them.

    Of experts in one module, quantizers of weights are named by their expert, others by all of them.
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
                said = {key: value for key, value in vars(quantizer).items() if key.startswith("_")} | buffers
                found |= dict.fromkeys(_names(owner, *kind.groups(), experts), said)
    return found


def _has_quantizers(module: nn.Module) -> bool:
    return any(name.endswith("_quantizer") for name, _ in module.named_children())


def _names(owner: str, kind: str, numbers: str, experts: list[int]) -> Iterator[str]:
    """The names of the quantizer `kind` and its numbers in module `owner`; several for one that experts in one module share."""
    layer, _, linear = owner.rpartition(".")
    if not (is_expert(f"{owner}.") and layer.endswith(".experts") and kind == "weight_quantizer"):
        yield f"{owner}.{kind}{numbers}"
        return
    first, *others = numbers.split(".")[1:] or [""]
    for expert in [experts[int(first)]] if first else experts:
        yield ".".join([layer, str(expert), linear, kind, *others])
