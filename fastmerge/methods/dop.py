"""DOP: experts merged one after the other, each step between what is merged so far and the next one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastmerge.linalg import gram, spectrum
from fastmerge.methods.deltas import per_expert
from fastmerge.methods.matrices import LAMBDA, WEIGHT, Plain, matrix_method
from fastmerge.registry import Param, Params
from fastmerge.stages import Add, Combine, Deltas, Walk

if TYPE_CHECKING:
    from torch import Tensor


def _flops(params: Params, shape: tuple[int, int]) -> float:
    m, n = shape
    products = 2.0 * m * n * (min(m, 2 * n) + min(n, 2 * m))
    return 2.0 * float(params.steps) * (len(params.weight) - 1) * products


def _running_mean(params: Params) -> Walk:
    """Return the walk of X_k = (X_(k-1) + D_k) / 2."""
    last = len(params.weight) - 1
    factors = [w * 0.5 ** (last - max(k, 1) + 1) for k, w in enumerate(params.weight)]
    return Walk(per_expert(factors), combine=Combine(lambda_=params.lambda_))


def _running_mean_oracle(deltas: Sequence[Tensor], params: Params) -> Tensor:
    scaled = [float(w) * d for w, d in zip(params.weight, deltas, strict=True)]
    merged = scaled[0]
    for delta in scaled[1:]:
        merged = (merged + delta) / 2
    return merged * float(params.lambda_)


@matrix_method(
    "dop",
    title="DOP",
    summary="merges one expert after the other, balancing what each step disturbs of either side",
    paper="NeurIPS 2025 (Continual Model Merging without Data: Dual Projections)",
    params=(
        WEIGHT,
        LAMBDA,
        Param("steps", 200, "of Adam for each expert after the first", kind=int, low=0),
        Param("lr", 1e-4, "Adam's learning rate", low=0.0),
        Param(
            "epsilon",
            0.99999,
            "share of the singular values' sum that projections keep less than; 1: all, and no decomposition",
            low=0.0,
            high=1.0,
        ),
        Param(
            "space",
            "uv",
            "disturbances that count: along left (u) or right (v) singular vectors, or both",
            kind=str,
            choices=("uv", "u", "v"),
        ),
        Param("alpha", 0.8, "share of what is merged so far, where it starts", low=0.0, high=1.0),
        Param("mgda", True, "shares follow the gradients; false: they stay at alpha", kind=bool),
        Param(
            "ema_beta",
            0.999,
            "share of its last value that a share keeps in each step; 0: it follows at once",
            low=0.0,
            high=1.0,
        ),
    ),
    blocks=21.0,  # both sides' targets, gradients and metrics, Adam's two means, what they are made of
    flops=_flops,
    plain=Plain(_running_mean, _running_mean_oracle),
)
def dop(params: Params, deltas: Deltas) -> Add:
    """out = base + lambda * X_K; X_1 = D_1, X_k near the minimum of a_1 L(X; X_(k-1)) + a_2 L(X; D_k).

    D_k = weight_k * delta_k, L(X; D) = ||S U^T (X - D)||^2 + ||(X - D) V S||^2 with U S V^T = D's leading
    part, so that its gradient is 2 (D D^T E + E D^T D): products alone. X_k is what Adam makes of the
    average of X_(k-1) and D_k. Tensors that are no matrices are averaged with what is merged so far, one by
    one.
    """
    merged = deltas[0] * params.weight[0]
    for k in range(1, len(deltas)):
        merged = _joined(merged, deltas[k] * params.weight[k], params)
    return Add(merged, params.lambda_)


@dataclass(frozen=True)
class Disturbance:
    """L(X; D), by the products of its gradient. target: D. left, right: E -> D D^T E, E -> E D^T D of D's
    leading part; None: does not count."""

    target: Tensor
    left: Callable[[Tensor], Tensor] | None
    right: Callable[[Tensor], Tensor] | None

    def gradient(self, x: Tensor) -> tuple[float, Tensor]:
        """Return the loss at x, which is <E, gradient> / 2, and the gradient."""
        import torch

        e = x - self.target
        found = torch.zeros_like(e)
        for apply in (self.left, self.right):
            if apply is not None:
                found += apply(e)
        return float(torch.sum(e * found, dtype=torch.float64)), found.mul_(2)


def disturbance(target: Tensor, epsilon: float, space: str) -> Disturbance:
    """Return L(.; target); epsilon, space: as the method's parameters."""
    d = target if epsilon == 1 else leading_part(target, epsilon)
    left = _metric(d) if "u" in space else None
    right = None
    if "v" in space:
        along = _metric(d.mT)

        def right(e: Tensor) -> Tensor:
            return along(e.mT).mT

    return Disturbance(target, left, right)


def leading_part(d: Tensor, epsilon: float) -> Tensor:
    """Return d's singular triples before the one where their running sum reaches epsilon of the total."""
    found = spectrum(d)
    return found.top(split_rank(found.s, epsilon)).product()


def split_rank(s: Tensor, epsilon: float) -> int:
    """Return how many singular values have a running sum below epsilon of the total."""
    total = float(s.sum())
    return int((s.cumsum(0) < epsilon * total).sum()) if total else 0


def _metric(d: Tensor) -> Callable[[Tensor], Tensor]:
    """Return E -> d d^T E: one product by [m, m] where that is no more than two by d."""
    if len(d) <= 2 * d.shape[1]:
        whole = gram(d).to(d.dtype)
        return lambda e: whole @ e
    return lambda e: d @ (d.mT @ e)


def _joined(merged: Tensor, delta: Tensor, params: Params) -> Tensor:
    """Return Adam's X from the average of two deltas (0.9, 0.999, 1e-8, bias corrected)."""
    import torch

    x = (merged + delta) / 2
    sides = [disturbance(d, params.epsilon, params.space) for d in (merged, delta)]
    share = float(params.alpha)
    mean, square = torch.zeros_like(x), torch.zeros_like(x)
    for step in range(1, params.steps + 1):
        (loss_a, a), (loss_b, b) = (side.gradient(x) for side in sides)
        if params.mgda:
            found = _least_norm(a, loss_a, b, loss_b)
            share = params.ema_beta * share + (1 - params.ema_beta) * found
        gradient = a.mul_(share).add_(b, alpha=1 - share)
        mean.mul_(0.9).add_(gradient, alpha=0.1)
        square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        scale = square.sqrt().div_(math.sqrt(1 - 0.999**step)).add_(1e-8)
        x.addcdiv_(mean, scale, value=-params.lr / (1 - 0.9**step))
    return x


def _least_norm(a: Tensor, loss_a: float, b: Tensor, loss_b: float) -> float:
    """Return the share of a where a / loss_a and b / loss_b combine to the least norm.

    A loss of 0 has no direction: its gradient is 0.
    """
    import torch

    one, two = 1 / loss_a if loss_a else 0.0, 1 / loss_b if loss_b else 0.0
    aa, ab, bb = (float(torch.sum(p * q, dtype=torch.float64)) for p, q in ((a, a), (a, b), (b, b)))
    return _share_of_first(aa * one * one, ab * one * two, bb * two * two)


def _share_of_first(aa: float, ab: float, bb: float) -> float:
    """Return g in [0.001, 0.999] with the least ||g a + (1 - g) b||^2, as MGDA's solver has it."""
    if ab >= aa:
        return 0.999
    if ab >= bb:
        return 0.001
    return (bb - ab) / (aa + bb - 2 * ab)


@dop.oracle
def dop_oracle(deltas: Sequence[Tensor], params: Params) -> Tensor:
    """The published loop in float64: full decompositions, losses, automatic differentiation."""
    import torch

    deltas = [w * d for w, d in zip(params.weight, deltas, strict=True)]
    merged = deltas[0]
    for delta in deltas[1:]:
        pair = [merged, delta]
        parts = []
        for d in pair:
            u, s, vh = torch.linalg.svd(d, full_matrices=False)
            k = len(s)
            if params.epsilon < 1 and k:
                k = int(torch.searchsorted(s.cumsum(0) / s.sum().clamp_min(1e-300), params.epsilon))
            parts.append((torch.diag(s[:k]) @ u[:, :k].mT, vh[:k].mT @ torch.diag(s[:k])))
        x = torch.nn.Parameter((pair[0] + pair[1]) / 2)
        optimizer = torch.optim.Adam([x], lr=params.lr)
        shares = [params.alpha, 1 - params.alpha]

        def losses(
            x: Tensor, pair: list[Tensor] = pair, parts: list[tuple[Tensor, Tensor]] = parts
        ) -> list[Tensor]:
            found = []
            for d, (left, right) in zip(pair, parts, strict=True):
                loss = (x * 0).sum()
                if "u" in params.space:
                    loss = loss + ((left @ (x - d)) ** 2).sum()
                if "v" in params.space:
                    loss = loss + (((x - d) @ right) ** 2).sum()
                found.append(loss)
            return found

        for _ in range(params.steps):
            if params.mgda:
                values = losses(x)
                scaled = [
                    torch.autograd.grad(v, x)[0] / (v.detach() if v > 0 else 1) for v in values
                ]
                g = min_norm_oracle(scaled[0], scaled[1])
                shares = [
                    params.ema_beta * old + (1 - params.ema_beta) * new
                    for old, new in zip(shares, (g, 1 - g), strict=True)
                ]
            optimizer.zero_grad()
            total = sum(share * loss for share, loss in zip(shares, losses(x), strict=True))
            torch.autograd.backward(total)
            optimizer.step()
        merged = x.detach()
    return merged * float(params.lambda_)


def min_norm_oracle(a: Tensor, b: Tensor) -> float:
    """The point of least norm on the segment of two gradients, held off its ends by 0.001."""
    if float((a * b).sum()) >= float((a * a).sum()):
        return 0.999
    if float((a * b).sum()) >= float((b * b).sum()):
        return 0.001
    return float((b * (b - a)).sum() / ((a - b) ** 2).sum())
