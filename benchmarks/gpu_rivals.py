"""The same methods in plain torch operations, as merge tools write them: what fused kernels compete with.

Formulas are written from the papers. Operands are stored types, arithmetic is float32, one rounding at the
end, so that rivals and fastmerge compute the same thing. Masks can be handed in to compare results of
methods that draw at random.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Masks = Sequence[Tensor] | None


def deltas(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """Return [K, ...] float32 task vectors."""
    return torch.stack([e.float() - base.float() for e in experts])


def added(base: Tensor, merged: Tensor) -> Tensor:
    return (base.float() + merged).to(base.dtype)


def largest(x: Tensor, kept: int) -> Tensor:
    """Return a mask of the `kept` largest elements of x."""
    mask = torch.zeros(x.numel(), dtype=torch.bool, device=x.device)
    mask[torch.topk(x.reshape(-1), kept, sorted=False).indices] = True
    return mask.view(x.shape)


def elected(value: Tensor, weight: float, mean: bool = True) -> Tensor:
    """Return the sum, or the weighted mean, of the values that have the sign of their sum."""
    sign = torch.where(value.sum(0) >= 0, 1.0, -1.0)
    agrees = value.sign() == sign
    total = (value * agrees).sum(0)
    if not mean:
        return total
    divisor = weight * agrees.sum(0)
    return total / torch.where(divisor == 0, 1.0, divisor)


# ---- methods ---------------------------------------------------------------------------------------


def linear(base: Tensor, experts: Sequence[Tensor], masks: Masks = None) -> Tensor:
    """arXiv:2203.05482: the mean of the experts."""
    return torch.stack([e.float() for e in experts]).mean(0).to(experts[0].dtype)


def task_arithmetic(base: Tensor, experts: Sequence[Tensor], masks: Masks = None) -> Tensor:
    """arXiv:2212.04089."""
    return added(base, (0.5 * deltas(base, experts)).sum(0))


def ties(base: Tensor, experts: Sequence[Tensor], masks: Masks = None) -> Tensor:
    """arXiv:2306.01708: trim by magnitude, elect by mass, disjoint mean."""
    delta = deltas(base, experts)
    kept = max(1, int(0.3 * base.numel()))
    trimmed = torch.stack([d * largest(d.abs(), kept) for d in delta])
    return added(base, elected(0.5 * trimmed, 0.5))


def _dropped(base: Tensor, experts: Sequence[Tensor], masks: Masks) -> Tensor:
    """arXiv:2311.03099: drop at random, rescale by the inverse of the keep probability."""
    delta = deltas(base, experts)
    if masks is None:
        return delta * torch.bernoulli(torch.full_like(delta, 0.5)) / 0.5
    return delta * torch.stack(list(masks)).view(delta.shape) / 0.5


def dare_linear(base: Tensor, experts: Sequence[Tensor], masks: Masks = None) -> Tensor:
    return added(base, (0.5 * _dropped(base, experts, masks)).sum(0))


def dare_ties(base: Tensor, experts: Sequence[Tensor], masks: Masks = None) -> Tensor:
    return added(base, elected(0.5 * _dropped(base, experts, masks), 0.5, mean=False))


def breadcrumbs(base: Tensor, experts: Sequence[Tensor], masks: Masks = None) -> Tensor:
    """arXiv:2312.06795: without the largest changes and the smallest."""
    n = base.numel()
    outliers, kept = int(0.05 * n), int(0.8 * n)
    merged = torch.zeros_like(base, dtype=torch.float32)
    for d in deltas(base, experts):
        size = d.abs()
        merged += 0.5 * d * (largest(size, kept + outliers) & ~largest(size, outliers))
    return added(base, merged)


def sce(base: Tensor, experts: Sequence[Tensor], masks: Masks = None) -> Tensor:
    """arXiv:2408.07990: select by variance, weigh by squares, erase minority signs."""
    delta = deltas(base, experts)
    variance = delta.var(0, correction=0)
    selected = largest(variance, int(0.1 * int(torch.count_nonzero(variance))))
    delta = delta * selected
    squares = (delta**2).reshape(len(delta), -1).mean(1)
    weight = (squares / squares.sum()).view(-1, *[1] * base.dim())
    sign = torch.where(delta.sum(0) >= 0, 1.0, -1.0)
    share = weight * (delta.sign() == sign)
    return added(base, (share * delta).sum(0) / share.sum(0).clamp(min=1e-6))


def model_stock(base: Tensor, experts: Sequence[Tensor], masks: Masks = None) -> Tensor:
    """arXiv:2403.19522: as far towards the mean as the mean cosine between task vectors says."""
    delta = deltas(base, experts)
    flat = delta.reshape(len(delta), -1)
    gram = flat @ flat.T
    norm = gram.diagonal().sqrt()
    cosine = gram / (norm[:, None] * norm[None, :]).clamp(min=1e-6)
    k = len(delta)
    pairs = list(itertools.combinations(range(k), 2))
    mean = torch.stack([cosine[i, j] for i, j in pairs]).mean().clamp(-1, 1)
    t = k * mean / (1 + (k - 1) * mean)
    return added(base, t * delta.mean(0))


def della(base: Tensor, experts: Sequence[Tensor], masks: Masks = None) -> Tensor:
    """arXiv:2406.11617: keep probability by rank in the row; survivors rescaled, elected mean."""
    delta = deltas(base, experts)
    cols = delta.shape[-1]
    rank = delta.abs().argsort(dim=-1, stable=True).argsort(dim=-1)
    p = 0.3 + 0.4 * rank / (cols - 1)
    mask = torch.bernoulli(p) if masks is None else torch.stack(list(masks)).view(delta.shape)
    return added(base, elected(0.5 * (delta * mask / p), 0.5))


@dataclass(frozen=True)
class Rival:
    """A method in plain torch, and what `merge_tensors` is given to compute the same."""

    method: str
    eager: Callable[..., Tensor]
    given: dict[str, Any]
    is_random: bool = False
    with_base: bool = True


_INVERSE = {"rescale": True, "rescale_mode": "inverse_keep"}
RIVALS = [
    Rival("linear", linear, {"weight": 1.0}, with_base=False),
    Rival("task_arithmetic", task_arithmetic, {"weight": 0.5}),
    Rival("ties", ties, {"weight": 0.5, "density": 0.3}),
    Rival("dare_linear", dare_linear, {"weight": 0.5, "density": 0.5, **_INVERSE}, is_random=True),
    Rival("dare_ties", dare_ties, {"weight": 0.5, "density": 0.5, **_INVERSE}, is_random=True),
    Rival("breadcrumbs", breadcrumbs, {"weight": 0.5, "density": 0.8, "gamma": 0.05}),
    Rival("sce", sce, {"select_topk": 0.1}),
    Rival("model_stock", model_stock, {}),
    Rival(
        "della", della, {"weight": 0.5, "density": 0.5, "epsilon": 0.2, **_INVERSE}, is_random=True
    ),
]


def small_walks(operands: Sequence[Any], cuts: Sequence[Sequence[float]]) -> list[Tensor]:
    """The TIES walk with given cuts, tensor by tensor, in plain torch."""
    merged = []
    for held, cut in zip(operands, cuts, strict=True):
        delta = deltas(held.base, held.experts)
        keep = torch.stack([d.abs() > c for d, c in zip(delta, cut, strict=True)])
        merged.append(added(held.base, elected(0.5 * delta * keep, 0.5)))
    return merged
