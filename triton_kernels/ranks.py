"""Ranked drops: the threshold of each element's draw, from its rank or value within its row or tensor.

docs/numerics.md, "Draws", is the definition. Keys come from select.py; ordering them is torch's stable sort,
and the rest is a few float64 operations per element, which a torch kernel each keeps from being fused. Per
element and expert 4 bytes of threshold and, for a rescale, one Real of factor are written for the walk.
"""

import torch
from torch import Tensor

FULL = 65536


def reals_of_keys(keys: Tensor) -> Tensor:
    """Return the |x| of int32 or int64 keys, as float64; every NaN key is NaN."""
    kind = torch.float32 if keys.dtype is torch.int32 else torch.float64
    return keys.view(kind).to(torch.float64)


def keep_probabilities(keys: Tensor, low: float, high: float, by_value: bool) -> Tensor:
    """Return [units, m] float64: low + (high - low) * q.

    Args:
        keys: [units, m] int32 or int64.
        by_value: q is |delta| scaled between its unit's extremes, else its rank.
    """
    m = keys.shape[1]
    if by_value:
        size = reals_of_keys(keys)
        least = reals_of_keys(keys.amin(1, keepdim=True))
        width = reals_of_keys(keys.amax(1, keepdim=True)) - least
        width = width + torch.full_like(width, 1e-7)
        q = (size - least) / width
    elif m > 1:
        order = torch.sort(keys, dim=1, stable=True).indices
        rank = torch.empty_like(order)
        places = torch.arange(m, device=keys.device)
        rank.scatter_(1, order, places.expand_as(order))
        q = rank.to(torch.float64)
        q = q / torch.full_like(q, m - 1)
    else:
        q = torch.full(keys.shape, 0.5, dtype=torch.float64, device=keys.device)
    # Tensors, not Python numbers: a kernel must neither fuse nor divide by a reciprocal.
    rise = torch.full_like(q, high - low) * q
    return torch.full_like(q, low) + rise


def draw_thresholds(p: Tensor) -> Tensor:
    """Return int32: an element is kept iff its 16-bit draw is less. NaN keeps nothing."""
    scaled = p * torch.full_like(p, float(FULL))
    return (
        torch.floor(scaled + torch.full_like(p, 0.5)).clamp(0, FULL).nan_to_num(0).to(torch.int32)
    )


def rescale_factors(p: Tensor, thresholds: Tensor, given: bool) -> Tensor:
    """Return float64: what survivors are multiplied by; `given`: by a mask that was not drawn here."""
    if given:
        return torch.ones_like(p) / p
    inverse = torch.full_like(p, float(FULL)) / thresholds.to(torch.float64)
    return torch.where(thresholds == 0, torch.zeros_like(p), inverse)
