"""Parameters that lie about their dtype as Transformer Engine's `Float8Tensor` does: they say bfloat16 and hold a byte a number."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


class Float8(Tensor):
    """FP8 codes and their scale, which says that it is a bfloat16 tensor, and computes as the one that it stands for."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> "Float8":
        made = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.bfloat16, device=codes.device)
        made.codes, made.scale = codes, scale
        return made

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        pass

    @classmethod
    def of(cls, weight: Tensor) -> "Float8":
        """A bfloat16 weight, rounded."""
        scale = weight.detach().abs().amax().float() / 448
        codes = (weight.detach().float() / scale).to(torch.float8_e4m3fn)
        return cls(codes.view(torch.uint8), scale)

    def dequantize(self) -> Tensor:
        return (self.codes.view(torch.float8_e4m3fn).float() * self.scale).to(torch.bfloat16)

    def detach(self) -> "Float8":
        return type(self)(self.codes, self.scale)

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.codes.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return args[0].detach()

        def known(value: object) -> object:
            return Float8.dequantize(value) if isinstance(value, Float8) else value

        return function(*tree_map(known, args), **tree_map(known, kwargs or {}))


class Opaque(Float8):
    """One that nobody else can read."""

    dequantize = Tensor.dequantize


class Broken(Float8):
    """One whose `dequantize` fails."""

    def dequantize(self) -> Tensor:
        raise NotImplementedError("the codes are transposed")


class Flat(Float8):
    """One whose `dequantize` gives another shape."""

    def dequantize(self) -> Tensor:
        return super().dequantize().flatten()


class Wide(Float8):
    """One whose `dequantize` gives another dtype."""

    def dequantize(self) -> Tensor:
        return super().dequantize().float()


def quantize_parameters(model: nn.Module, kind: type[Float8] = Float8) -> int:
    """Put such tensors in the place of all weights with two dims; how many there are now."""
    found = [
        (module, name) for module in model.modules() for name, one in module._parameters.items() if one is not None
    ]
    weights = [(module, name) for module, name in found if module._parameters[name].dim() == 2]
    for module, name in weights:
        replace_parameter(module, name, kind.of(module._parameters[name]))
    return len(weights)


def dequantize_parameters(model: nn.Module) -> None:
    """Put plain tensors of the same numbers back."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if isinstance(weight, Float8):
                replace_parameter(module, name, weight.dequantize())


def replace_parameter(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Let a module have a frozen parameter of this tensor."""
    module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
