"""What a tensor has in memory, against what it says: an FP8 tensor of Transformer Engine says bfloat16 and has a byte a number."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def kind_of(tensor: Tensor) -> str:
    """The class of a tensor that is not plain, with its module; "" for a plain one."""
    kind = type(tensor)  # one of another class may say what it likes of its dtype and device
    return "" if kind in (torch.Tensor, torch.nn.Parameter) else f"{kind.__module__}.{kind.__qualname__}"


def bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of a plain tensor, in its order: uint8 [bytes]; the same memory, if it is contiguous."""
    flat = tensor if tensor.is_contiguous() else tensor.contiguous()
    return flat.view(-1).view(torch.uint8)


def shortage(tensor: Tensor) -> str:
    """Why the memory of a plain tensor cannot hold what it says; "" if it can. Reads no number, and waits for no device."""
    if tensor.layout is not torch.strided:
        return f"it is {tensor.layout}, not dense"
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((size - 1) * stride for size, stride in steps)
    needed, held = (last + 1) * tensor.element_size(), tensor.untyped_storage().nbytes()
    if tensor.numel() == 0 or needed <= held:
        return ""
    return f"as {tensor.dtype} {tuple(tensor.shape)} it takes {needed:,} bytes of memory, and has {held:,}"
