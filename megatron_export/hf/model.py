"""A transformers model as transformers hands it out: told by its class, out of its wrappers, its tensors by their names in memory.

transformers itself is not imported: who has such a model has it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..common.errors import ExportError, report

_SAID = "transformers."  # the module of a class of transformers begins so


def is_transformers(model: object) -> bool:
    """Whether this is a transformers model, perhaps in DDP or compiled."""
    return isinstance(model, nn.Module) and any(_is_pretrained(module) for module in _unwrapping(model))


def bare(model: nn.Module) -> nn.Module:
    """The model itself, out of DDP and the like."""
    return next(module for module in _unwrapping(model) if _is_pretrained(module))


def class_of(model: nn.Module) -> str:
    """The name of the class of transformers, or of remote code, that a model is of, whatever ModelOpt made of it."""
    known = (_SAID, "transformers_modules.")
    return next(one.__name__ for one in type(model).__mro__ if f"{one.__module__}.".startswith(known))


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Name in memory -> parameter or persistent buffer, without those of quantizers; the offloaded ones as they are: on meta.

    A tensor that has two names, as a tied output layer has, is here under the first. `ExportError` for what a checkpoint of a model
    of text has no place for.
    """
    found = dict(model.named_parameters())
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    found = {name: tensor for name, tensor in found.items() if "_quantizer" not in name}
    adapters = [name for name in found if ".lora_" in name]
    said = "{} is of an adapter (and {} more). Merge it before the export, with merge_and_unload() of PEFT"
    report([said.format(name, len(adapters) - 1) for name in adapters[:1]])
    return found


def device_of(model: nn.Module) -> torch.device:
    """Where the model computes: the device of its first parameter that is on one. `ExportError` if there is none."""
    devices = (parameter.device for parameter in bare(model).parameters())
    found = next((device for device in devices if device.type != "meta"), None)
    if found is None:
        raise ExportError(
            "every parameter of the model is on the meta device: it has no numbers. Load the weights first"
        )
    return found


def _unwrapping(model: nn.Module) -> Iterator[nn.Module]:
    yield model
    while not _is_pretrained(model):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return
        model = inner
        yield model


def _is_pretrained(model: nn.Module) -> bool:
    return any(one.__name__ == "PreTrainedModel" and one.__module__.startswith(_SAID) for one in type(model).__mro__)
