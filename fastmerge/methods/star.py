"""STAR: each expert's delta cut to the rank that holds a share of its nuclear norm, and scaled back to
all of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastmerge.linalg import spectrum
from fastmerge.methods.matrices import (
    LAMBDA,
    POLICY,
    WEIGHT,
    matrix_cost,
    mean_oracle,
    mean_walk,
    on_base,
    scope_of,
    shape_of,
)
from fastmerge.registry import Param, Params, Recipe, TensorContext, method
from fastmerge.stages import Add, Deltas, Matrices

if TYPE_CHECKING:
    from torch import Tensor


def kept_rank(s: Tensor, eta: float) -> int:
    """Return the first rank whose singular values sum up to eta per cent of all."""
    import torch

    running = s.cumsum(0)
    target = running[-1:] * (eta / 100)
    return min(int(torch.searchsorted(running, target)) + 1, len(s))


@method(
    "star",
    title="STAR",
    summary="cuts each expert's delta to its leading singular triples and restores its nuclear norm",
    paper="arXiv:2502.10339",
    base="required",
    params=(
        WEIGHT,
        LAMBDA,
        Param("eta", 40.0, "per cent of the nuclear norm that is kept", low=0.0, high=100.0),
        *POLICY,
    ),
    scope=scope_of,
    cost=lambda params, context: matrix_cost(
        params, context, blocks=5.0, flops=14.0 * len(params.weight)
    ),
)
def star(params: Params, context: TensorContext) -> Recipe:
    """out = base + lambda * mean_k(weight_k * U_r diag(s_r * sum(s) / sum(s_r)) V_r^T), of each delta."""
    shape = shape_of(params, context)
    if shape is None:
        return mean_walk(params)
    deltas: Deltas = yield Matrices(shape)
    total = None
    for k, weight in enumerate(params.weight):
        found = spectrum(deltas[k])
        rank = kept_rank(found.s, params.eta)
        u, s, vh = found.top(rank)
        kept = float(found.s[:rank].sum())
        scale = weight * float(found.s.sum()) / kept / len(deltas) if kept else 0.0
        part = (u * (s * scale)) @ vh
        total = part if total is None else total.add_(part)
    assert total is not None
    return Add(total, params.lambda_)


@star.oracle
def star_oracle(
    base: Tensor, experts: Sequence[Tensor], params: Params, context: TensorContext
) -> Tensor:
    """The authors' steps in float64."""
    import torch

    shape = shape_of(params, context)
    if shape is None:
        return mean_oracle(base, experts, params)
    merged = torch.zeros(shape, dtype=torch.float64)
    for weight, expert in zip(params.weight, experts, strict=True):
        u, s, vh = torch.linalg.svd((expert - base).reshape(shape), full_matrices=False)
        if not s[0]:
            continue
        rank = next(
            (i for i in range(1, len(s)) if s[:i].sum() >= s.sum() * params.eta / 100), len(s)
        )
        scaled = s[:rank] * (s.sum() / s[:rank].sum())
        merged += weight * (u[:, :rank] * scaled) @ vh[:rank] / len(experts)
    return on_base(base, merged, params)
