"""Singular value calibration: each direction of a merged delta scaled to what the experts have along it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastmerge.linalg import EPS, svd
from fastmerge.methods.matrices import (
    LAMBDA,
    WEIGHT,
    Flops,
    matrix_method,
    weighted_sum,
)
from fastmerge.registry import Param, Params
from fastmerge.stages import Add, Deltas

if TYPE_CHECKING:
    from torch import Tensor


def calibrated(merged: Tensor, deltas: Deltas | Sequence[Tensor], alpha: float) -> Tensor:
    """Return U diag(gamma * s) V^T of a merged delta.

    gamma_r = K / sum_k max(alpha, c_rk), c_rk = <s_r v_r, u_r^T delta_k> / |u_r^T delta_k|^2.
    """
    import torch

    u, s, vh = svd(merged)
    total = torch.zeros(len(s), dtype=torch.float64, device=merged.device)
    for k in range(len(deltas)):
        rows = u.mT @ deltas[k]
        along = (rows * vh).sum(1, dtype=torch.float64) * s
        square = (rows * rows).sum(1, dtype=torch.float64).clamp_min(_least(merged.shape, s))
        total += (along / square).clamp_min(alpha)
    return (u * (s * (len(deltas) / total)).to(u.dtype)) @ vh


def _least(shape: Sequence[int], s: Tensor) -> float:
    """Return the square of what is rounding noise beside the largest singular value."""
    return max((max(shape) * EPS[4] * float(s[0])) ** 2, 1e-300) if len(s) else 1.0


@matrix_method(
    "svc",
    title="SVC",
    summary="sums the deltas and scales each direction of the sum to what the experts have along it",
    paper="arXiv:2602.05536",
    params=(
        WEIGHT,
        LAMBDA,
        Param("alpha", 0.1, "least of what an expert says that a direction has too much", low=1e-6),
    ),
    blocks=6.0,
    flops=Flops(each=2.0, once=16.0),
)
def svc(params: Params, deltas: Deltas) -> Add:
    """out = base + lambda * U diag(gamma * s) V^T, of A = sum_k weight_k * delta_k; see `calibrated`."""
    return Add(calibrated(deltas.total(params.weight), deltas, params.alpha), params.lambda_)


@svc.oracle
def svc_oracle(deltas: Sequence[Tensor], params: Params) -> Tensor:
    """The rule, direction by direction, in float64."""
    import torch

    total = weighted_sum(deltas, params.weight)
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    merged = torch.zeros_like(total)
    for r in range(len(s)):
        own = s[r] * vh[r]
        shares = []
        for delta in deltas:
            row = u[:, r] @ delta
            shares.append(
                max(params.alpha, float(own @ row / (row @ row).clamp_min(_least(total.shape, s))))
            )
        merged += len(deltas) / sum(shares) * torch.outer(u[:, r], own)
    return merged * float(params.lambda_)
