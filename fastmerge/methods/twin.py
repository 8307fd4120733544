"""Twin-Merging, with given mixing weights: what is shared, and the leading part of what each expert
has beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastmerge.linalg import svd
from fastmerge.methods.deltas import per_expert
from fastmerge.methods.matrices import (
    LAMBDA,
    POLICY,
    added,
    matrix_cost,
    on_base,
    scope_of,
    shape_of,
    sum_of,
)
from fastmerge.registry import Param, Params, Recipe, TensorContext, method
from fastmerge.stages import Add, Deltas, Matrices, Walk

if TYPE_CHECKING:
    from torch import Tensor


@method(
    "twin_merging",
    title="Twin-Merging",
    summary="adds to task arithmetic the leading part of what each expert has beside it",
    paper="arXiv:2406.15479",
    base="required",
    params=(
        Param("weight", 1.0, "mixing weight of the expert's exclusive part", scope="expert"),
        LAMBDA,
        Param("shared_scale", 0.3, "scale of the sum of deltas that all share"),
        Param(
            "mask_rate",
            0.9,
            "share of the exclusive part's rank that is cut off",
            low=0.0,
            high=1.0,
        ),
        *POLICY,
    ),
    scope=scope_of,
    cost=lambda params, context: matrix_cost(
        params, context, blocks=6.0, flops=14.0 * len(params.weight)
    ),
)
def twin_merging(params: Params, context: TensorContext) -> Recipe:
    """out = base + lambda * (S + sum_k weight_k * top(delta_k - S)), S = shared_scale * sum_k delta_k.

    top keeps the int((1 - mask_rate) * r) leading singular triples; tensors that are no matrices keep all.
    """
    n_experts = len(params.weight)
    shape = shape_of(params, context)
    if shape is None:
        # S + sum w_k (d_k - S), gathered by delta
        shared = params.shared_scale * (1 - sum(params.weight))
        walk = Walk(per_expert([w + shared for w in params.weight]))
        return _scaled(walk, params.lambda_)
    deltas: Deltas = yield Matrices(shape)
    shared_delta = sum_of(deltas, [params.shared_scale] * n_experts)
    total = shared_delta.clone()
    k = int((1 - params.mask_rate) * min(shape))
    for j, weight in enumerate(params.weight):
        if k and weight:
            total += svd(deltas[j].sub_(shared_delta), k).product().mul_(weight)
    return Add(total, params.lambda_)


def _scaled(walk: Walk, lambda_: float) -> Walk:
    from dataclasses import replace

    return replace(walk, combine=replace(walk.combine, lambda_=lambda_))


@twin_merging.oracle
def twin_merging_oracle(
    base: Tensor, experts: Sequence[Tensor], params: Params, context: TensorContext
) -> Tensor:
    """The authors' steps in float64."""
    import torch

    shape = shape_of(params, context)
    shared = params.shared_scale * added(e - base for e in experts)
    merged = shared.clone()
    for weight, expert in zip(params.weight, experts, strict=True):
        own = expert - base - shared
        if shape is not None:
            k = int((1 - params.mask_rate) * min(shape))
            u, s, vh = torch.linalg.svd(own.reshape(shape), full_matrices=False)
            own = ((u[:, :k] * s[:k]) @ vh[:k]).reshape(base.shape)
        merged += weight * own
    return on_base(base, merged, params)
