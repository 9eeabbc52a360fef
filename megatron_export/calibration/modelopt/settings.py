"""How ModelOpt sets its quantizers for each format here, one line a format; and how settings read in words."""

from dataclasses import dataclass

from torch import Tensor

from ...checkpoint.torch_dist_addons import Attributes
from .blocks import STATIC

FOUR_OVER_SIX = "four_over_six"  # in sizes of blocks: the largest value becomes 4 or 6
GROUP = "group"  # stands for the group size of formats that have several


@dataclass(frozen=True)
class Settings:
    """What the quantizers of a linear do.

    weights   settings of the quantizers of its weight, one after the other
    inputs    settings of the quantizer of its input; None for one that does not round
    smoothed  whether the input is multiplied by a `pre_quant_scale` before
    """

    weights: tuple[Attributes, ...]
    inputs: Attributes | None
    smoothed: bool


E4M3: Attributes = {"_num_bits": (4, 3)}
E4M3_BY_ROW: Attributes = {"_num_bits": (4, 3), "_axis": 0}
E4M3_BY_TOKEN: Attributes = {"_num_bits": (4, 3), "_dynamic": True, "_block_sizes": {-1: None}}
E4M3_IN_BLOCKS: Attributes = {"_num_bits": (4, 3), "_block_sizes": {-1: 128, -2: 128}}
NVFP4: Attributes = {"_num_bits": (2, 1), "_block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
NVFP4_STATIC: Attributes = {"_num_bits": (2, 1), "_block_sizes": {-1: 16, "type": "static", "scale_bits": (4, 3)}}
NVFP4_BY_32: Attributes = NVFP4 | {"_block_sizes": NVFP4["_block_sizes"] | {-1: 32}}
MXFP8: Attributes = {"_num_bits": (4, 3), "_block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}
MXFP4: Attributes = MXFP8 | {"_num_bits": (2, 1)}
INT4: Attributes = {"_num_bits": 4, "_block_sizes": {-1: GROUP}}
# fmt: off
LINEARS: dict[str, Settings] = {
    "bf16":           Settings((),                None,          smoothed=False),
    "fp8":            Settings((E4M3,),           E4M3,          smoothed=False),
    "fp8_pb":         Settings((E4M3_IN_BLOCKS,), None,          smoothed=False),
    "fp8_pc_pt":      Settings((E4M3_BY_ROW,),    E4M3_BY_TOKEN, smoothed=False),
    "mxfp8":          Settings((MXFP8,),          MXFP8,         smoothed=False),
    "nvfp4":          Settings((NVFP4,),          NVFP4,         smoothed=False),
    "nvfp4_awq":      Settings((NVFP4,),          NVFP4,         smoothed=True),
    "w4a16_nvfp4":    Settings((NVFP4,),          None,          smoothed=False),
    "w4a8_nvfp4_fp8": Settings((NVFP4_BY_32,),    E4M3,          smoothed=False),
    "mxfp4":          Settings((MXFP4,),          None,          smoothed=False),
    "w4a8_mxfp4_fp8": Settings((MXFP4,),          E4M3,          smoothed=False),
    "int4_awq":       Settings((INT4,),           None,          smoothed=True),
    "w4a8_awq":       Settings((INT4, E4M3),      E4M3,          smoothed=True),
}
SCALES: dict[str, Attributes] = {  # how scales of NVFP4 were made -> how formats with --nvfp4-scales have weights then
    STATIC:        NVFP4_STATIC,
    FOUR_OVER_SIX: NVFP4_STATIC | {"_block_sizes": NVFP4_STATIC["_block_sizes"] | {FOUR_OVER_SIX: True}},
}
CACHES: dict[str, Attributes] = {"none": {}, "fp8": E4M3, "nvfp4": NVFP4}  # of keys, and of values
# fmt: on
_NUMBERS = {(4, 3): "e4m3", (2, 1): "e2m1", (8, 0): "e8m0", 4: "int4", 8: "int8"}
_ODD = {  # what no format here does
    "_dynamic": "as they come",
    "_unsigned": "unsigned",
    "_narrow_range": "in a narrow range",
    "_rotate": "rotated",
    "_bias": "with an offset",
    "_scale": "compressed",
    "_lsq": "with scales that are trained",
    "_svdquant_lora_a": "beside a product of two matrices",
    "backend": "by a backend of its own",
}


def grouped(attributes: Attributes, group: int) -> Attributes:
    """Settings of a format with this group size."""
    sizes = attributes.get("_block_sizes", {})
    return attributes | {"_block_sizes": sizes | {-1: group}} if sizes.get(-1) == GROUP else attributes


def words(attributes: Attributes) -> str:
    """How a quantizer rounds; empty for one that does not."""
    if attributes.get("_disabled") or "_num_bits" not in attributes:
        return ""
    blocks = {key: size for key, size in (attributes.get("_block_sizes") or {}).items() if size not in (None, False)}
    sizes = [str(blocks.pop(dim)) for dim in (-2, -1) if dim in blocks]
    either = blocks.pop(FOUR_OVER_SIX, None)
    dynamic, scales = blocks.pop("type", "static") == "dynamic", blocks.pop("scale_bits", None)
    axis = None if sizes else attributes.get("_axis")  # with blocks, ModelOpt sets it to what they come to
    token = attributes.get("_block_sizes") == {-1: None} or isinstance(
        axis, tuple
    )  # as it is set, and as a call leaves it
    by_token = token and bool(attributes.get("_dynamic"))
    found = [
        _number(attributes["_num_bits"]) + (f" in blocks of {'x'.join(sizes)}" if sizes else ""),
        "dynamic" if dynamic else "",
        f"with scales of {_number(scales)}" if scales else "",
        "of 4 or 6" if either else "",
        f"and {blocks}" if blocks else "",
        "one scale by token" if by_token else f"one scale by axis {axis}" if axis is not None else "",
        *(text for name, text in _ODD.items() if _is_on(attributes.get(name))),
    ]
    return ", ".join(word for word in found if word)


def _number(bits: int | tuple[int, int] | list[int]) -> str:
    bits = bits if isinstance(bits, int) else tuple(bits)
    return _NUMBERS.get(bits, f"{bits} bits")


def _is_on(value: object) -> bool:
    """Whether an attribute is there and not off; some are settings of their own, that are on or off."""
    if isinstance(value, Tensor):
        return True
    return bool(value.get("enable") if isinstance(value, dict) else getattr(value, "enable", value))
