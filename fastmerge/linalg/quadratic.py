"""Least squares over the experts' own directions: min_X sum_k w_k ||(X - Y_k) Z_k^T||_F^2.

All that it depends on is C = sum_k w_k Z_k^T Z_k and D = sum_k w_k Y_k Z_k^T Z_k: the gradient is 2 (X
C - D). An iteration over X is one product per step, and where it is linear, a function of C's
eigenvalues and no iteration.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


def adam(start: Tensor, c: Tensor, d: Tensor, *, lr: float, steps: int) -> Tensor:
    """Return X after steps of Adam (0.9, 0.999, 1e-8) from `start`, bias corrected, without weight decay."""
    x, scratch = start.clone(), start.new_empty(start.shape)
    mean, square = start.new_zeros(start.shape), start.new_zeros(start.shape)
    import torch

    for step in range(1, steps + 1):
        gradient = torch.addmm(d, x, c, beta=-2.0, alpha=2.0)
        mean.mul_(0.9).add_(gradient, alpha=0.1)
        square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        torch.sqrt(square, out=scratch)
        scratch.div_(math.sqrt(1 - 0.999**step)).add_(1e-8)
        x.addcdiv_(mean, scratch, value=-lr / (1 - 0.9**step))
    return x


def filtered(
    start: Tensor, d: Tensor, values: Tensor, vectors: Tensor, kept: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return X of a linear iteration: along an eigenvector of C with eigenvalue l, what is left of the
    start's distance from the solution is `kept(l)`.

    X = X_0 + sum_j (1 - kept(l_j)) (D v_j / l_j - X_0 v_j) v_j^T

    Args:
        values: [p] float64, positive; vectors: [n, p] float64: eigenvalues and eigenvectors of C; what is
            not given stays as it is.
    """
    moved = 1 - kept(values)
    v = vectors.to(start.dtype)
    along = (d @ v) * (moved / values).to(start.dtype) - (start @ v) * moved.to(start.dtype)
    return start + along @ v.mT


#: Degrees up to which products with C's factor are cheaper than its eigenvectors.
MOST_DEGREES = 12
#: Share of a function's largest value that a polynomial in its place may be off by.
MOST_OFF = 1e-9


def iterated(
    start: Tensor, z: Tensor, w: Tensor, largest: float, kept: Callable[[Tensor], Tensor]
) -> Tensor | None:
    """Return X as `filtered` does, of C = W^T W and D = Z W, without eigenvectors; None: it takes too much.

    f(l) = (1 - kept(l)) / l is all but constant where an iteration takes small steps, so that a polynomial of
    few degrees stands for it: X = X_0 + (D - X_0 C) f(C) = X_0 + (Z - X_0 W^T) f(W W^T) W.

    Args:
        z: [m, p]; w: [p, n]. largest: what no eigenvalue of C exceeds.
    """
    import torch

    powers = polynomial(kept, largest)
    if powers is None:
        return None
    left = torch.addmm(z, start, w.mT, alpha=-1.0)
    square = (w @ w.mT).mul_(2 / largest)
    square.diagonal().sub_(1)
    found = left * powers[-1]
    for power in reversed(powers[:-1]):
        found = torch.addmm(left, found, square, beta=power)
    return torch.addmm(start, found, w)


def polynomial(kept: Callable[[Tensor], Tensor], largest: float) -> list[float] | None:
    """Return a_i with sum_i a_i (2 l / largest - 1)^i near (1 - kept(l)) / l for 0 < l <= largest; None: of
    more than MOST_DEGREES."""
    import numpy as np
    import torch
    from numpy.polynomial import chebyshev

    def function(x: NDArray[np.float64]) -> Any:  # numpy's types want a number of an array
        values = torch.from_numpy((x + 1) * (largest / 2))
        return ((1 - kept(values)) / values).numpy()

    terms: NDArray[np.float64] = chebyshev.chebinterpolate(function, 4 * MOST_DEGREES)
    left_out = np.cumsum(np.abs(terms)[::-1])[::-1]  # from each term on
    if not np.isfinite(left_out).all() or left_out[0] == 0:
        return None
    wanted = int((left_out > MOST_OFF * left_out[0]).sum())
    if wanted > MOST_DEGREES + 1:
        return None
    return [float(a) for a in chebyshev.cheb2poly(terms[:wanted])]


def heavy_ball(lr: float, momentum: float, steps: float) -> Callable[[Tensor], Tensor]:
    """Return what stochastic gradient descent with momentum leaves after some steps, by eigenvalue of C.

    v <- momentum v + 2 l p, p <- p - lr v from p = 1, v = 0. steps: infinity leaves nothing.
    """

    def kept(values: Tensor) -> Tensor:
        import torch

        p = torch.ones_like(values)
        if math.isinf(steps):
            return p.zero_()
        v = torch.zeros_like(values)
        for _ in range(int(steps)):
            v = momentum * v + 2 * values * p
            p = p - lr * v
        return p

    return kept
