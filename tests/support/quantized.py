"""Parameters that lie about their dtype as Transformer Engine's `Float8Tensor` does: they say bfloat16 and hold a byte a number."""

from types import SimpleNamespace
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


class Blockwise(Float8):
    """As `Float8BlockwiseQTensor` of Transformer Engine 2.20: squares of 128, scales padded to whole fours of columns."""

    tile = (128, 128)

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> "Blockwise":
        made = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.bfloat16, device=codes.device)
        made._rowwise_data, made._rowwise_scale_inv = codes, scale
        made._fp8_dtype, made._is_2D_scaled = SimpleNamespace(name="kFloat8E4M3"), True
        return made

    @classmethod
    def of(cls, weight: Tensor) -> "Blockwise":
        """A bfloat16 weight, rounded, with powers of two as scales, some larger than they need be."""
        tall, wide = cls.tile
        values = weight.detach().float()
        padded = nn.functional.pad(values, (0, -values.shape[1] % wide, 0, -values.shape[0] % tall))
        amax = padded.unflatten(1, (-1, wide)).unflatten(0, (-1, tall)).abs().amax(dim=(1, 3))
        scale = torch.exp2(torch.ceil(torch.log2(amax / 448)) + torch.arange(amax.numel()).view(amax.shape) % 2)
        codes = (values / cls.spread(scale, values.shape)).to(torch.float8_e4m3fn)
        return cls(codes.view(torch.uint8), cls.stored(scale))

    @classmethod
    def spread(cls, scale: Tensor, shape: torch.Size) -> Tensor:
        return scale.repeat_interleave(cls.tile[0], 0).repeat_interleave(cls.tile[1], 1)[: shape[0], : shape[1]]

    @classmethod
    def stored(cls, scale: Tensor) -> Tensor:
        return nn.functional.pad(scale, (0, -scale.shape[1] % 4), value=7.0)

    @classmethod
    def numbers(cls, scale: Tensor) -> Tensor:
        return scale

    def dequantize(self) -> Tensor:
        scale = self.spread(self.numbers(self._rowwise_scale_inv), self.shape)
        return (self._rowwise_data.view(torch.float8_e4m3fn).float() * scale).to(torch.bfloat16)

    def detach(self) -> "Blockwise":
        return type(self)(self._rowwise_data, self._rowwise_scale_inv)

    def untyped_storage(self) -> torch.UntypedStorage:
        return self._rowwise_data.untyped_storage()


class Mx(Blockwise):
    """As `MXFP8Tensor`: exponents of powers of two for 32 of a row, padded to whole 128 of rows."""

    tile = (1, 32)

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> "Mx":
        made = Blockwise.__new__(cls, codes, scale)
        del made._is_2D_scaled
        made._with_gemm_swizzled_scales = False
        return made

    @classmethod
    def stored(cls, scale: Tensor) -> Tensor:
        exponents = (torch.log2(scale) + 127).to(torch.uint8)
        return nn.functional.pad(exponents, (0, -scale.shape[1] % 4, 0, -scale.shape[0] % 128), value=9)

    @classmethod
    def numbers(cls, scale: Tensor) -> Tensor:
        return torch.exp2(scale.float() - 127)
