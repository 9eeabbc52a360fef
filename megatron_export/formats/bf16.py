"""BF16: the weights as they are, `weight` bfloat16 [out, in]. Also how every format writes what it does not quantize."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..common.piece import Amax, Axis, Piece
from .form import AS_HF, Arithmetic, Form, Options, Stored, not_rounded

if TYPE_CHECKING:
    from torch import Tensor

NAME = "bf16"
OPTIONS = ()


def encode(weight: Tensor, amax: Amax | None = None) -> dict[str, Piece]:
    """A tensor of any rank -> the same in bfloat16; its first dim follows OUT, its second IN."""
    return {"weight": Piece(weight.to(torch.bfloat16), (Axis.OUT, Axis.IN)[: weight.dim()])}


def decode(pieces: dict[str, Piece]) -> Tensor:
    """The float32 weight that an engine multiplies with."""
    return pieces["weight"].data.float()


def requantize(weight: Tensor, pieces: dict[str, Piece]) -> Tensor:
    """The weight itself: nothing was rounded."""
    return weight


FORM = Form(
    name=NAME,
    tile=(1, 1),
    ragged=False,
    stored={"weight": Stored("BF16", 1, 1)},
    encode=encode,
    decode=decode,
    requantize=requantize,
    quantization={},
    numbers=None,
    native=None,
    arithmetic=Arithmetic(not_rounded, "BF16"),
    least_snr=40.0,
    latent=True,
    stack=AS_HF,
    no_experts="",
    smoothing=None,
)


def form(options: Options) -> Form:
    """The format; it has no options."""
    return FORM
