"""Sums of products of thin factors, decomposed without the matrix that they make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from fastmerge.linalg.randomized import Truncated
from fastmerge.linalg.svd import EPS, SVD, spectrum

if TYPE_CHECKING:
    from torch import Tensor


class Term(NamedTuple):
    """scale * b a. b: [m, r]; a: [r, n]."""

    scale: float
    b: Tensor
    a: Tensor


def factored_svd(terms: Sequence[Term], rank: int | None = None) -> Truncated:
    """Return the leading triples of sum_t scale_t b_t a_t, none of them rounding noise.

    With Q_b R_b = qr([scale_t b_t ...]) and Q_a R_a = qr([a_t; ...]^T) the sum is Q_b (R_b R_a^T) Q_a^T: the
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
    q_b, r_b = torch.linalg.qr(left)
    q_a, r_a = torch.linalg.qr(right.mT)
    core = spectrum(r_b @ r_a.mT, route="lapack")
    # Terms that cancel leave rounding of what was there before: it is measured by the factors.
    noise = (len(left) + right.shape[1]) * EPS[8] * float(r_b.norm() * r_a.norm())
    k = min(int((core.s > noise).sum()), len(core.s) if rank is None else rank)
    u, s, vh = core.top(k)
    norm, left_out = float(core.s.norm()), float(core.s[k:].norm())
    return Truncated(
        SVD(q_b @ u, s, vh @ q_a.mT), norm, left_out / norm if norm else 0.0, exact=True
    )
