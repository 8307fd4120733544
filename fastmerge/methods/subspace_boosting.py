"""Subspace boosting: the small singular values of a merged delta, raised to one level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastmerge.linalg import EPS, spectrum
from fastmerge.methods.matrices import (
    LAMBDA,
    WEIGHT,
    Flops,
    matrix_method,
    spectral_oracle,
    weighted_sum,
)
from fastmerge.registry import Param, Params
from fastmerge.stages import Add, Deltas

if TYPE_CHECKING:
    from torch import Tensor


def level(s: Tensor, beta: float) -> Tensor:
    """Return the first singular value at which they sum up to a share beta of all."""
    share = s.cumsum(0) / s.sum().clamp_min(1e-300)
    return s[min(int((share < beta).sum()), len(s) - 1)]


@matrix_method(
    "subspace_boosting",
    title="Subspace boosting",
    summary="sums the deltas and raises the sum's small singular values to one level",
    paper="arXiv:2506.16506",
    params=(
        WEIGHT,
        LAMBDA,
        Param(
            "beta",
            0.01,
            "share of the singular values' sum at which the level is taken",
            low=0.0,
            high=1.0,
        ),
    ),
    blocks=5.0,
    flops=Flops(once=16.0),
)
def subspace_boosting(params: Params, deltas: Deltas) -> Add:
    """out = base + lambda * U diag(max(s, s_c)) V^T, of A = sum_k weight_k * delta_k = U diag(s) V^T.

    c is the first index with sum(s_1 .. s_c) >= beta * sum(s). Directions that are rounding noise stay out.
    """
    found = spectrum(deltas.total(params.weight))
    least = level(found.s, params.beta)
    return Add(found.mapped(lambda s: s.clamp_min(float(least))), params.lambda_)


@subspace_boosting.oracle
def subspace_boosting_oracle(deltas: Sequence[Tensor], params: Params) -> Tensor:
    """The published rule in float64."""
    import torch

    total = weighted_sum(deltas, params.weight)

    def raised(s: Tensor) -> Tensor:
        share = params.beta * s.sum() * (1 - 1e-15)
        cutoff = next(i for i in range(len(s)) if s[: i + 1].sum() >= share)
        return torch.where(s > max(total.shape) * EPS[4] * s[0], s.clamp_min(s[cutoff]), 0.0)

    return spectral_oracle(total, raised) * float(params.lambda_)
