"""What a finished checkpoint of compressed-tensors keeps its weights in, whatever its inputs are quantized to.

    float-quantized, or naive-quantized
        NAME               e4m3 [out, in]
        NAME_scale         [] or [1], [out] or [out, 1], or [ceil(out/128), ceil(in/128)]   float32(value) x scale
    nvfp4-pack-quantized
        NAME_packed        uint8 [out, in/2]        two e2m1 codes, the first in the low nibble
        NAME_scale         e4m3 [out, in/16]
        NAME_global_scale  float32 [1], a divisor   e2m1(code) x (scale / global scale)

and the packed formats of dialects.py. Each group of modules may have another (mixed-precision). Sources: compressors/
quantized_compressors and quantization/lifecycle/forward.py of compressed-tensors 0.17.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..common.piece import Piece
from ..common.safe_files import shown
from ..formats import nvfp4
from .dialects import BLOCK, BLOCKS, PLAIN, Dialect, Shape, Take, all_of, dialect_of, in_blocks

MIXED, COMPRESSED = "mixed-precision", "compressed"
GROUPS = {"tensor": None, "channel": None, "block": [BLOCK, BLOCK]}  # strategy of FP8 -> block_structure


def dialects_in(config: dict) -> tuple[Dialect, ...]:
    """The dialects of a config.json's `quantization_config` of compressed-tensors; `ValueError`: why they are not known."""
    said = config["quantization_config"]
    groups, status = said.get("config_groups"), said.get("quantization_status", COMPRESSED)
    if not isinstance(groups, dict) or not groups or not all(isinstance(one, dict) for one in groups.values()):
        raise ValueError(f"config_groups {shown(groups)}")
    if status != COMPRESSED:
        raise ValueError(f"quantization_status {shown(status)}")
    for part in ("transform_config", "sparsity_config"):
        if said.get(part):
            raise ValueError(f"{part} {shown(said[part])}")
    return tuple(_of_groups(said, groups))


def _of_groups(said: dict, groups: dict[str, dict]) -> Iterator[Dialect]:
    for group in groups.values():
        stored, weights = group.get("format") or said.get("format"), group.get("weights")
        if stored in ("float-quantized", "naive-quantized"):
            _check(weights, stored, type="float", num_bits=8, symmetric=True)
            strategy = weights.get("strategy")
            if strategy not in GROUPS or GROUPS[strategy] not in (None, weights.get("block_structure")):
                raise ValueError(f"strategy {shown(strategy)} of {shown(weights.get('block_structure'))}")
            yield FLOAT8
        elif stored == "nvfp4-pack-quantized":
            _check(weights, stored, type="float", num_bits=4, symmetric=True, group_size=nvfp4.BLOCK)
            yield NVFP4
        else:
            alone = {"weights": weights}  # how inputs are quantized is nothing to a weight
            narrowed = said | {"format": stored, "config_groups": {"alone": alone}}
            yield dialect_of({"quantization_config": narrowed})


def _check(weights: object, stored: str, **asked: object) -> None:
    if not isinstance(weights, dict):
        raise ValueError(f"weights {shown(weights)}")
    for key, value in asked.items():
        if weights.get(key) != value:
            raise ValueError(f"format {shown(stored)}, {key} {shown(weights.get(key))}")


def _float8(take: Take, shape: Shape, where: tuple[slice, ...]) -> Tensor:
    cuts, scales = all_of(where, shape), take("_scale", ())
    if scales.numel() == 1:
        return take("", cuts).float() * scales.float().reshape(())
    if tuple(scales.shape) in ((shape[0],), (shape[0], 1)):
        return take("", cuts).float() * scales.float().reshape(-1, 1)[cuts[0]]
    if tuple(scales.shape) == BLOCKS.shapes(shape)[1]:
        touched = tuple(slice(cut.start // BLOCK, -(-cut.stop // BLOCK)) for cut in cuts)
        return in_blocks(take("", cuts), scales[touched], cuts)
    raise ValueError(f"is {shape}, but its scales are {tuple(scales.shape)}")


def _nvfp4(take: Take, shape: Shape, where: tuple[slice, ...]) -> Tensor:
    rows, columns = all_of(where, shape)
    packed, scales, divisor = take("_packed", (rows,)), take("_scale", (rows,)), take("_global_scale", ())
    own = {"weight": packed, "weight_scale": scales.float() / divisor.reshape(()), "weight_scale_2": torch.ones(())}
    return nvfp4.decode({suffix: Piece(data, ()) for suffix, data in own.items()})[:, columns]


# Of any strategy: `shapes` has the codes alone.
FLOAT8 = replace(
    BLOCKS, tensors={"": ("F8_E4M3",), "_scale": PLAIN}, sign="_scale", shapes=lambda shape: (shape,), read=_float8
)
NVFP4 = replace(
    FLOAT8,
    tensors={"_packed": ("U8",), "_scale": ("F8_E4M3",), "_global_scale": ("F32",)},
    sign="_global_scale",
    shapes=lambda shape: ((shape[0], shape[1] // 2), (shape[0], -(-shape[1] // nvfp4.BLOCK)), (1,)),
    whole=lambda codes: (codes[0], codes[1] * 2),
    read=_nvfp4,
)
