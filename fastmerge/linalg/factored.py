"""Sums of products of thin factors, decomposed without the matrix that they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from fastmerge.linalg.gram import cholesky
from fastmerge.linalg.randomized import Truncated
from fastmerge.linalg.svd import EPS, SVD, spectrum

if TYPE_CHECKING:
    from torch import Tensor


#: ||R||_F ||R^-1||_F per column up to which Cholesky factors are as good as Householder's QR.
MOST_CONDITION = 8.0
#: Least s_k / (||b|| ||a||) whose triples Gram matrices of the factors tell to 1e-10.
LEAST_RATIO = 1e-3


class Term(NamedTuple):
    """scale * b a. b: [m, r]; a: [r, n]."""

    scale: float
    b: Tensor
    a: Tensor


def factored_svd(terms: Sequence[Term], rank: int | None = None) -> Truncated:
    """Return the leading triples of sum_t scale_t b_t a_t, none of them rounding noise.

    With Q_b R_b = [scale_t b_t ...] and Q_a R_a = [a_t; ...]^T the sum is Q_b (R_b R_a^T) Q_a^T: the
    core is [R, R], R = sum_t r_t, so that the cost is O((m + n) R^2 + R^3) and nothing is [m, n].

    Args:
        terms: at least one; b [m, r_t], a [r_t, n] of any floating type.
        rank: the most triples; default: all of the numerical rank, s_i > (m + n) eps64 ||R_b|| ||R_a||.
    Returns:
        u [m, k], s [k], vh [k, n] in float64, with norm and residual of the sum; k = 0 where it is zero.
    """
    import torch

    left = torch.cat([t.b for t in terms], dim=1).double()
    right = torch.cat([t.a for t in terms]).double()
    left *= left.new_tensor([t.scale for t in terms for _ in range(t.b.shape[1])])
    if rank is not None and 0 < rank < min(*left.shape, right.shape[1]):
        found = _leading(left, right, rank)
        if found is not None:
            return found
    basis_b, r_b = _orthonormal(left)
    basis_a, r_a = _orthonormal(right.mT)
    core = spectrum(r_b @ r_a.mT, route="lapack")
    # Terms that cancel leave rounding of what was there before: it is measured by the factors.
    noise = (len(left) + right.shape[1]) * EPS[8] * float(r_b.norm() * r_a.norm())
    known = int((core.s > noise).sum())
    u, s, vh = core.top(known if rank is None else min(known, rank))
    norm, left_out = float(core.s.norm()), float(core.s[len(s) :].norm())
    return _truncated(SVD(basis_b(u), s, basis_a(vh.mT).mT), norm, left_out)


def _leading(b: Tensor, a: Tensor, k: int) -> Truncated | None:
    """Return the k leading triples of b a, 0 < k < R. None: one is too small to be told from squares.

    With b^T b = L L^T, the eigenvalues of L^T (a a^T) L are the s_i^2; of eigenvectors Y, u = b L^-T Y and
    v^T = S^-1 Y^T L^T a. All errors are about eps64 (||b|| ||a|| / s_k)^2, however b and a are conditioned.
    """
    import torch

    of_b, of_a = b.mT @ b, a @ a.mT
    lower = cholesky(of_b)
    if lower is None:
        return None
    values, vectors = torch.linalg.eigh(lower.mT @ of_a @ lower)
    if not float(values[-k]) > LEAST_RATIO**2 * float(of_b.trace() * of_a.trace()):
        return None
    y, s = vectors[:, -k:].flip(1), values[-k:].flip(0).sqrt()
    u = b @ torch.linalg.solve_triangular(lower.mT, y, upper=True)
    vh = ((lower @ y) / s).mT @ a
    norm, left_out = (math.sqrt(float(x.clamp_min(0).sum())) for x in (values, values[:-k]))
    return _truncated(SVD(u, s, vh), norm, left_out)


def _truncated(found: SVD, norm: float, left_out: float) -> Truncated:
    return Truncated(found, norm, left_out / norm if norm else 0.0, exact=True)


def _orthonormal(x: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return Q's product from the left, and R, of x = Q R.

    By a Cholesky factor of x^T x where x is well conditioned, off by eps64 cond^2: Q itself is never made,
    and LAPACK's QR of a high and narrow matrix takes several times as long.
    """
    import torch

    n = x.shape[1]
    lower = cholesky(x.mT @ x) if len(x) >= n else None
    if lower is not None:
        eye = torch.eye(n, dtype=x.dtype, device=x.device)
        inverse = torch.linalg.solve_triangular(lower.mT, eye, upper=True)
        if float(lower.norm() * inverse.norm()) <= MOST_CONDITION * n:
            return (lambda y: x @ (inverse @ y)), lower.mT
    q, r = torch.linalg.qr(x)
    return (lambda y: q @ y), r
