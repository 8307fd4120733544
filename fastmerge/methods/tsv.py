"""TSV-Merge: the leading singular triples of each expert's delta, side by side, made orthogonal to
each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastmerge.linalg import EPS, polar, svd
from fastmerge.methods.matrices import (
    LAMBDA,
    MODE,
    WEIGHT,
    Flops,
    matrix_method,
    polar_oracle,
)
from fastmerge.registry import Param, Params
from fastmerge.stages import Add, Deltas

if TYPE_CHECKING:
    from torch import Tensor


@matrix_method(
    "tsv_m",
    title="TSV-Merge",
    summary="keeps each expert's leading singular triples and makes them orthogonal to the others'",
    paper="arXiv:2412.00081",
    params=(
        WEIGHT,
        LAMBDA,
        Param(
            "rank_fraction",
            None,
            "share of the singular triples kept of each expert; default: 1 / number of experts",
            low=0.0,
            high=1.0,
        ),
        MODE,
    ),
    blocks=9.0,  # a delta, its triples, both factors and what their polar factors take, the result
    flops=Flops(each=14.0, once=30.0),
)
def tsv_m(params: Params, deltas: Deltas) -> Add:
    """out = base + lambda * Q(U) diag(s) Q(V)^T.

    U, s, V: the int(r / K) leading singular triples of every weight_k * delta_k, side by side; Q is the polar
    factor, r the shorter side. Its singular values are the s.
    """
    import torch

    k = kept_rank(params, deltas.shape, len(deltas))
    u, s, v = orthogonal_triples(deltas, params.weight, k, params.mode == "stable")
    return Add((torch.cat(u, 1) * torch.cat(s)) @ torch.cat(v, 1).mT, params.lambda_)


def kept_rank(params: Params, shape: Sequence[int], n_experts: int) -> int:
    """Return how many triples are kept of each expert."""
    fraction = 1 / n_experts if params.rank_fraction is None else params.rank_fraction
    return int(min(shape) * fraction)


def orthogonal_triples(
    deltas: Deltas | Sequence[Tensor], weight: Sequence[float], k: int, stable: bool
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return each expert's U, s, V after they were made orthogonal to the others': it adds U diag(s) V^T.

    stable: directions that are rounding noise are left out, of a delta and of all factors side by side.
    """
    import torch

    found = []
    for j, factor in enumerate(weight):
        delta = deltas[j]
        scaled = delta if factor == 1 else delta * factor
        found.append(svd(scaled, k, floor=None if stable else 0.0))
    ranks = [len(t.s) for t in found]

    def orthogonal(side: list[Tensor]) -> list[Tensor]:
        joint = torch.cat(side, 1)
        q = polar(joint) if stable else polar(joint, floor=0.0, route="svd")
        return list(torch.split(q.q, ranks, 1))

    return (
        orthogonal([t.u for t in found]),
        [t.s for t in found],
        orthogonal([t.vh.mT for t in found]),
    )


@tsv_m.oracle
def tsv_m_oracle(deltas: Sequence[Tensor], params: Params) -> Tensor:
    """The published steps in float64: a full decomposition of each delta and of each row of factors."""
    import torch

    shape = deltas[0].shape
    k = kept_rank(params, shape, len(deltas))
    u, s, v = [], [], []
    for weight, delta in zip(params.weight, deltas, strict=True):
        left, values, right = torch.linalg.svd(weight * delta, full_matrices=False)
        kept = k
        if params.mode == "stable" and k:
            kept = min(k, int((values > max(shape) * EPS[4] * values[0]).sum()))
        u.append(left[:, :kept])
        s.append(values[:kept])
        v.append(right[:kept].mT)

    q_u, q_v = (polar_oracle(torch.cat(x, 1), params.mode == "stable") for x in (u, v))
    merged = q_u @ torch.diag(torch.cat(s)) @ q_v.mT
    return merged * float(params.lambda_)
