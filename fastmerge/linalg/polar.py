"""Polar factors: the nearest matrix with orthonormal rows or columns, without a singular value decomposition.

Of A = U S V^T, Q = U V^T over the directions that A has. Flattening and whitening weight the smallest of them
as much as the largest, so every route ends by measuring what it claims: ||Q Q^T - I||_F / sqrt(rank).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

from fastmerge.linalg.gram import add_square, cholesky, gram, mirrored, times
from fastmerge.linalg.svd import EPS

if TYPE_CHECKING:
    from torch import Tensor

Route = Literal["auto", "newton", "express", "gram", "svd"]

#: Polar Express: a step's (a, b, c), for singular values from 1e-3 up; then the last one for ever.
EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115952949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
LAST_EXPRESS = (1.875, -1.25, 0.375)
SAFETY = 1.01
MOST_STEPS = 16


class Polar(NamedTuple):
    """q: [m, n]. rank: its directions. error: ||q q^T - projector||_F / sqrt(rank), measured on the
    short side.
    route: how it was found, with a fallback's name if there was one. steps: of an iteration."""

    q: Tensor
    rank: int
    error: float
    route: str
    steps: int = 0


def polar(
    a: Tensor, *, floor: float | None = None, tolerance: float = 1e-5, route: Route = "auto"
) -> Polar:
    """Return the polar factor of a matrix.

    Args:
        a: [m, n] float32 or float64.
        floor: directions whose singular value is at most this share of the largest one are left out: they are
            noise, and the factor of noise is noise. Default: max(m, n) eps of the type.
        tolerance: what `Polar.error` may be; an iteration that does not get there falls back to gram.
        route: newton: X <- (g X + X^-T / g) / 2, scaled by norms (Higham), a Cholesky factor of the
            Gram matrix in its place where a is not square. express: Polar Express, products alone. gram:
            A (A^T A)^-1/2 with float64 eigenvectors. svd: U V^T. auto: newton on a CPU, express
            elsewhere, gram where they find a short of full rank; svd for float64.
    """
    m, n = a.shape
    if floor is None:
        floor = max(m, n) * EPS[a.element_size()]
    if m == 0 or n == 0 or not bool(a.any()):
        return Polar(a.new_zeros((m, n)), 0, 0.0, route)
    if m > n:
        found = polar(a.mT, floor=floor, tolerance=tolerance, route=route)
        return found._replace(q=found.q.mT)
    if route == "auto" and a.element_size() == 8:
        route = "svd"
    if route == "auto":
        route = "newton" if a.device.type == "cpu" else "express"
    if route == "svd":
        return _by_svd(a, floor)
    if route == "gram":
        return _by_gram(a, floor)
    square = gram(a)
    iteration = _newton if route == "newton" else _express
    iterated = iteration(a, square, floor, tolerance)
    return iterated or _by_gram(a, floor, square)._replace(route=f"{route}, then gram")


def _by_svd(a: Tensor, floor: float) -> Polar:
    import torch

    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    rank = int((s > floor * s[0]).sum())
    q = u[:, :rank] @ vh[:rank]
    return Polar(q, rank, _error(q, u[:, :rank], u[:, rank:]), "svd")


def _by_gram(a: Tensor, floor: float, square: Tensor | None = None) -> Polar:
    import torch

    values, vectors = torch.linalg.eigh(gram(a) if square is None else square)
    s = values.clamp_min(0).sqrt()
    first = int((s <= floor * s[-1]).sum())
    noise, v = vectors[:, :first], vectors[:, first:]
    root = torch.empty_like(vectors)
    add_square(root, v / s[first:].sqrt(), more=False)
    root = mirrored(root)
    q = times(lambda columns: root @ columns, a)
    return Polar(q, len(s) - first, _error(q, v, noise), "gram")


def _has_full_rank(square: Tensor, least: float) -> bool:
    """Return whether all singular values of what has that Gram matrix are above a number."""
    shifted = square.clone()
    shifted.diagonal().sub_(least**2)
    return cholesky(shifted) is not None


def _error(q: Tensor, basis: Tensor, rest: Tensor) -> float:
    """Measure how far q q^T is from the projector onto `basis`, whose complement `rest` is, by columns."""
    import torch

    g, rank = q @ q.mT, basis.shape[1]
    few, sign = (basis, -1.0) if rank < rest.shape[1] else (rest, 1.0)
    few = few.to(q.dtype)
    g = torch.addmm(g, few, few.mT, alpha=sign)
    if sign > 0:
        g.diagonal().sub_(1)
    return float(g.norm()) / math.sqrt(max(1, rank))


def _square(x: Tensor) -> Tensor:
    """Return x x^T in the type of x, for about half of the product."""
    square = x.new_empty((len(x), len(x)))
    add_square(square, x, more=False)
    return mirrored(square)


def _from_one(g: Tensor) -> float:
    g = g.clone()
    g.diagonal().sub_(1)
    return float(g.norm()) / math.sqrt(len(g))


def _newton(a: Tensor, square: Tensor, floor: float, tolerance: float) -> Polar | None:
    import torch

    if len(a) == a.shape[1]:
        if not _has_full_rank(square, floor * 1.05 * largest_singular_value(a)):
            return None  # found out for less than an inverse takes
        inverse, info = torch.linalg.inv_ex(a)
        return None if int(info) else _iterated(a, inverse, floor, tolerance)
    # A = L Q0 with orthonormal rows of Q0, so Q(A) = Q(L) L^-1 A.
    lower = cholesky(square)
    if lower is None:
        return None
    x = lower.to(a.dtype)
    one = torch.eye(len(x), dtype=x.dtype, device=x.device)
    inverse = torch.linalg.solve_triangular(x, one, upper=False)
    found = _iterated(x, inverse, floor, tolerance)
    if found is None:
        return None
    q = found.q @ times(lambda c: torch.linalg.solve_triangular(lower, c, upper=False), a)
    q, error, more = _schulz(q, tolerance)
    if error > tolerance:
        return None
    return found._replace(q=q, error=error, steps=found.steps + more)


def _iterated(x: Tensor, inverse: Tensor, floor: float, tolerance: float) -> Polar | None:
    """Return the polar factor of a square matrix by Newton's iteration; its inverse is overwritten."""
    import torch

    # The power method tells a little too little.
    largest = 1.05 * largest_singular_value(x)
    smallest = 1 / (1.05 * largest_singular_value(inverse))
    if not smallest > floor * largest:
        return None
    # Singular values lie in [1 / t, t] once they are scaled, and in [1, (t + 1 / t) / 2] after a step.
    scale, t = 1 / math.sqrt(largest * smallest), math.sqrt(largest / smallest)
    steps = 0
    while True:
        x = inverse.mT.mul_(0.5 / scale).add_(x, alpha=0.5 * scale)
        t = (t + 1 / t) / 2
        steps += 1
        if t < 1 + 1e-3:
            break
        scale, t = 1 / math.sqrt(t), math.sqrt(t)
        inverse = torch.linalg.inv(x)
    q, error, more = _schulz(x, tolerance)
    return Polar(q, len(q), error, "newton", steps + more) if error <= tolerance else None


def _schulz(q: Tensor, tolerance: float) -> tuple[Tensor, float, int]:
    """Return (q, its error, steps) after Newton and Schulz's steps, products alone, while they gain."""
    import torch

    g = _square(q)
    error, steps = _from_one(g), 0
    while error > tolerance / 10 and steps < MOST_STEPS:
        q = torch.addmm(q, g, q, beta=1.5, alpha=-0.5)
        steps += 1
        g = _square(q)
        before, error = error, _from_one(g)
        if error > before / 2:
            break
    return q, error, steps


def _bound(x: Tensor) -> float:
    """Return sqrt(||x||_1 ||x||_inf), which the largest singular value is at most."""
    import torch

    norms = [float(torch.linalg.matrix_norm(x, order)) for order in (1, math.inf)]
    return math.sqrt(norms[0] * norms[1])


def largest_singular_value(x: Tensor, steps: int = 12) -> float:
    """Estimate it from below by the power method: within a few per cent, from a start that is always
    the same."""
    import torch

    # The row of most weight has a share in the leading direction, whatever the matrix.
    v = x[int(torch.linalg.vector_norm(x, dim=1).argmax())]
    length = 0.0
    for _ in range(steps):
        w = x @ (v / v.norm())
        length = float(w.norm())
        v = w @ x
    return length


def _express(a: Tensor, square: Tensor, floor: float, tolerance: float) -> Polar | None:
    import torch

    largest = 1.05 * largest_singular_value(a)
    if not _has_full_rank(square, floor * largest):
        return None
    x = a / min(float(a.norm()), _bound(a), largest)
    for step in range(MOST_STEPS + 1):
        g = _square(x)
        error = _from_one(g)
        if error <= tolerance:
            return Polar(x, len(a), error, "express", step)
        if step < MOST_STEPS:
            p, q, r = EXPRESS[step] if step < len(EXPRESS) else LAST_EXPRESS
            if step < len(EXPRESS) - 1:
                p, q, r = p / SAFETY, q / SAFETY**3, r / SAFETY**5
            x = x.mul(p).add_(torch.addmm(g.mul(q), g, g, alpha=r) @ x)
    return None
