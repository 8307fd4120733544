"""Products in float64 of float32 matrices, of which no float64 copy is made."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

#: Columns that are converted to float64 at a time: the copy stays small beside the matrix.
BLOCK = 1024
#: A square is computed by so many strips, none of fewer rows than are worth a product of their own.
STRIPS, STRIP = 8, 128


def gram(a: Tensor, b: Tensor | None = None) -> Tensor:
    """Return a b^T in float64 (b: default a), [rows of a, rows of b].

    Products of float32 are exact in float64; the sum's error is about eps64 times the norms.

    Args:
        a, b: [rows, n] float32 or float64. Pass `a.mT` for the Gram matrix of columns.
    """
    import torch

    rows, n = a.shape
    out = a.new_empty((rows, rows if b is None else len(b)), dtype=torch.float64)
    for first in range(0, max(n, 1), BLOCK):
        x = a[:, first : first + BLOCK].to(torch.float64)
        if b is None:
            add_square(out, x, first > 0)
        else:
            y = b[:, first : first + BLOCK].to(torch.float64)
            torch.addmm(out, x, y.mT, beta=int(first > 0), out=out)
    return out if b is not None else mirrored(out)


def add_square(out: Tensor, x: Tensor, more: bool) -> None:
    """Set the lower triangle of out to that of x x^T, or add it (more): about half of the product.

    What lies above the triangle is undefined; eigh and Cholesky do not look there.
    """
    import torch

    step = max(STRIP, -(-len(x) // STRIPS))
    for first in range(0, len(x), step):
        below, strip = slice(first, None), slice(first, first + step)
        block = out[below, strip]
        torch.addmm(block, x[below], x[strip].mT, beta=int(more), out=block)


def mirrored(square: Tensor) -> Tensor:
    """Copy the lower triangle over the upper one."""
    step = max(STRIP, -(-len(square) // STRIPS))
    for first in range(0, len(square), step):
        after, strip = slice(first + step, None), slice(first, first + step)
        block = square[strip, strip]
        block.copy_(block.tril() + block.tril(-1).mT)
        square[strip, after] = square[after, strip].mT
    return square


def cholesky(square: Tensor) -> Tensor | None:
    """Return the lower L of square = L L^T, of which the lower triangle is read; None: it is not positive
    definite."""
    import torch

    lower, info = torch.linalg.cholesky_ex(square)
    # cuSOLVER reports success of a matrix that is not, and leaves NaN from there on.
    return None if int(info) or not bool(lower.diagonal().isfinite().all()) else lower


def inner(a: Tensor, b: Tensor) -> float:
    """Return <a, b> = sum_ij a_ij b_ij in float64; both [m, n]."""
    import torch

    rows = max(1, BLOCK * BLOCK // max(1, a.shape[1]))  # about a square block's elements
    parts = [slice(first, first + rows) for first in range(0, len(a), rows)]
    return math.fsum(
        float(torch.sum(a[part].to(torch.float64) * b[part].to(torch.float64))) for part in parts
    )


def times(function: Callable[[Tensor], Tensor], a: Tensor, rows: int | None = None) -> Tensor:
    """Return function(a) in the type of `a`, for a linear function of columns in float64: a product from the
    left, a triangular solve. It is given some columns of [m, n] at a time.

    Args:
        rows: of the result; default m.
    """
    import torch

    found = torch.empty_like(a) if rows is None else a.new_empty((rows, a.shape[1]))
    for first in range(0, a.shape[1], BLOCK):
        columns = slice(first, first + BLOCK)
        found[:, columns] = function(a[:, columns].to(torch.float64)).to(a.dtype)
    return found
