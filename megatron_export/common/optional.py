"""The modules that need Megatron-Core: imported where a Megatron model is given; without it, refused in a sentence."""

import sys
from contextlib import nullcontext
from importlib import import_module
from types import ModuleType

from .errors import StartError
from .garbage import no_garbage_collection


def part(name: str) -> ModuleType:
    """The module `megatron_export.NAME`. `StartError` if it needs Megatron-Core, and that is not installed."""
    from .late_compile import compiled_when_called  # imports torch

    late = nullcontext() if "megatron.core" in sys.modules else compiled_when_called()
    try:
        with no_garbage_collection(), late:
            return import_module(f"megatron_export.{name}")
    except ModuleNotFoundError as error:
        if error.name not in ("megatron", "megatron.core"):
            raise
        said = "Megatron models need megatron-core, which is not installed here. Install it: pip install megatron-core"
        raise StartError(said) from error
