"""Which tensors a linear has in each algorithm that an engine knows: suffix -> dtypes and shapes."""

from functools import cache

from .checkpoint_view import Module

SCALAR = ((), (1,))
_FLOATS = ("F32", "BF16", "F16")
_TWO_INPUTS = ("NVFP4", "W4A16_NVFP4", "NVFP4_AWQ", "W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8")  # in a byte
_TWO_ROWS = ("W4A16_AWQ", "W4A8_AWQ")
MXFP4_EXPERTS = "MXFP4 of experts"  # stacked, as OpenAI has them
_BLOCKS = ("blocks", "modelopt blocks", "FP8_PB_WO")
_GROUPS = dict.fromkeys(("MXFP8", "native MXFP8", "W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8"), 32)
_GROUPS |= dict.fromkeys(("NVFP4", "W4A16_NVFP4", "NVFP4_AWQ"), 16) | dict.fromkeys(_TWO_ROWS, 128)
Wanted = dict[str, tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]]

# What a module may also have, which takes part in no product of codes.
HARMLESS = frozenset({"bias", "e_score_correction_bias"})


@cache
def wanted(algorithm: str, out: int, inputs: int, group: int) -> Wanted:
    """Suffix -> dtypes and shapes, of the tensors of a linear [out, inputs]; groups of `group` inputs share a scale."""
    down, across = -(-out // 128), -(-inputs // 128)
    fp8, scalar = {"weight": (("F8_E4M3",), ((out, inputs),))}, (("F32",), SCALAR)
    fp4 = {
        "weight": (("U8",), ((out, inputs // 2),)),
        "weight_scale": (("F8_E4M3",), ((out, inputs // group),)),
        "weight_scale_2": scalar,
    }
    int4 = {
        "weight": (("U8", "I8"), ((out // 2, inputs),)),
        "weight_scale": (_FLOATS, ((out, inputs // group),)),
    }
    one = ((),) if (down, across) == (1, 1) else ()
    smoothed = {"pre_quant_scale": (_FLOATS, ((inputs,),))}
    found: dict[str, Wanted] = {
        "FP8": fp8 | {"weight_scale": scalar, "input_scale": scalar},
        "FP8_PER_CHANNEL_PER_TOKEN": fp8 | {"weight_scale": (("F32",), ((out,), (out, 1)))},
        "FP8_PB_WO": fp8 | {"weight_scale": (("F32",), ((down, 1, across, 1),))},
        "blocks": fp8 | {"weight_scale_inv": (("F32", "BF16"), ((down, across),))},
        "modelopt blocks": fp8 | {"weight_scale": (("F32",), (*one, (down, across), (down, 1, across, 1)))},
        "NVFP4": fp4 | {"input_scale": scalar},
        "W4A16_NVFP4": fp4,
        "NVFP4_AWQ": fp4 | {"input_scale": scalar} | smoothed,
        "W4A8_NVFP4_FP8": fp4 | {"input_scale": scalar},
        "W4A8_MXFP4_FP8": {"weight": fp4["weight"], "weight_scale": (("U8",), ((out, inputs // 32),))},
        "MXFP8": fp8 | {"weight_scale": (("U8",), ((out, inputs // 32),))},
        "native MXFP8": fp8 | {"weight_scale_inv": (("U8",), ((out, inputs // 32),))},
        "W4A16_AWQ": int4 | smoothed,
        "W4A8_AWQ": int4 | {"weight_scale_2": scalar, "input_scale": scalar} | smoothed,
    }
    return found[algorithm]


def size_of(module: Module, algorithm: str | None) -> tuple[int, int]:
    """The [out, inputs] of a linear, from the shape of its (packed) weight."""
    out, inputs = module["weight"].shape[-2:]
    if algorithm in _TWO_INPUTS:
        return out, inputs * 2
    return (out * 2, inputs) if algorithm in _TWO_ROWS else (out, inputs)


def unit_of(algorithm: str | None, group: int) -> tuple[int, int]:
    """How many rows, and how many inputs, of a linear share a scale, so that they must stay on one GPU."""
    if algorithm in _BLOCKS:
        return 128, 128
    return 1, group if algorithm in _GROUPS else 1


def own_group(algorithm: str | None) -> int:
    """How many inputs share a scale where a config does not say it; 1 for no groups."""
    return _GROUPS.get(algorithm or "", 1)


def named(shapes: tuple[tuple[int, ...], ...]) -> str:
    """Shapes for a message."""
    return " or ".join("a number" if shape == () else str(list(shape)) for shape in shapes if shape != (1,))
