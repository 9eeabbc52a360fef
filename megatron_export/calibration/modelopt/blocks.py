"""Amaxes that ModelOpt's quantizers keep of each block of a weight: whether an export rounds the weight with them.

An export makes the scales of blocks anew. So they must be those that the quantizer holds: of the blocks' own amaxes, or, where
NVFP4's are static, those that ModelOpt searched, as `--nvfp4-scales` does. ModelOpt 0.47 keeps a static block's amax so that

    weight_scale    e4m3(amax / 6 * m / (amax of the weight / 6)), within 2^-9 and 448; m is 448, or 256 for four_over_six
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...common.piece import Amax
from ...formats import Options, chosen, encode, nvfp4

STATIC = "static"  # scales of NVFP4 that the settings do not tell: of the blocks' own amaxes, or searched


@dataclass(frozen=True)
class Blocks:
    """amax     of each block, in the order of the weight's rows, or what stands for them in a checkpoint
    size     rows and columns of a block
    scales   of static NVFP4, `STATIC` or the one of --nvfp4-scales that gives them; "" for amaxes that must be the blocks' own
    largest  of static NVFP4, the amax of the weight by which the scales were made
    """

    amax: Any
    size: tuple[int, int]
    scales: str = ""
    largest: float = 0.0


def own(weight: Tensor, amax: Tensor, size: tuple[int, int]) -> bool:
    """Whether these are the amaxes of a weight's own blocks: they were not searched or clipped, nor was the model trained since."""
    rows, columns = size
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
    found = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).abs().amax(dim=(1, 3)).flatten().float()
    amax = amax.flatten().float().to(found.device)
    return found.shape == amax.shape and torch.equal(found, amax)


def scales_of(weight: Tensor, amax: Tensor, blocks: Blocks) -> str:
    """The one of --nvfp4-scales by which static scales of NVFP4 were made."""
    if blocks.scales != STATIC:
        return blocks.scales
    return "max" if own(weight, amax, blocks.size) else "mse"


def kept(weight: Tensor, amax: Tensor, blocks: Blocks, scales: str, largest: float) -> bool:
    """Whether an export rounds a weight as its quantizer does: with `scales`, under `largest`, the amax of it and its like."""
    if not blocks.scales:
        return own(weight, amax, blocks.size)
    held, form = amax.flatten().float(), chosen("w4a16_nvfp4", Options(nvfp4_scales=scales))
    if not blocks.largest or held.numel() * nvfp4.BLOCK != weight.numel():
        return not blocks.largest and not weight.any()
    whole = torch.tensor(largest, device=weight.device)
    made = encode(form, weight.to(torch.bfloat16).contiguous(), Amax(whole, whole))["weight_scale"].data
    return torch.equal(
        made.flatten().view(torch.uint8), _exported(held, blocks, scales).to(made.device).view(torch.uint8)
    )


def stale(linears: Iterable[str]) -> list[str]:
    """What is said of linears whose amaxes are not kept."""
    found = list(linears)
    return [
        f"{first} (of {len(found)} such): its quantizer's amaxes are not those of its weight's blocks, which are what is "
        "exported, nor those of a search that is known here: ModelOpt clipped or trained them, or the model was trained since. "
        "Calibrate the quantizers again, without clipping"
        for first in found[:1]
    ]


def _exported(amax: Tensor, blocks: Blocks, scales: str) -> Tensor:
    """The `weight_scale` that ModelOpt exports of static amaxes, e4m3 of the same shape."""
    scale, largest = amax / nvfp4.E2M1_MAX, torch.tensor(blocks.largest, device=amax.device) / nvfp4.E2M1_MAX
    scale = torch.where(scale == 0, 1.0, scale) * nvfp4.LARGEST_SCALE[scales] / largest
    return scale.clamp(nvfp4.E4M3_TINY, nvfp4.LARGEST_SCALE["max"]).to(torch.float8_e4m3fn)
