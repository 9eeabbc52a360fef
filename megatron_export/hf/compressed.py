"""Weights that `mtq.compress` of ModelOpt replaced by codes: which ones are read, and what they stand for.

ModelOpt leaves these beside the codes, as buffers of the weight's quantizer:

    nvfp4   weight uint8 [out, in/2], two codes a byte   _scale e4m3 [out, in/16]   _double_scale float32 []
    fp8     weight e4m3 [out, in]                        _scale bfloat16 []

A number is code x scale (x double scale), which is what the model computes with; a negative zero of nvfp4 is read as a number that
is so little below zero that it becomes a negative zero again. Of fp8, ModelOpt's own export writes the scale
that was meant, amax / 448; the codes were made with that scale rounded to bfloat16, which is taken here.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.errors import ExportError
from ..formats import fp8, nvfp4
from ..formats.packing import unpack

Attributes = dict[str, Any]  # of a quantizer, its buffers too
CODES = (torch.uint8, torch.float8_e4m3fn)
_KEPT = ("_scale", "_double_scale")
_MINUS_ZERO, _LITTLE = 8, 2.0**-20


@dataclass(frozen=True)
class Coded:
    """What the codes of a weight are multiplied with: one number, or that of each block of 16 inputs and one for all."""

    scale: Tensor
    double: Tensor | None

    @property
    def amax(self) -> Tensor:
        """The amax that the codes were made with, float32 []."""
        if self.double is None:
            return self.scale.float().reshape(()) * fp8.E4M3_MAX
        return self.double.float().reshape(()) * (nvfp4.E2M1_MAX * fp8.E4M3_MAX)

    def shape(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the weight."""
        return codes if self.double is None else (codes[0], 2 * codes[1])

    def decode(self, codes: Tensor) -> Tensor:
        """The weight in float32, [out, in]."""
        if self.double is None:
            return codes.float() * self.scale.float()
        scales = (self.scale.float() * self.double.float()).unsqueeze(2)
        blocks = unpack(codes, dim=1).unflatten(1, (-1, nvfp4.BLOCK))
        values = nvfp4.values_of(blocks, scales)
        return torch.where(
            (blocks == _MINUS_ZERO).flatten(1), -scales.expand(blocks.shape).flatten(1) * _LITTLE, values
        )


def coded(name: str, weight: Tensor, quantizer: Attributes) -> Coded | None:
    """What the codes in a weight are multiplied with; None where it has numbers. `ExportError` for codes that are not read."""
    if weight.dtype not in CODES:
        return None
    scale, double = (quantizer.get(key) for key in _KEPT)
    bits, blocks = quantizer.get("_num_bits"), quantizer.get("_block_sizes")
    if scale is None:
        raise ExportError(
            f"{name} is {weight.dtype}: codes, and its quantizer has no _scale to multiply them with. Export before mtq.compress"
        )
    four = weight.dtype == torch.uint8 and bits == (2, 1) and double is not None and scale.dtype == torch.float8_e4m3fn
    eight = weight.dtype == torch.float8_e4m3fn and bits == (4, 3) and not blocks and scale.numel() == 1
    if not (four or eight):
        raise ExportError(
            f"{name} was compressed by ModelOpt to {weight.dtype} with scales {scale.dtype} {tuple(scale.shape)}; only NVFP4 and "
            "FP8 with one scale are read. Export before mtq.compress"
        )
    return Coded(scale, double if four else None)


def uncompressed(quantizer: Attributes, found: Coded | None) -> Attributes:
    """The attributes that a weight's quantizer had before, and the amax that its codes were made with."""
    if found is None:
        return quantizer
    return {key: value for key, value in quantizer.items() if key not in _KEPT} | {"_amax": found.amax}
