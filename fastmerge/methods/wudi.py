"""WUDI: the delta whose difference from each expert's lies least along that expert's own rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastmerge.linalg import gram, inner
from fastmerge.linalg.quadratic import adam, filtered
from fastmerge.methods.matrices import (
    LAMBDA,
    WEIGHT,
    added,
    matrix_method,
)
from fastmerge.registry import Param, Params
from fastmerge.stages import Add, Deltas

if TYPE_CHECKING:
    from torch import Tensor

#: Eigenvalues of C, whose trace is the number of experts, that count as zero.
SMALLEST_EIGENVALUE = 1e-8


def _flops(params: Params, shape: tuple[int, int]) -> float:
    m, n = shape
    products = 4.0 * len(params.weight) + 2.0 * (params.steps if params.solver == "adam" else 4)
    return products * m * n * n + 2.0 * n**3


@matrix_method(
    "wudi",
    title="WUDI",
    summary="finds the delta that disturbs no expert along the directions of its own delta",
    paper="arXiv:2503.08099",
    params=(
        WEIGHT,
        LAMBDA,
        Param(
            "solver",
            "adam",
            "adam: as published; exact: the minimum nearest to the start; swudi: gradient flow along the "
            "leading eigenvectors; aswudi: the minimum along as many of them as the spectrum says",
            kind=str,
            choices=("adam", "exact", "swudi", "aswudi"),
        ),
        Param("steps", 300, "of Adam", kind=int, low=0),
        Param("lr", 1e-5, "Adam's learning rate", low=0.0),
        Param("time", 300.0, "of swudi's gradient flow", low=0.0),
        Param(
            "rank_ratio", 0.65, "share of eigenvectors that swudi moves along", low=0.0, high=1.0
        ),
    ),
    blocks=8.0,
    side=1,
    flops=_flops,
)
def wudi(params: Params, deltas: Deltas) -> Add:
    """out = base + lambda * X, X near the minimum of sum_k ||(X - D_k) D_k^T||_F^2 / ||D_k||_F^2.

    D_k = weight_k * delta_k. From their sum, by Adam on the gradient 2 (X C - D), or at once: C is the sum of
    D_k^T D_k / ||D_k||^2 and D that of D_k D_k^T D_k / ||D_k||^2.
    """
    start, c, d = quadratic_of(deltas, params.weight, exact=params.solver != "adam")
    if params.solver == "adam":
        return Add(
            adam(start, c.to(start.dtype), d, lr=params.lr, steps=params.steps), params.lambda_
        )
    import torch

    values, vectors = torch.linalg.eigh(c)
    values, vectors = values.flip(0), vectors.flip(1)
    kept = moved_along(values, params)

    def left(values: Tensor) -> Tensor:
        if params.solver == "swudi":
            return torch.exp(-params.time * values)
        return torch.zeros_like(values)

    return Add(filtered(start, d, values[:kept], vectors[:, :kept], left), params.lambda_)


def moved_along(values: Tensor, params: Params) -> int:
    """Return along how many of C's eigenvectors, the leading ones, the start is moved."""
    positive = values[values >= SMALLEST_EIGENVALUE]
    if params.solver == "exact":
        return len(positive)
    if params.solver == "swudi":
        return min(int(len(values) * params.rank_ratio + 0.999), len(positive))
    # As many equal ones would have the same ratio of sums.
    roots = float(positive.sqrt().sum())
    return min(math.ceil(roots * roots / float(positive.sum())), len(positive)) if roots else 0


def quadratic_of(
    deltas: Deltas | Sequence[Tensor], weight: Sequence[float], *, exact: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (sum_k D_k, C, D) of all deltas; C in float64, exact: all of them, for what divides by C.

    A delta of zeros has no share in C and D.
    """
    start = c = d = None
    for k, factor in enumerate(weight):
        delta = deltas[k] * factor
        delta = delta.double() if exact else delta
        square = inner(delta, delta)
        own = gram(delta.mT)
        own /= square or 1.0
        pulled = delta @ own.to(delta.dtype)
        start = delta if start is None else start.add_(delta)
        c = own if c is None else c.add_(own)
        d = pulled if d is None else d.add_(pulled)
    assert start is not None and c is not None and d is not None
    return start, c, d


@wudi.oracle
def wudi_oracle(deltas: Sequence[Tensor], params: Params) -> Tensor:
    """The published loop in float64, by automatic differentiation; or the pseudo-inverse."""
    import torch

    deltas = [w * d for w, d in zip(params.weight, deltas, strict=True)]
    norms = [float((d * d).sum()) or 1.0 for d in deltas]
    total = added(deltas)
    if params.solver != "adam":
        c = added(d.mT @ d / n for d, n in zip(deltas, norms, strict=True))
        pulled = added(d @ d.mT @ d / n for d, n in zip(deltas, norms, strict=True))
        values, vectors = torch.linalg.eigh(c)
        order = values.argsort(descending=True)
        share = torch.zeros_like(values)
        for j in order[: moved_along(values[order], params)]:
            share[j] = -torch.expm1(-params.time * values[j]) if params.solver == "swudi" else 1.0
        inverse = vectors @ torch.diag(share / values) @ vectors.mT
        merged: Tensor = total + (pulled - total @ c) @ inverse
        return merged * float(params.lambda_)
    x = torch.nn.Parameter(total.clone())
    optimizer = torch.optim.Adam([x], lr=params.lr)
    for _ in range(params.steps):
        optimizer.zero_grad()
        loss = added((((x - d) @ d.mT) ** 2).sum() / n for d, n in zip(deltas, norms, strict=True))
        torch.autograd.backward(loss)
        optimizer.step()
    return x.detach() * float(params.lambda_)
