"""AdaRank, applied: each expert's singular triples under a mask; the masks are learned elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastmerge.errors import RecipeError
from fastmerge.linalg import svd
from fastmerge.methods.matrices import (
    POLICY,
    scope_of,
    shape_of,
)
from fastmerge.registry import Cost, Param, Params, Recipe, TensorContext, method
from fastmerge.stages import Add, Combine, Deltas, Matrices, Walk

if TYPE_CHECKING:
    from torch import Tensor


def _cost(params: Params, context: TensorContext) -> Cost:
    shape = shape_of(params, context)
    if shape is None:
        return Cost(0, 0.0)
    m, n = shape
    r = min(shape)
    return Cost(5 * 4 * m * n + 4 * 8 * r * r, 16.0 * context.n_experts * m * n * r)


@method(
    "adarank",
    title="AdaRank",
    summary="sums the singular triples of each expert that its mask keeps",
    paper="arXiv:2503.22178",
    base="required",
    params=(
        Param("weight", 0.3, "scale of the expert's delta", scope="expert"),
        Param("lambda", 1.0, "scale of the merged delta"),
        Param(
            "rank_fraction",
            1.0,
            "share of the triples kept, the leading ones, where no mask is given",
            low=0.0,
            high=1.0,
        ),
        *(rule for rule in POLICY if rule.name != "fused"),
    ),
    scope=scope_of,
    cost=_cost,
)
def adarank(params: Params, context: TensorContext) -> Recipe:
    """out = base + lambda * sum_k weight_k * U_k diag(m_k * s_k) V_k^T, of each delta_k.

    m_k: the given masks (`masks`, per expert one value for each of the r singular values, largest first;
    positive keeps, as the logits of the authors' code do), else the leading int(rank_fraction * r).
    Tensors that are no matrices are summed: base + lambda * sum_k weight_k * delta_k.
    """
    import numpy as np

    shape = shape_of(params, context)
    if shape is None:
        weight = np.asarray(params.weight, np.float64)[:, None]
        return Walk(weight, combine=Combine(lambda_=params.lambda_))
    deltas: Deltas = yield Matrices(shape)
    total = None
    for k, weight in enumerate(params.weight):
        u, s, vh = svd(deltas[k])
        scales = s * _mask(params, context, k, s) * weight
        part = (u * scales) @ vh
        total = part if total is None else total.add_(part)
    assert total is not None
    return Add(total, params.lambda_)


def _mask(params: Params, context: TensorContext, k: int, s: Tensor) -> Tensor:
    """Return 1 for what is kept of the singular values, 0 for the rest."""
    import torch

    if context.given is None:
        return (torch.arange(len(s), device=s.device) < int(params.rank_fraction * len(s))).to(s)
    mask = torch.as_tensor(context.given.masks[k]).flatten()
    if len(mask) != len(s):
        raise RecipeError(
            f"masks[{k}] of {context.name!r} has {len(mask)} values for {len(s)} singular values; "
            "give one for each"
        )
    return (mask.to(s.device) > 0).to(s)


@adarank.oracle
def adarank_oracle(
    base: Tensor, experts: Sequence[Tensor], params: Params, context: TensorContext
) -> Tensor:
    """The masked sum in float64."""
    import torch

    shape = shape_of(params, context)
    total = torch.zeros(shape or base.shape, dtype=torch.float64)
    for k, (weight, expert) in enumerate(zip(params.weight, experts, strict=True)):
        if shape is None:
            total += weight * (expert - base)
            continue
        u, s, vh = torch.linalg.svd((expert - base).reshape(shape), full_matrices=False)
        if context.given is None:
            kept = torch.arange(len(s)) < int(params.rank_fraction * len(s))
        else:
            kept = torch.as_tensor(context.given.masks[k]) > 0
        total += weight * u[:, kept] @ torch.diag(s[kept]) @ vh[kept]
    return base + total.reshape(base.shape) * float(params.lambda_)
