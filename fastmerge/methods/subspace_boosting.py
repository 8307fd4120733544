"""Subspace boosting: the small singular values of a merged delta, raised to one level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastmerge.linalg import EPS, spectrum
from fastmerge.methods.matrices import (
    LAMBDA,
    POLICY,
    WEIGHT,
    added,
    matrix_cost,
    mean_oracle,
    mean_walk,
    on_base,
    scope_of,
    shape_of,
    sum_of,
)
from fastmerge.registry import Param, Params, Recipe, TensorContext, method
from fastmerge.stages import Add, Deltas, Matrices

if TYPE_CHECKING:
    from torch import Tensor


def level(s: Tensor, beta: float) -> Tensor:
    """Return the first singular value at which they sum up to a share beta of all."""
    share = s.cumsum(0) / s.sum().clamp_min(1e-300)
    return s[min(int((share < beta).sum()), len(s) - 1)]


@method(
    "subspace_boosting",
    title="Subspace boosting",
    summary="sums the deltas and raises the sum's small singular values to one level",
    paper="arXiv:2506.16506",
    base="required",
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
        *POLICY,
    ),
    scope=scope_of,
    cost=lambda params, context: matrix_cost(params, context, blocks=5.0, flops=16.0),
)
def subspace_boosting(params: Params, context: TensorContext) -> Recipe:
    """out = base + lambda * U diag(max(s, s_c)) V^T, of A = sum_k weight_k * delta_k = U diag(s) V^T.

    c is the first index with sum(s_1 .. s_c) >= beta * sum(s). Directions that are rounding noise stay out.
    """
    shape = shape_of(params, context)
    if shape is None:
        return mean_walk(params)
    deltas: Deltas = yield Matrices(shape)
    found = spectrum(sum_of(deltas, params.weight))
    least = level(found.s, params.beta)
    return Add(found.mapped(lambda s: s.clamp_min(float(least))), params.lambda_)


@subspace_boosting.oracle
def subspace_boosting_oracle(
    base: Tensor, experts: Sequence[Tensor], params: Params, context: TensorContext
) -> Tensor:
    """The published rule in float64."""
    import torch

    shape = shape_of(params, context)
    if shape is None:
        return mean_oracle(base, experts, params)
    total = added(w * (e - base) for w, e in zip(params.weight, experts, strict=True)).reshape(
        shape
    )
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    if not s[0]:
        return base
    cutoff = next(
        i for i in range(len(s)) if s[: i + 1].sum() >= params.beta * s.sum() * (1 - 1e-15)
    )
    raised = torch.where(s > max(shape) * EPS[4] * s[0], s.clamp_min(s[cutoff]), 0.0)
    return on_base(base, ((u * raised) @ vh), params)
