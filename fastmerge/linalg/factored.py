"""Sums of products of thin factors, decomposed without the matrix that they make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from fastmerge.linalg.randomized import Truncated
from fastmerge.linalg.svd import EPS, SVD, spectrum

if TYPE_CHECKING:
    from torch import Tensor


#: ||R||_F ||R^-1||_F per column up to which Cholesky factors are as good as Householder's QR.
MOST_CONDITION = 8.0
#: Least s_k / s_1 whose directions a Gram matrix tells to 1e-10.
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

    left = torch.cat([t.b.double() * t.scale for t in terms], dim=1)
    right = torch.cat([t.a.double() for t in terms])
    basis_b, r_b = _orthonormal(left)
    basis_a, r_a = _orthonormal(right.mT)
    product = r_b @ r_a.mT
    wanted = len(product) if rank is None else min(rank, *product.shape)
    core = spectrum(product, route="gram" if wanted < len(product) else "lapack")
    if wanted < len(product) and wanted and not core.s[wanted - 1] > LEAST_RATIO * core.s[0]:
        core = spectrum(product, route="lapack")
    # Terms that cancel leave rounding of what was there before: it is measured by the factors.
    noise = (len(left) + right.shape[1]) * EPS[8] * float(r_b.norm() * r_a.norm())
    k = min(int((core.s > noise).sum()), wanted)
    u, s, vh = core.top(k)
    norm, left_out = float(core.s.norm()), float(core.s[k:].norm())
    return Truncated(
        SVD(basis_b(u), s, basis_a(vh.mT).mT), norm, left_out / norm if norm else 0.0, exact=True
    )


def _orthonormal(x: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return Q's product from the left, and R, of x = Q R.

    By a Cholesky factor of x^T x where x is well conditioned, off by eps64 cond^2: Q itself is never made,
    and LAPACK's QR of a high and narrow matrix takes several times as long.
    """
    import torch

    n = x.shape[1]
    lower, info = torch.linalg.cholesky_ex(x.mT @ x)
    if len(x) >= n and not int(info):
        eye = torch.eye(n, dtype=x.dtype, device=x.device)
        inverse = torch.linalg.solve_triangular(lower.mT, eye, upper=True)
        if float(lower.norm() * inverse.norm()) <= MOST_CONDITION * n:
            return (lambda y: x @ (inverse @ y)), lower.mT
    q, r = torch.linalg.qr(x)
    return (lambda y: q @ y), r
