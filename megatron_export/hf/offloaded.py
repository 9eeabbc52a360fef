"""Weights that accelerate keeps elsewhere, on the CPU or on disk, while the module has a tensor on meta in their place."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn


def fetchers_of(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """Name in memory of each tensor on meta that a hook of accelerate has -> what gets it. The hooks are not run."""
    found = {}
    for prefix, module in model.named_modules():
        for weights in filter(None, (_weights_of(hook) for hook in _hooks_of(module))):
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if tensor.is_meta and name in weights:
                    found[f"{prefix}.{name}" if prefix else name] = partial(weights.__getitem__, name)
    return found


def _hooks_of(module: nn.Module) -> Iterator[Any]:
    hook = vars(module).get("_hf_hook")
    yield from vars(hook).get("hooks", (hook,)) if hook is not None else ()


def _weights_of(hook: object) -> Mapping[str, Tensor] | None:
    """The weights of a hook's module by their names in it; None for a hook that has none, or has others."""
    weights = vars(hook).get("weights_map")
    return weights if isinstance(weights, Mapping) else None
