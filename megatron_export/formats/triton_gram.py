"""The kernels of cuda_gram.py. A program has some rows of some of the columns."""

import triton
import triton.language as tl


@triton.jit
def tile(rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The rows of a program, its columns, and which of them exist."""
    across = tl.cdiv(width, COLUMNS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    return row[:, None], column[None, :], (row < rows)[:, None] & (column < width)[None, :]


@triton.jit
def changes(rounded, ours, weight, theirs, made, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Differences of two weights, each times numbers of its columns."""
    row, column, inside = tile(rows, columns, ROWS, COLUMNS)
    place = row * columns + column
    mine = tl.load(rounded + place, mask=inside, other=0.0).to(tl.float32)
    mine *= tl.load(ours + column, mask=column < columns, other=0.0)
    other = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    other *= tl.load(theirs + column, mask=column < columns, other=0.0)
    tl.store(made + place, (mine - other).to(made.dtype.element_ty), mask=inside)


@triton.jit
def dot(product, changes, sums, rows, width, columns, start, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum of a product times what stands from column `start` on."""
    row, column, inside = tile(rows, width, ROWS, COLUMNS)
    mine = tl.load(product + row * width + column, mask=inside, other=0.0)
    other = tl.load(changes + row * columns + start + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(sums + tl.program_id(0), tl.sum((mine * other).to(tl.float64)))
