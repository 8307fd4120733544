"""TSV-Merge: the leading singular triples of each expert's delta, side by side, made orthogonal to
each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastmerge.linalg import EPS, inner, polar
from fastmerge.methods.matrices import (
    LAMBDA,
    MODE,
    WEIGHT,
    Flops,
    leading_triples,
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
        Param(
            "expert_scale",
            "one",
            "outliers: singular values are scaled by an expert's share in changes beyond mean + 3 deviations",
            kind=str,
            choices=("one", "outliers"),
        ),
        Param(
            "rank_by",
            "fraction",
            "sparsity: fewer triples of a matrix whose changes are mostly small (R-TSVM)",
            kind=str,
            choices=("fraction", "sparsity"),
        ),
        Param("gamma", 0.2, "how much rank_by sparsity changes the rank", low=0.0),
        Param(
            "usual_sparsity",
            0.5,
            "share of changes below the mean at which rank_by sparsity changes nothing",
            low=0.0,
            high=1.0,
        ),
        MODE,
    ),
    blocks=9.0,  # a delta, its triples, both factors and what their polar factors take, the result
    flops=Flops(each=8.0, once=20.0),
)
def tsv_m(params: Params, deltas: Deltas) -> Add:
    """out = base + lambda * Q(U) diag(s) Q(V)^T.

    U, s, V: the int(r / K) leading singular triples of every weight_k * delta_k, side by side; Q is the polar
    factor, r the shorter side. Its singular values are the s. R-TSVM's ideas, whose formulas are ours:

    expert_scale outliers: s_k is scaled by K o_k / sum o, o_k the sum of |d| beyond mean + 3 deviations of
    |d|. rank_by sparsity: int(r / K (1 + gamma (usual_sparsity - f))) triples, from 1 to r / K, f the mean
    share of |d| below their mean.
    """
    import torch

    k = kept_rank(params, deltas.shape, len(deltas))
    scales = [1.0] * len(deltas)
    if params.expert_scale != "one" or params.rank_by != "fraction":
        found = [tails(deltas[j]) for j in range(len(deltas))]
        if params.rank_by == "sparsity":
            k = rank_for(k, [below for _, below in found], params)
        if params.expert_scale == "outliers":
            scales = shares([abs(w) * o for w, (o, _) in zip(params.weight, found, strict=True)])
    u, s, v = orthogonal_triples(deltas, params.weight, k, params.mode == "stable")
    values = torch.cat([x * scale for x, scale in zip(s, scales, strict=True)])
    return Add((torch.cat(u, 1) * values) @ torch.cat(v, 1).mT, params.lambda_)


def tails(delta: Tensor) -> tuple[float, float]:
    """Return the sum of |d| beyond mean + 3 deviations of |d|, and the share of |d| below their mean."""
    import torch

    sizes = delta.abs()
    mean = float(sizes.mean(dtype=torch.float64))
    square = inner(delta, delta) / sizes.numel()
    deviation = math.sqrt(max(square - mean * mean, 0.0))
    beyond = sizes[sizes > mean + 3 * deviation]
    below = int((sizes < mean).sum()) / sizes.numel()
    return float(beyond.sum(dtype=torch.float64)), below


def rank_for(k: int, below: Sequence[float], params: Params) -> int:
    """Return how many triples rank_by sparsity keeps of each expert, k those of the fraction."""
    sparsity = sum(below) / len(below)
    wanted = math.floor(k * (1 + float(params.gamma) * (float(params.usual_sparsity) - sparsity)))
    return max(min(wanted, k), min(1, k))


def shares(outliers: Sequence[float]) -> list[float]:
    """Return K o_k / sum o; 1 where there is no outlier at all."""
    total = sum(outliers)
    return [len(outliers) * o / total if total else 1.0 for o in outliers]


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

    found = [leading_triples(deltas, j, factor, k, stable) for j, factor in enumerate(weight)]
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
    scales = [1.0] * len(deltas)
    if params.rank_by == "sparsity" or params.expert_scale == "outliers":
        sizes = [d.abs() for d in deltas]
        if params.rank_by == "sparsity":
            sparsity = float(torch.stack([(x < x.mean()).double().mean() for x in sizes]).mean())
            wanted = math.floor(
                k * (1 + float(params.gamma) * (float(params.usual_sparsity) - sparsity))
            )
            k = 0 if k == 0 else min(k, max(1, wanted))
        if params.expert_scale == "outliers":
            cuts = [x.mean() + 3 * x.std(correction=0) for x in sizes]
            tail = [
                abs(w) * float(torch.where(x > cut, x, 0).sum())
                for w, x, cut in zip(params.weight, sizes, cuts, strict=True)
            ]
            scales = [len(tail) * o / sum(tail) if sum(tail) else 1.0 for o in tail]
    u, s, v = [], [], []
    for weight, delta, scale in zip(params.weight, deltas, scales, strict=True):
        left, values, right = torch.linalg.svd(weight * delta, full_matrices=False)
        kept = k
        if params.mode == "stable" and k:
            kept = min(k, int((values > max(shape) * EPS[4] * values[0]).sum()))
        u.append(left[:, :kept])
        s.append(values[:kept] * scale)
        v.append(right[:kept].mT)

    q_u, q_v = (polar_oracle(torch.cat(x, 1), params.mode == "stable") for x in (u, v))
    merged = q_u @ torch.diag(torch.cat(s)) @ q_v.mT
    return merged * float(params.lambda_)
