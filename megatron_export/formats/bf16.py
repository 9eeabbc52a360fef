"""BF16: the weights as they are, `weight` bfloat16 [out, in]. Also how every format writes what it does not quantize."""

from torch import Tensor, bfloat16

from ..common.piece import Amax, Axis, Piece
from .form import Form, Options

NAME = "bf16"
OPTIONS = ()


def encode(weight: Tensor, amax: Amax | None = None) -> dict[str, Piece]:
    """A tensor of any rank -> the same in bfloat16; its first dim follows OUT, its second IN."""
    return {"weight": Piece(weight.to(bfloat16), (Axis.OUT, Axis.IN)[: weight.dim()])}


def decode(pieces: dict[str, Piece]) -> Tensor:
    """The float32 weight that an engine multiplies with."""
    return pieces["weight"].data.float()


FORM = Form(name=NAME, tile=(1, 1), encode=encode, decode=decode, quantization={}, stackable=True, activations=False)


def form(options: Options) -> Form:
    """The format; it has no options."""
    return FORM
