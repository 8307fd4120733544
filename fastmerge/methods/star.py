"""STAR: each expert's delta cut to the rank that holds a share of its nuclear norm, and scaled back to
all of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastmerge.linalg import spectrum
from fastmerge.methods.matrices import (
    LAMBDA,
    WEIGHT,
    Flops,
    matrix_method,
)
from fastmerge.registry import Param, Params
from fastmerge.stages import Add, Deltas

if TYPE_CHECKING:
    from torch import Tensor


def kept_rank(s: Tensor, eta: float) -> int:
    """Return the first rank whose singular values sum up to eta per cent of all."""
    import torch

    running = s.cumsum(0)
    target = running[-1:] * (eta / 100)
    return min(int(torch.searchsorted(running, target)) + 1, len(s))


@matrix_method(
    "star",
    title="STAR",
    summary="cuts each expert's delta to its leading singular triples and restores its nuclear norm",
    paper="arXiv:2502.10339",
    params=(
        WEIGHT,
        LAMBDA,
        Param("eta", 40.0, "per cent of the nuclear norm that is kept", low=0.0, high=100.0),
    ),
    blocks=5.0,
    flops=Flops(each=14.0),
)
def star(params: Params, deltas: Deltas) -> Add:
    """out = base + lambda * mean_k(weight_k * U_r diag(s_r * sum(s) / sum(s_r)) V_r^T), of each delta."""
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
def star_oracle(deltas: Sequence[Tensor], params: Params) -> Tensor:
    """The authors' steps in float64."""
    import torch

    merged = torch.zeros_like(deltas[0])
    for weight, delta in zip(params.weight, deltas, strict=True):
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        if not s[0]:
            continue
        rank = next(
            (i for i in range(1, len(s)) if s[:i].sum() >= s.sum() * params.eta / 100), len(s)
        )
        scaled = s[:rank] * (s.sum() / s[:rank].sum())
        merged += weight * (u[:, :rank] * scaled) @ vh[:rank] / len(deltas)
    return merged * float(params.lambda_)
