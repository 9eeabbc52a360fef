"""Products of bfloat16 matrices in float32, on a processor without instructions for bfloat16: torch's own take five times as long
there, and more. Both add in float32 and round each sum once, so they differ as sums in another order do.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .strips import strips_of

SLOW = ("AVX2",)  # what torch calls such processors; with AVX512 it has oneDNN's products
ELEMENTS = 1 << 22  # of a product, or a little more: what is made at a time in float32

_aten = torch.ops.aten
PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default}
COMPOSED = {_aten.linear.default, _aten.matmul.default}  # of products, which torch calls itself but in inference mode


def fast_products(device: torch.device | str) -> AbstractContextManager:
    """While open, this thread multiplies bfloat16 matrices in float32, where `device` is a CPU on which that is faster. That takes,
    beside what torch takes, float32 copies: of the left matrix, and of `ELEMENTS` numbers of the right one and of the product. Of
    stacks of matrices it takes those of as many numbers of each, or of one matrix that has more.

    For a GPU nothing is changed: every operation would wait for Python, whatever CPU its host has.
    """
    slow = torch.device(device).type == "cpu" and torch.backends.cpu.get_cpu_capability() in SLOW
    return _InFloat32() if slow else nullcontext()


class _InFloat32(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        options = kwargs or {}
        if func in COMPOSED:
            with self:
                return func.decompose(*args, **options)
        if func not in PRODUCTS or not all(map(_is_slow, args)):
            return func(*args, **options)
        return _product(func, *args, **options)


def _is_slow(one: Tensor) -> bool:
    """Whether it is a plain bfloat16 tensor on the CPU."""
    return type(one) in (Tensor, torch.nn.Parameter) and one.is_cpu and one.dtype == torch.bfloat16


def _product(func: Any, *operands: Tensor, **options: Any) -> Tensor:
    """What one of `PRODUCTS` gives: of stacks some matrices at a time, else some columns."""
    *added, left, right = operands
    stack = left.dim() == 3
    made = left.new_empty((*left.shape[:-1], right.shape[-1]))
    along = 0 if stack else 1
    other = left.shape if stack else right.shape
    left = left if stack else left.float()
    size = made.shape[along]
    each = max(prod(made.shape), prod(other)) // max(size, 1)  # elements
    for cut in strips_of((size, each), elements=ELEMENTS):
        where = (along, cut.start, cut.stop - cut.start)
        mine = [one.expand(made.shape).narrow(*where).float() for one in added]
        mine += [left.narrow(*where).float() if stack else left, right.narrow(*where).float()]
        made.narrow(*where).copy_(func(*mine, **options))
    return made
