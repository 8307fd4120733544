"""What the oracles of the delta family share; no recipe uses it. All tensors are float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastmerge.registry import Params, TensorContext

if TYPE_CHECKING:
    from torch import Tensor


def deltas_of(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """Return [K, ...] expert - base."""
    import torch

    return torch.stack([e - base for e in experts])


def spread(weight: Sequence[float], like: Tensor) -> Tensor:
    """Return per-expert numbers shaped [K, 1, ...] to multiply [K, ...]."""
    return like.new_tensor(list(weight)).reshape(-1, *[1] * (like.dim() - 1))


def largest_first(magnitude: Tensor) -> Tensor:
    """Return each element's place 0, 1, ... in descending order of [n], equals by index."""
    import torch

    order = torch.sort(magnitude, descending=True, stable=True).indices
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    return place


def norm_matched(delta: Tensor, kept: Tensor, norm: str = "l1") -> Tensor:
    """Return `kept` scaled to the norm of `delta`, or as it is where either norm is below 1e-7."""
    if delta.numel() == 0:
        return kept
    order = {"l1": 1.0, "l2": 2.0, "linf": float("inf")}[norm]
    before, after = delta.flatten().norm(order), kept.flatten().norm(order)
    return kept if before < 1e-7 or after < 1e-7 else kept * (before / after)


def given_mask(context: TensorContext, k: int, like: Tensor) -> Tensor | None:
    """Return expert k's mask from outside as bool, or None."""
    import numpy as np
    import torch

    if context.given is None:
        return None
    mask: Any = context.given.masks[k]
    return torch.as_tensor(np.asarray(mask)).reshape(like.shape) != 0


def weighted_sum(sparse: Tensor, params: Params) -> Tensor:
    """Return the merged delta without election; sparse: [K, ...]."""
    merged = (spread(params.weight, sparse) * sparse).sum(0)
    total = sum(params.weight)
    if params.normalize and abs(total) >= 1e-8:
        merged = merged / total
    return merged * float(params.lambda_)


def consensus_sum(sparse: Tensor, params: Params) -> Tensor:
    """Return the merged delta after electing a sign by weighted mass, a zero sum being plus."""
    import torch

    weight = spread(params.weight, sparse)
    value = weight * sparse
    sign = torch.where(value.sum(0) >= 0, 1.0, -1.0)
    agrees = (value.sign() == sign).double()
    merged = (value * agrees).sum(0)
    if params.normalize:
        total = (weight * agrees).sum(0)
        merged = merged / torch.where(total == 0, 1.0, total)
    return merged * float(params.lambda_)
