"""Gram matrices in float64, and their eigenvectors."""

from __future__ import annotations

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
