"""The modules that need Megatron-Core, or what it needs: imported where such a model is given; without it, refused with a hint."""

import sys
from contextlib import nullcontext
from importlib import import_module
from types import ModuleType

from .errors import StartError
from .garbage import no_garbage_collection

_MEGATRON = "Megatron models need megatron-core, which is not installed here. Install it: pip install megatron-core"
_NEEDED = {
    "megatron": _MEGATRON,
    "megatron.core": _MEGATRON,
    "triton": "Megatron-Core imports triton, since 0.19 for all models and before for those with layers of Mamba; torch for CPUs "
    "does not bring it. Install it: pip install triton",
}


def part(name: str) -> ModuleType:
    """The module `megatron_export.NAME`. `StartError` if a package that it needs is not installed."""
    from .late_compile import compiled_when_called  # imports torch

    late = nullcontext() if "megatron.core" in sys.modules else compiled_when_called()
    try:
        with no_garbage_collection(), late:
            return import_module(f"megatron_export.{name}")
    except ModuleNotFoundError as error:
        if error.name not in _NEEDED:
            raise
        raise StartError(_NEEDED[error.name]) from error
