"""Products in float64 of float32 matrices, of which no float64 copy is made."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

#: Columns that are converted to float64 at a time: the copy stays small beside the matrix.
BLOCK = 1024


def gram(a: Tensor, b: Tensor | None = None) -> Tensor:
    """Return a b^T in float64 (b: default a), [rows of a, rows of b].

    Products of float32 are exact in float64; the sum's error is about eps64 times the norms.

    Args:
        a, b: [rows, n] float32 or float64. Pass `a.mT` for the Gram matrix of columns.
    """
    import torch

    double = torch.float64
    if a.dtype is double or a.shape[1] <= BLOCK:
        x = a.to(double)
        return x @ (x if b is None else b.to(double)).mT
    out = a.new_zeros((len(a), len(a if b is None else b)), dtype=double)
    for first in range(0, a.shape[1], BLOCK):
        x = a[:, first : first + BLOCK].to(double)
        out.addmm_(x, (x if b is None else b[:, first : first + BLOCK].to(double)).mT)
    return out


def inner(a: Tensor, b: Tensor) -> float:
    """Return <a, b> = sum_ij a_ij b_ij in float64; both [m, n]."""
    import torch

    rows = max(1, BLOCK * BLOCK // max(1, a.shape[1]))  # about a square block's elements
    parts = [slice(first, first + rows) for first in range(0, len(a), rows)]
    return math.fsum(
        float(torch.sum(a[part].to(torch.float64) * b[part].to(torch.float64))) for part in parts
    )


def times(function: Callable[[Tensor], Tensor], a: Tensor) -> Tensor:
    """Return function(a) in the type of `a`, for a linear function of columns in float64: a product from the
    left, a triangular solve. It is given some columns of [m, n] at a time."""
    import torch

    found = torch.empty_like(a)
    for first in range(0, a.shape[1], BLOCK):
        columns = slice(first, first + BLOCK)
        found[:, columns] = function(a[:, columns].to(torch.float64)).to(a.dtype)
    return found
