"""The modules that need Megatron-Core: imported where a Megatron model is given; without it, refused in a sentence."""

from importlib import import_module
from types import ModuleType

from .errors import StartError


def part(name: str) -> ModuleType:
    """The module `megatron_export.NAME`. `StartError` if it needs Megatron-Core, and that is not installed."""
    try:
        return import_module(f"megatron_export.{name}")
    except ModuleNotFoundError as error:
        if error.name not in ("megatron", "megatron.core"):
            raise
        said = "Megatron models need megatron-core, which is not installed here. Install it: pip install megatron-core"
        raise StartError(said) from error
