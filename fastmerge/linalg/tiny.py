"""Many small matrices at once: the principal directions of each, from Gram matrices of their shorter side."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

#: Matrices that are decomposed at a time: their float64 copies stay small beside the batch.
BATCH = 8192


class Principal(NamedTuple):
    """x_(j, t) ~ mean_j + basis_j coef_(j, t).

    mean: [n, r]; basis: [n, r, p]; coef: [n, p, T]; discarded: [n] float64, the squared error of each matrix:
    the eigenvalues that are left out.
    """

    mean: Tensor
    basis: Tensor
    coef: Tensor
    discarded: Tensor

    def product(self) -> Tensor:
        """Return the matrices that these stand for, [n, r, T]."""
        return self.mean[..., None] + self.basis @ self.coef


def principal(x: Tensor, p: int) -> Principal:
    """Return mean and p leading principal directions of the columns of each of n matrices.

    Centred first, then decomposed by the eigenvectors of the r x r or T x T Gram matrix, whichever is
    smaller, in float64. With p >= min(r, T - 1) the product is x.

    Args:
        x: [n, r, T] float32 or float64, any device: T points in r dimensions at each of n positions.
        p: directions kept, at most min(r, T).
    Returns:
        A `Principal` of x's type; basis vectors are orthonormal where their eigenvalue is not rounding noise.
    """
    import torch

    starts = range(0, max(1, len(x)), BATCH)
    found = [_principal(x[first : first + BATCH], p) for first in starts]
    mean, basis, coef, discarded = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Principal(mean.to(x.dtype), basis.to(x.dtype), coef.to(x.dtype), discarded)


def _principal(x: Tensor, p: int) -> Principal:
    import torch

    wide = x.double()
    mean = wide.mean(2)
    centred = wide - mean[..., None]
    of_rows = x.shape[1] < x.shape[2]
    g = centred @ centred.mT if of_rows else centred.mT @ centred
    values, vectors = torch.linalg.eigh(g)
    values, vectors = values.flip(1).clamp_min(0), vectors.flip(2)[..., :p]
    discarded = values[:, p:].sum(1)
    if of_rows:
        return Principal(mean, vectors, vectors.mT @ centred, discarded)
    s = values[:, None, :p].sqrt()
    basis = centred @ vectors * ((s > 0) / s.masked_fill(s == 0, 1))
    return Principal(mean, basis, s.mT * vectors.mT, discarded)
