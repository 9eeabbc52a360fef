"""Export Megatron-Core models, sharded as they are trained, as quantized HuggingFace checkpoints.

`export_hf_checkpoint` writes a live model, `export_hf_checkpoint_async` without holding up training, `iter_hf_tensors` gives its
tensors one by one; `calibrate` measures what it is quantized with; `save_calibration` and
`load_calibration` keep that in a file. Importing this module is cheap: torch and Megatron come with the first call.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .common.errors import ExportError

if TYPE_CHECKING:
    from .calibration.calibrate import calibrate
    from .calibration.statistics import load as load_calibration
    from .calibration.statistics import save as save_calibration
    from .export.async_export import Handle, export_hf_checkpoint_async
    from .export.pipeline import Report, export_hf_checkpoint
    from .export.refit import iter_hf_tensors, plan_hf_tensors

__version__ = "0.1.0"
__all__ = [
    "ExportError",
    "Handle",
    "Report",
    "calibrate",
    "export_hf_checkpoint",
    "export_hf_checkpoint_async",
    "iter_hf_tensors",
    "load_calibration",
    "plan_hf_tensors",
    "save_calibration",
]

_HOMES = {
    "calibrate": ("calibration.calibrate", "calibrate"),
    "export_hf_checkpoint": ("export.pipeline", "export_hf_checkpoint"),
    "export_hf_checkpoint_async": ("export.async_export", "export_hf_checkpoint_async"),
    "Handle": ("export.async_export", "Handle"),
    "iter_hf_tensors": ("export.refit", "iter_hf_tensors"),
    "plan_hf_tensors": ("export.refit", "plan_hf_tensors"),
    "Report": ("export.pipeline", "Report"),
    "load_calibration": ("calibration.statistics", "load"),
    "save_calibration": ("calibration.statistics", "save"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(f"{__name__}.{module}"), attribute)
