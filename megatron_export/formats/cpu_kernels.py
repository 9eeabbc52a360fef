"""Encoding on a CPU by something faster than plain torch: the same bytes, as `cuda_kernels.py` makes them on a GPU.

A bfloat16 number is one of 65,536. Where a whole weight has one scale, the codes of all of them are a table, which Arrow reads.
Threads work on strips of rows, and call as little of torch as they can: after every operation they wait for a turn of Python.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..common.piece import Amax, Piece
from ..common.strips import shared_strips
from ..common.threads import begin
from . import fp8
from .cpu import empty
from .form import Form

if TYPE_CHECKING:
    from torch import Tensor

TABLED = 1 << 16  # weights from which on a table is worth making


def kernel_of(form: Form, weight: Tensor) -> Callable[[Tensor, Amax], dict[str, Piece]] | None:
    """What stands for `form.encode` for this weight; None where nothing does."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or weight.numel() < TABLED:
        return None
    return KERNELS.get(form.encode)


def encode_fp8(weight: Tensor, amax: Amax) -> dict[str, Piece]:
    """fp8.encode; within `gathered`, its codes are there when that has ended."""
    import pyarrow as pa
    import pyarrow.compute as pc

    scale = fp8.scale_of(amax.weight)
    table = _fp8_table(float(scale))
    made = empty(weight.shape, torch.float8_e4m3fn, weight.device)
    numbers, codes = weight.detach().view(torch.int16).numpy(), made.view(torch.uint8).numpy()

    def put(rows: slice) -> None:
        mine = np.ascontiguousarray(numbers[rows])
        indices = pa.Array.from_buffers(pa.uint16(), mine.size, [None, pa.py_buffer(mine)])
        found = pc.take(table, indices, boundscheck=False).buffers()[1]
        codes[rows] = np.frombuffer(found, np.uint8, mine.size).reshape(mine.shape)

    begin(put, shared_strips(weight, 1))
    return fp8.pieces(made, scale, fp8.scale_of(amax.input))


@lru_cache(maxsize=8)  # linears that engines fuse have one scale, and so have strips of one parameter
def _fp8_table(scale: float) -> Any:
    """The codes of all bfloat16 numbers, in the order of their bits, as an array of Arrow's."""
    import pyarrow as pa

    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return pa.array(fp8.codes_of(numbers, torch.tensor(scale)).view(torch.uint8).numpy())


KERNELS = {fp8.encode: encode_fp8}
