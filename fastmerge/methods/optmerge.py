"""OptMerge ("WUDI v2"): as WUDI, over each expert's leading singular triples, by gradient descent with
momentum: a linear iteration, of which the result is computed and not iterated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastmerge.linalg import inner, spectrum, svd
from fastmerge.linalg.quadratic import filtered, heavy_ball, iterated
from fastmerge.methods.matrices import (
    LAMBDA,
    WEIGHT,
    Flops,
    added,
    matrix_method,
)
from fastmerge.registry import Param, Params
from fastmerge.stages import Add, Deltas

if TYPE_CHECKING:
    from torch import Tensor


@matrix_method(
    "optmerge",
    title="OptMerge",
    summary="as WUDI over leading singular triples, from the average, in closed form",
    paper="arXiv:2505.19892",
    params=(
        WEIGHT,
        LAMBDA,
        Param("steps", 300.0, "of gradient descent; inf: the minimum", low=0.0),
        Param("lr", 1e-4, "learning rate", low=0.0),
        Param("momentum", 0.9, "of the descent, without dampening", low=0.0, high=1.0),
    ),
    blocks=7.0,
    flops=Flops(each=14.0, once=12.0),
)
def optmerge(params: Params, deltas: Deltas) -> Add:
    """out = base + lambda * X, X after `steps` on sum_k ||(X - Y_k) Z_k^T||_F^2 / ||D_k||_F^2 from
    mean_k D_k.

    D_k = weight_k * delta_k, Y_k = U S V^T of its int(r / K) leading singular triples, Z_k = S V^T.
    """
    import torch

    n_experts = len(deltas)
    rank = int(min(deltas.shape) / n_experts)
    start, u, v, largest = None, [], [], 0.0
    for k, factor in enumerate(params.weight):
        delta = deltas[k] * factor
        triples = svd(delta, rank, floor=None)
        root = 1 / math.sqrt(inner(delta, delta) or 1.0)
        s = triples.s.double()
        u.append(triples.u * (s**2 * root).to(triples.u.dtype))
        v.append(triples.vh * (s * root).to(triples.vh.dtype)[:, None])
        largest += float(s[0] * root) ** 2 if len(s) else 0.0
        start = delta.div_(n_experts) if start is None else start.add_(delta, alpha=1 / n_experts)
    assert start is not None
    # C = W^T W and D = Z W, with W = diag(s) V^T / ||D_k||_F and Z = U diag(s^2) / ||D_k||_F side by side.
    z, w = torch.cat(u, 1), torch.cat(v)
    del u, v
    along = heavy_ball(params.lr, params.momentum, params.steps)
    if largest == 0:
        return Add(start, params.lambda_)
    found = iterated(start, z, w, largest, along)
    if found is None:
        whole = spectrum(w)
        kept = whole.rank()
        vectors = whole.top(kept).vh.mT
        found = filtered(start, z @ w, whole.s[:kept] ** 2, vectors, along)
    return Add(found, params.lambda_)


@optmerge.oracle
def optmerge_oracle(deltas: Sequence[Tensor], params: Params) -> Tensor:
    """The authors' loop in float64, its gradient written out."""
    import torch

    deltas = [w * d for w, d in zip(params.weight, deltas, strict=True)]
    rank = int(min(deltas[0].shape) / len(deltas))
    targets, metrics = [], []
    for delta in deltas:
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        norm = float((delta * delta).sum()) or 1.0
        targets.append((u[:, :rank] * s[:rank]) @ vh[:rank])
        rows = s[:rank, None] * vh[:rank]
        metrics.append(rows.mT @ rows / norm)
    x: Tensor = added(deltas) / len(deltas)
    if math.isinf(params.steps):
        c = added(metrics)
        d = added(y @ z for y, z in zip(targets, metrics, strict=True))
        x = x + (d - x @ c) @ torch.linalg.pinv(c, rtol=1e-12, hermitian=True)
        return x * float(params.lambda_)
    velocity = torch.zeros_like(x)
    for _ in range(int(params.steps)):
        gradient = added(2 * (x - y) @ z for y, z in zip(targets, metrics, strict=True))
        velocity = params.momentum * velocity + gradient
        x = x - params.lr * velocity
    return x * float(params.lambda_)
