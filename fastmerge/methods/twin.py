"""Twin-Merging, with given mixing weights: what is shared, and the leading part of what each expert
has beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastmerge.linalg import svd
from fastmerge.methods.deltas import per_expert
from fastmerge.methods.matrices import (
    LAMBDA,
    Flops,
    Plain,
    added,
    matrix_method,
)
from fastmerge.registry import Param, Params
from fastmerge.stages import Add, Combine, Deltas, Walk

if TYPE_CHECKING:
    from torch import Tensor


def _whole_walk(params: Params) -> Walk:
    """Nothing is cut off: S + sum_k w_k (d_k - S), gathered by delta."""
    shared = params.shared_scale * (1 - sum(params.weight))
    combine = Combine(lambda_=params.lambda_)
    return Walk(per_expert([w + shared for w in params.weight]), combine=combine)


def _whole_oracle(deltas: Sequence[Tensor], params: Params) -> Tensor:
    return _merged_oracle(deltas, params, None)


def _merged_oracle(deltas: Sequence[Tensor], params: Params, k: int | None) -> Tensor:
    import torch

    shared: Tensor = params.shared_scale * added(deltas)
    merged = shared.clone()
    for weight, delta in zip(params.weight, deltas, strict=True):
        own = delta - shared
        if k is not None:
            u, s, vh = torch.linalg.svd(own, full_matrices=False)
            own = (u[:, :k] * s[:k]) @ vh[:k]
        merged += weight * own
    return merged * float(params.lambda_)


@matrix_method(
    "twin_merging",
    title="Twin-Merging",
    summary="adds to task arithmetic the leading part of what each expert has beside it",
    paper="arXiv:2406.15479",
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
    ),
    blocks=6.0,
    flops=Flops(each=14.0),
    plain=Plain(_whole_walk, _whole_oracle),
)
def twin_merging(params: Params, deltas: Deltas) -> Add:
    """out = base + lambda * (S + sum_k weight_k * top(delta_k - S)), S = shared_scale * sum_k delta_k.

    top keeps the int((1 - mask_rate) * r) leading singular triples; tensors that are no matrices keep all.
    """
    shared_delta = deltas.total([params.shared_scale] * len(deltas))
    total = shared_delta.clone()
    k = int((1 - params.mask_rate) * min(deltas.shape))
    for j, weight in enumerate(params.weight):
        if k and weight:
            total += svd(deltas[j].sub_(shared_delta), k).product().mul_(weight)
    return Add(total, params.lambda_)


@twin_merging.oracle
def twin_merging_oracle(deltas: Sequence[Tensor], params: Params) -> Tensor:
    """The authors' steps in float64."""
    k = int((1 - params.mask_rate) * min(deltas[0].shape))
    return _merged_oracle(deltas, params, k)
