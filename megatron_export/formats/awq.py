"""AWQ's vectors: how an input channel's activations and weights make its smoothing factor, one vector for each alpha.

A smoothing vector s has one factor per input channel of a linear. The weight is multiplied by it before it is
quantized, the input is divided by it, and the product stays the same:

    s(alpha) = clamp(a^alpha / w^(1 - alpha), 1e-4, 1e4), divided by sqrt(max * min)
    a   mean over micro-batches of the mean |input| over tokens, each mean rounded to bfloat16
    w   mean over output rows of |weight| / largest |weight| of its group, in bfloat16

What a checkpoint and a calibration file hold is p = 1 / s, float32: the quantized weight is bfloat16(float32(w) / p).
The search for alpha is in calibration/awq_search.py. Source: AWQ, arXiv 2306.00978; constants and roundings are ModelOpt 0.47's.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..common.strips import row_strips
from . import cuda_kernels, int4, nvfp4

if TYPE_CHECKING:
    from torch import Tensor

ALPHAS = struct.unpack("11f", struct.pack("11f", *(0.1 * step for step in range(11))))  # 0 to 1 in float32 steps
_TINY = 2.0**-126  # the least normal float32


@dataclass(frozen=True)
class Search:
    """How weights are rounded while a search compares them.

    group       inputs that share a scale
    per_tensor  whether the rounding depends on the amax of the whole tensor, over all its shards
    rounded     (bfloat16 weight, float32 amax) -> bfloat16 weight, as the search's quantizer simulates it
    kernel      (bfloat16 weight, bfloat16 factors, float32 amax) -> the same of weight * factors, on CUDA
    """

    group: int
    per_tensor: bool
    rounded: Callable[[Tensor, Tensor | None], Tensor]
    kernel: Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _int4(weight: Tensor, amax: Tensor | None, group: int) -> Tensor:
    return int4.rounded(weight, group)


SEARCHES = {
    "int4_g128": Search(128, False, partial(_int4, group=128), partial(cuda_kernels.rounded_int4, group=128)),
    "int4_g64": Search(64, False, partial(_int4, group=64), partial(cuda_kernels.rounded_int4, group=64)),
    "nvfp4": Search(nvfp4.BLOCK, True, nvfp4.rounded, cuda_kernels.rounded_nvfp4),
}
SHARED = "_shared"  # ends the key of a search that gives the queries of a group one vector


def search_of(key: str) -> Search:
    """The search that a key means, alone or shared."""
    return SEARCHES[key.removesuffix(SHARED)]


def rounded(search: Search, weight: Tensor, factors: Tensor, amax: Tensor | None) -> Tensor:
    """`search.rounded` of weight * factors, bfloat16 [out, in] and [in], in strips of rows; on CUDA by a kernel."""
    if _taken(search, weight):
        return search.kernel(weight, factors.contiguous(), amax)
    made = torch.empty_like(weight)
    for rows in row_strips(weight, 1):
        made[rows] = search.rounded(weight[rows] * factors, amax)
    return made


def scaled(search: Search, inputs: Tensor, factors: Tensor) -> Tensor:
    """inputs * factors, bfloat16 [tokens, in] and [in]; on CUDA by a kernel, in a third of the time."""
    return (
        cuda_kernels.scaled(inputs, factors.contiguous(), search.group) if _taken(search, inputs) else inputs * factors
    )


def _taken(search: Search, matrix: Tensor) -> bool:
    """Whether kernels take it: a bfloat16 [..., in] matrix of whole groups on CUDA."""
    return cuda_kernels.readable(matrix) and matrix.shape[1] % search.group == 0 and cuda_kernels.works(matrix.device)


def largest(weight: Tensor, factors: Tensor) -> Tensor:
    """amax of weight * factors in bfloat16, for each row of positive factors [alphas, in]: float32 [alphas].

    Of a column's magnitudes the largest stays so when all are multiplied by one factor and rounded: it alone need be.
    """
    return (largest_of_columns(weight) * factors).amax(dim=1).float()


def largest_of_columns(weight: Tensor) -> Tensor:
    """The largest magnitude of each column of a [out, in] weight: [in]."""
    return torch.maximum(weight.amax(0), -weight.amin(0))


def float32_product(one: Tensor, other: Tensor) -> Tensor:
    """one @ other.T of numbers of 16 bits or float32, added up in float32: float32."""
    if one.is_cuda:
        return torch.mm(one, other.T, out_dtype=torch.float32)
    return one.float() @ other.float().T


def squares(product: Tensor, expected: Tensor) -> Tensor:
    """Sum of squares of bfloat16(product) - expected, a bfloat16 difference, of one shape: float64 []."""
    if product.is_cuda and cuda_kernels.works(product.device):
        return cuda_kernels.squares(product.contiguous(), expected.contiguous())
    return (product.to(torch.bfloat16) - expected).float().square().sum(dtype=torch.float64)


def importance(weight: Tensor, group: int) -> Tensor:
    """Sum over the rows of |w| / group's largest |w|, of a bfloat16 [out, in] weight: float64 [in].

    The bfloat16 quotients add up in float64 without rounding, so that shards of rows give the same sum.
    """
    total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for rows in row_strips(weight, 1):
        size = weight[rows].unflatten(1, (-1, group)).abs()
        total += (size / (size.amax(dim=2, keepdim=True) + _TINY)).flatten(1).sum(dim=0, dtype=torch.float64)
    return total


def factors(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """s(alpha), float32 [in], from the means a and w, float32 [in] on the CPU, whatever the device of the model.

    The last bits of a power still depend on the kind of CPU.
    """
    made = (activation.pow(alpha) / (weight.pow(1 - alpha) + _TINY)).clamp(1e-4, 1e4)
    return made / (made.max() * made.min()).sqrt()
