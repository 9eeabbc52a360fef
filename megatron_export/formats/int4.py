"""Four-bit integers in groups along the input, shared by the AWQ formats: rounding, packing and the search's rounding.

    weight        uint8 [out/2, in]         rows 2r in the low nibble, 2r+1 in the high nibble, two's complement
    weight_scale  float32 [out, in/group]   group amax / 7; 1 for a group of zeros

A code is clamp(round(float32(w) / weight_scale), -8, 7), rounded half to even. A group may be clipped: its amax is
then its ratio times its largest magnitude, and codes beyond saturate. Value: code * weight_scale.
`out` must be even and `in` a multiple of the group. Source: ModelOpt 0.47 unified checkpoint, quant_algo W4A16_AWQ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..common.piece import Amax, Axis, Piece
from .form import ONE_NUMBER, Form, Options, Smoothing, Stored
from .fp8 import scale_of
from .packing import pack, unpack

if TYPE_CHECKING:
    from torch import Tensor

INT4_MAX = 7.0
INT4_MIN = -8.0
CLIP_RATIOS = tuple(round(0.5 + 0.05 * step, 2) for step in range(11))  # a clip code is an index into this


def group_amax(weight: Tensor, group: int, clip: Tensor | None) -> Tensor:
    """float32 [out, in/group]: each group's largest magnitude, times its ratio where `clip` holds codes."""
    amax = weight.unflatten(1, (-1, group)).abs().amax(2).float()
    return amax if clip is None else amax * torch.tensor(CLIP_RATIOS, device=clip.device)[clip.long()]


def encode(weight: Tensor, amax: Amax, group: int) -> dict[str, Piece]:
    """Quantize one linear: `weight` bfloat16 [out, in] -> the tensors above, by suffix."""
    scale = scale_of(group_amax(weight, group, amax.clip), INT4_MAX)
    codes = (weight.float().unflatten(1, (-1, group)) / scale.unsqueeze(2)).round_().clamp_(INT4_MIN, INT4_MAX)
    codes = codes.flatten(1).to(torch.int8).view(torch.uint8) & 15
    return pieces(pack(codes, dim=0), scale)


def pieces(packed: Tensor, scale: Tensor) -> dict[str, Piece]:
    """The tensors above, by suffix."""
    return {"weight": Piece(packed, (Axis.OUT, Axis.IN)), "weight_scale": Piece(scale, (Axis.OUT, Axis.IN))}


def decode(pieces: dict[str, Piece]) -> Tensor:
    """The float32 [out, in] weight: code * weight_scale."""
    codes = unpack(pieces["weight"].data, dim=0).to(torch.int8)
    codes = torch.where(codes > INT4_MAX, codes - 16, codes)
    scale = pieces["weight_scale"].data
    return (codes.float().unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(2)).flatten(1)


def requantize(weight: Tensor, pieces: dict[str, Piece]) -> Tensor:
    """A float32 [out, in] weight rounded once more with the scales on disk."""
    scale = pieces["weight_scale"].data.unsqueeze(2)
    groups = weight.unflatten(1, (scale.shape[1], -1))
    return ((groups / scale).round_().clamp_(INT4_MIN, INT4_MAX) * scale).flatten(1)


def rounded(weight: Tensor, group: int, clip: Tensor | None = None) -> Tensor:
    """The bfloat16 [out, in] weight that a search compares: ModelOpt's arithmetic of simulated quantization.

    It multiplies by 7 / amax where `encode` divides by amax / 7. The two differ at ties, and ModelOpt's losses are
    reproduced only by the first.
    """
    amax = group_amax(weight, group, clip)
    scale = (torch.full_like(amax, INT4_MAX) / torch.where(amax == 0, INT4_MAX, amax)).unsqueeze(2)
    codes = (weight.float().unflatten(1, (-1, group)) * scale).round_().clamp_(INT4_MIN, INT4_MAX)
    return (codes / scale).flatten(1).to(torch.bfloat16)


def awq_form(name: str, algorithm: str, options: Options, numbers: tuple[str, ...] = (), **own: Any) -> Form:
    """An AWQ format on groups of `options.group_size`: smoothed, its vectors folded into norms alone. `numbers` are the
    suffixes of single numbers that it stores, `own` the fields of `Form` that are its own: what it does to weights.
    """
    group = options.group_size
    return Form(
        name=name,
        tile=(2, group),
        ragged=False,
        stored={"weight": Stored("U8", 2, 1), "weight_scale": Stored("F32", 1, group)}
        | dict.fromkeys(numbers, ONE_NUMBER),
        quantization={"quant_algo": algorithm, "group_size": group, "has_zero_point": False, "pre_quant_scale": True},
        numbers=None,
        native=None,
        least_snr=6.0,
        latent=False,
        stack=None,
        no_experts="",
        smoothing=Smoothing(f"int4_g{group}", folds=False, keeps=True, clip=options.awq_clip),
        **own,
    )
