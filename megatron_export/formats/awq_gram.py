"""AWQ's losses by the square of the inputs: how far a rounded weight moves the outputs, without making outputs.

Let W be a weight, X the inputs of one micro-batch, s an alpha's factors, W' the rounded W * s. With D = W' / s - W and G = X^T X

    || (X / s) W'^T - X W^T ||^2  =  sum over rows d of D of  d G d^T

G, [in, in], is made once for all alphas: tokens * in^2 operations and out * in^2 for each alpha, where outputs take tokens * in *
out for each. So it is worth its while where there are many tokens: `pays`. G is symmetric, so blocks below its diagonal are not
made, and those above it count twice. It lives as long as one call of one linear.

On CUDA the products are of float16, added up in float32. For that G is divided by the norms of its channels, which makes it a
matrix of correlations, and D is multiplied by them and by a number that brings it below 2^15. Rounding to float16 moves each number
by at most 2^-12 of itself, at random, and a loss by some 4e-6 of it, or 2e-4 where one token or channel makes most of it. The other
way moves a loss by some 1e-3 of it, for neighbouring alphas nearly alike: it rounds outputs to bfloat16, and inputs once more when
they are scaled.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..common.strips import row_strips
from . import awq, cuda_gram, cuda_kernels
from .awq import ALPHAS, Search

if TYPE_CHECKING:
    from torch import Tensor

WIDTH = 1024  # channels of a block of the square
LARGEST = 2.0**15  # of what float16 is given of a weight


def pays(tokens: int, rows: int, columns: int) -> bool:
    """Whether a whole linear, [rows, columns], takes fewer operations so: by sizes alone, which every rank and device has."""
    return tokens > most_by_outputs(rows, columns)


def most_by_outputs(rows: int, columns: int) -> int:
    """The most tokens with which outputs of a whole linear take no more operations than squares do:

    (tokens + alphas * rows) * columns * share >= (alphas + 1) * tokens * rows, of the square the share that is made
    """
    halves = columns + min(WIDTH, columns)  # columns * share, twice
    more = 2 * (len(ALPHAS) + 1) * rows - halves  # operations of outputs beyond those of the square, for each token
    return len(ALPHAS) * rows * halves // more if more > 0 else sys.maxsize


@dataclass(frozen=True)
class Square:
    """The square of some inputs.

    norms   of the channels, float32 [in]
    blocks  of correlations, [all channels up to its last, its channels] each, float16 on CUDA and float32 on a CPU; those with
            channels before the block are twice as large
    """

    norms: Tensor
    blocks: tuple[Tensor, ...]

    @classmethod
    def of(cls, inputs: Tensor) -> Square:
        """Of bfloat16 inputs [tokens, in]."""
        norms = torch.linalg.vector_norm(inputs, dim=0, dtype=torch.float32)
        inverses = torch.where(norms == 0, 0, 1 / norms)
        starts = range(0, len(norms), WIDTH)
        return cls(norms, tuple(_block(inputs, inverses, start) for start in starts))

    @property
    def dtype(self) -> torch.dtype:
        """What products are made of."""
        return self.blocks[0].dtype

    def sum(self, changes: Tensor) -> Tensor:
        """The sum of d G d^T over the rows of D times the norms, [out, in] of `dtype`: float64 []."""
        found = torch.zeros((), dtype=torch.float64, device=changes.device)
        for start, block in zip(range(0, changes.shape[1], WIDTH), self.blocks, strict=True):
            product = awq.float32_product(changes[:, : len(block)], block.T)
            found += dot(product, changes, start)
        return found


def _block(inputs: Tensor, inverses: Tensor, start: int) -> Tensor:
    end = min(start + WIDTH, len(inverses))
    block = awq.float32_product(inputs[:, :end].T, inputs[:, start:end].T)
    block *= inverses[:end, None]
    block *= inverses[start:end]
    block[:start] *= 2
    return block.to(torch.float16) if block.is_cuda else block


def squares(
    search: Search, inputs: Tensor, weight: Tensor, factors: Tensor, inverses: Tensor, amaxes: list[Tensor | None]
) -> Tensor:
    """Squares of what each of some bfloat16 factors [alphas, in], and their inverses, change in outputs: float64 [alphas].

    inputs  bfloat16 [tokens, in], whole
    weight  bfloat16 [some rows, in]
    amaxes  of weight * factors, for each
    NaN for inputs or weights that are not finite, and where an output could overflow.
    """
    square = Square.of(inputs)
    columns = awq.largest_of_columns(weight).float()
    found = []
    scales = _scales(columns, square.norms, factors.float(), inverses.float(), search.group)
    for mine, inverse, amax, scale in zip(factors, inverses, amaxes, scales, strict=True):
        norms = square.norms * scale
        rounded = awq.rounded(search, weight, mine, amax)
        changed = changes(rounded, inverse.float() * norms, weight, norms, square.dtype)
        found.append(square.sum(changed) / scale.double().square())
    return torch.stack(found) + 0 * (columns * square.norms).sum()  # of which no output is larger


def _scales(columns: Tensor, norms: Tensor, factors: Tensor, inverses: Tensor, group: int) -> Tensor:
    """What makes D times the norms no larger than LARGEST: float32 [alphas], from the largest magnitudes of columns.

    Rounding moves no weight by more than the largest of its group, and hardly the others.
    """
    largest = (columns * factors).unflatten(1, (-1, group)).amax(dim=2).repeat_interleave(group, dim=1)
    bounds = (2 * largest * inverses * norms).amax(dim=1)
    return torch.where(bounds == 0, 1, LARGEST / bounds)


def changes(rounded: Tensor, ours: Tensor, weight: Tensor, theirs: Tensor, dtype: torch.dtype) -> Tensor:
    """rounded * ours - weight * theirs, bfloat16 [out, in] and float32 [in], in float32, then rounded; on CUDA by a kernel."""
    if weight.is_cuda and weight.is_contiguous() and cuda_kernels.works(weight.device):
        return cuda_gram.changes(rounded, ours, weight, theirs, dtype)
    made = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for rows in row_strips(weight, 1):
        made[rows] = (rounded[rows] * ours).sub_(weight[rows] * theirs)
    return made


def dot(product: Tensor, changes: Tensor, start: int) -> Tensor:
    """The sum of a float32 product [out, width], which may be overwritten, times as many columns of `changes`, from `start` on:
    float64 []. On CUDA by a kernel.
    """
    if product.is_cuda and cuda_kernels.works(product.device):
        return cuda_gram.dot(product, changes, start)
    return product.mul_(changes[:, start : start + product.shape[1]]).sum(dtype=torch.float64)
