"""Truncated decompositions from a few products with the matrix, with a residual that is measured.

Halko, Martinsson, Tropp, "Finding structure with randomness", arXiv:0909.4061, algorithm 4.4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastmerge.linalg.svd import EPS, SVD, spectrum, svd

if TYPE_CHECKING:
    from torch import Tensor

#: Steps of subspace iteration; the second where singular values decay slower than i^-FLAT near the cut.
STEPS = 2
STEPS_IF_FLAT = 4
FLAT = 1.25

#: Columns of the first sketch where a target decides the rank.
FIRST_WIDTH = 32

#: Below this squared share of the norm, a difference of norms is their rounding; by bytes of an element.
_LEAST_DIFFERENCE = {4: 1e-4, 8: 1e-10}

#: Singular values below this many eps of the largest are rounding of the matrix itself.
_NOISE = 4

_BLOCK_ROWS = 1024


@dataclass(frozen=True)
class Truncated:
    """The leading triples of a matrix, and what they leave of it.

    norm: ||a||_F. residual: ||a - u diag(s) vh||_F / ||a||_F, 0 for a zero matrix. exact: decomposed in full.
    """

    svd: SVD
    norm: float
    residual: float
    exact: bool


def truncated_svd(
    a: Tensor,
    rank: int | None = None,
    *,
    error: float | None = None,
    energy: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    exact: bool = False,
) -> Truncated:
    """Return the leading singular triples: `rank` of them, or as few as leave no more than a target, and
    none that is rounding of the matrix.

    Where singular values decay like i^-0.5 or faster, the residual is at most 1.01 of the least that a
    matrix of that rank can leave. ||a - Q Q^T a||_F^2 = ||a||_F^2 - ||Q^T a||_F^2 in float64 says what it
    is, so that a target is met whatever the spectrum: the sketch grows until it is, and where it comes to
    half of the short side, or the target is below 1 % in float32, the decomposition is exact.

    Args:
        a: [m, n] float32 or float64, finite.
        rank: triples, at most min(m, n); with a target: the most.
        error: target: ||a - u diag(s) vh||_F <= error ||a||_F, 0 <= error < 1.
        energy: the same as a share of ||a||_F^2 to keep: error = sqrt(1 - energy).
        steps: of subspace iteration, with a QR between all products; default 2, 4 for flat spectra.
        seed: of the Gaussian start. Results are the same for the same seed, matrix and machine.
        exact: decompose in full.
    """
    target = error if energy is None else math.sqrt(max(1 - energy, 0.0))
    least = min(a.shape)
    limit = least if rank is None else min(rank, least)
    total = squared_norm(a)
    if total == 0 or limit == 0:
        return Truncated(_nothing(a), math.sqrt(total), float(total > 0), True)
    too_fine = target is not None and target < 1e-2 and a.element_size() == 4
    most = limit + oversampling(limit)
    width = most if target is None else min(most, FIRST_WIDTH)
    start = _gaussian(a, width, seed)
    while True:
        if exact or too_fine or 2 * width >= least:
            return _exact(a, limit, target, total)
        found = _sketched(a, start, steps)
        k = _cut(a, found.s, limit, target, total)
        if width >= most or k + oversampling(k) <= width:
            break
        # What is known already converges at once; the new columns need the steps.
        wider = min(2 * width, most)
        start = _joined(found.vh.mT, _gaussian(a, wider - width, seed + wider))
        width = wider
    kept = SVD(found.u[:, :k], found.s[:k], found.vh[:k])
    return Truncated(kept, math.sqrt(total), _residual(a, kept, total), False)


def oversampling(rank: int) -> int:
    """Return how many more columns than the rank a sketch has."""
    return max(10, rank // 8)


def squared_norm(a: Tensor) -> float:
    """Return ||a||_F^2, summed in float64."""
    starts = range(0, len(a), _BLOCK_ROWS)
    return math.fsum(float(a[i : i + _BLOCK_ROWS].double().square().sum()) for i in starts)


def squared_distance(a: Tensor, left: Tensor, right: Tensor) -> float:
    """Return ||a - left right||_F^2, some rows at a time, summed in float64."""
    parts = []
    for first in range(0, len(a), _BLOCK_ROWS):
        rows = slice(first, first + _BLOCK_ROWS)
        parts.append(float((a[rows] - left[rows] @ right).double().square().sum()))
    return math.fsum(parts)


def _nothing(a: Tensor) -> SVD:
    return SVD(a.new_zeros(len(a), 0), a.new_zeros(0), a.new_zeros(0, a.shape[1]))


def _gaussian(a: Tensor, width: int, seed: int) -> Tensor:
    """Return [n, width] normal numbers, drawn on the host: the same for every device."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    shape = (a.shape[1], width)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(a.device, a.dtype)


def _joined(known: Tensor, new: Tensor) -> Tensor:
    import torch

    return torch.cat([known, new], dim=1)


def _orthonormal(x: Tensor) -> Tensor:
    import torch

    q: Tensor = torch.linalg.qr(x).Q
    return q


def _sketched(a: Tensor, start: Tensor, steps: int | None) -> SVD:
    """Return triples of the matrix within the range that products with `start` span."""
    q = _iterated(a, _orthonormal(a @ start), STEPS if steps is None else steps)
    inner = _wide_svd(q.mT @ a)
    if steps is None and _is_flat(inner.s):
        q = _iterated(a, q, STEPS_IF_FLAT - STEPS)
        inner = _wide_svd(q.mT @ a)
    return SVD(q @ inner.u, inner.s, inner.vh)


def _wide_svd(b: Tensor) -> SVD:
    """Return all triples of a matrix [l, n], l <= n, decomposed in float64 by way of its triangular factor.

    In float32, or by way of a Gram matrix, directions far below the largest would not be orthogonal.
    """
    import torch

    q, r = torch.linalg.qr(b.double().mT)
    u, s, vh = svd(r.mT, route="lapack")
    return SVD(*(x.to(b.dtype) for x in (u, s, vh @ q.mT)))


def _iterated(a: Tensor, q: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        # Without a QR after each product, float32 loses all that is below s_1 eps^(1 / (2 steps + 1)).
        q = _orthonormal(a @ _orthonormal((q.mT @ a).mT))
    return q


def _is_flat(s: Tensor) -> bool:
    """Return whether the last half of the singular values, but those of the oversampling, decays slowly."""
    k = max(len(s) * 8 // 9, 1)
    return float(s[k // 2]) < 2**FLAT * float(s[k - 1])


def _cut(a: Tensor, s: Tensor, limit: int, target: float | None, total: float) -> int:
    """Return the least rank whose residual is within the target; the limit where none is, or without one."""
    known = int((s > _NOISE * EPS[a.element_size()] * s[0]).sum())
    limit = min(limit, max(known, 1))
    if target is None:
        return limit
    left = total - s.double().square().cumsum(0)
    return min(int((left > target**2 * total).sum()) + 1, limit)


def _exact(a: Tensor, limit: int, target: float | None, total: float) -> Truncated:
    known = spectrum(a)
    k = _cut(a, known.s, limit, target, total)
    left = math.sqrt(float(known.s[k:].square().sum()))
    return Truncated(known.top(k), math.sqrt(total), left / math.sqrt(total), True)


def _residual(a: Tensor, kept: SVD, total: float) -> float:
    share = max(1 - float(kept.s.double().square().sum()) / total, 0.0)
    if share < _LEAST_DIFFERENCE[a.element_size()]:
        share = squared_distance(a, kept.u * kept.s, kept.vh) / total
    return math.sqrt(share)
