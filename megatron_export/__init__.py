"""Export Megatron-Core models, sharded as they are trained, as quantized HuggingFace checkpoints.

`export_hf_checkpoint` writes a live model; `calibrate` measures what it is quantized with; `save_calibration` and
`load_calibration` keep that in a file. Importing this module is cheap: torch and Megatron come with the first call.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import ExportError

if TYPE_CHECKING:
    from .calibration import calibrate
    from .pipeline import Report, export_hf_checkpoint
    from .statistics import load as load_calibration
    from .statistics import save as save_calibration

__version__ = "0.1.0"
__all__ = ["ExportError", "Report", "calibrate", "export_hf_checkpoint", "load_calibration", "save_calibration"]

_HOMES = {
    "calibrate": ("calibration", "calibrate"),
    "export_hf_checkpoint": ("pipeline", "export_hf_checkpoint"),
    "Report": ("pipeline", "Report"),
    "load_calibration": ("statistics", "load"),
    "save_calibration": ("statistics", "save"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(f"{__name__}.{module}"), attribute)
