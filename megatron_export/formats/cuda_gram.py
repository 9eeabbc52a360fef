"""What awq_gram.py does to weights for every alpha beside its products, on CUDA: each pass reads and writes a number once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .cuda_kernels import kernels, launch

if TYPE_CHECKING:
    from torch import Tensor

TILE = {"ROWS": 16, "COLUMNS": 256}  # of a program


def changes(rounded: Tensor, ours: Tensor, weight: Tensor, theirs: Tensor, dtype: torch.dtype) -> Tensor:
    """awq_gram.changes."""
    rows, columns = weight.shape
    made = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    tensors = rounded.expand_as(weight), ours.expand(columns), weight, theirs.expand(columns), made
    launch(
        kernels("triton_gram").changes,
        _programs(rows, columns),
        *tensors,
        rows,
        columns,
        **TILE,
        enable_fp_fusion=False,
    )
    return made


def dot(product: Tensor, changes: Tensor, start: int) -> Tensor:
    """awq_gram.dot."""
    rows, width = product.shape
    columns = changes[:rows, start : start + width].expand(rows, width)  # which raises unless they are there
    sums = torch.empty(_programs(rows, width), dtype=torch.float64, device=product.device)
    sizes = rows, width, columns.stride(0), start
    launch(kernels("triton_gram").dot, len(sums), product, changes, sums, *sizes, **TILE)
    return sums.sum()


def _programs(rows: int, columns: int) -> int:
    return -(-rows // TILE["ROWS"]) * -(-columns // TILE["COLUMNS"])
