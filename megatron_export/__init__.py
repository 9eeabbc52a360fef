"""Export Megatron-Core models, sharded as they are trained, as quantized HuggingFace checkpoints.

`export_hf_checkpoint` writes a live model, `export_hf_checkpoint_async` without holding up training, `iter_hf_tensors` gives its
tensors one by one; `calibrate` measures what it is quantized with; `save_calibration` and
`load_calibration` keep that in a file. Importing this module is cheap: torch and Megatron come with the first call.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import ExportError

if TYPE_CHECKING:
    from .background import Handle, export_hf_checkpoint_async
    from .calibration import calibrate
    from .pipeline import Report, export_hf_checkpoint
    from .refit import iter_hf_tensors, plan_hf_tensors
    from .statistics import load as load_calibration
    from .statistics import save as save_calibration

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
    "calibrate": ("calibration", "calibrate"),
    "export_hf_checkpoint": ("pipeline", "export_hf_checkpoint"),
    "export_hf_checkpoint_async": ("background", "export_hf_checkpoint_async"),
    "Handle": ("background", "Handle"),
    "iter_hf_tensors": ("refit", "iter_hf_tensors"),
    "plan_hf_tensors": ("refit", "plan_hf_tensors"),
    "Report": ("pipeline", "Report"),
    "load_calibration": ("statistics", "load"),
    "save_calibration": ("statistics", "save"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(f"{__name__}.{module}"), attribute)
