"""The table of formats: each a module with

NAME          what the user types
TILE          (out, in): the block of the weight that must not be cut before it is quantized
CALIBRATED    whether it needs the amax of activations
QUANTIZATION  what the quantization configs say of it
NUMBERS       how its weights and activations are described in config.json
encode        one linear -> pieces by suffix; pure
decode        pieces -> the float32 weight that an engine multiplies with
"""

from types import ModuleType

from torch import Tensor

from ..errors import ExportError
from ..piece import Amax, Axis, Piece, join
from . import bf16, fp8, kv_fp8, nvfp4

FORMATS: dict[str, ModuleType] = {module.NAME: module for module in (bf16, fp8, nvfp4)}
KV_FORMATS: dict[str, ModuleType | None] = {"none": None, "fp8": kv_fp8}

STRIP_ELEMENTS = 1 << 22


def chosen(formats: dict, name: str) -> ModuleType | None:
    """The format of that name; `ExportError` with the known ones when there is none."""
    if name not in formats:
        raise ExportError(f"unknown format {name!r}. Known: {', '.join(formats)}")
    return formats[name]


def encode(form: ModuleType, weight: Tensor, amax: Amax) -> dict[str, Piece]:
    """`form.encode` in strips of whole tiles: float32 copies never exceed 4 Mi elements, and stay in the CPU's cache."""
    tile = form.TILE[0]
    rows = max(STRIP_ELEMENTS // weight.shape[1] // tile, 1) * tile
    strips = [form.encode(strip, amax) for strip in weight.split(rows)]
    return {suffix: join([strip[suffix] for strip in strips], Axis.OUT) for suffix in strips[0]}
