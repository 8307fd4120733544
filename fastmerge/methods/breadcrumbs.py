"""Model Breadcrumbs: remove the smallest and the largest changes, sum the rest or elect a sign."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from fastmerge.methods.deltas import GAMMA, delta_params, sparse_walk
from fastmerge.methods.oracle_deltas import (
    consensus_sum,
    deltas_of,
    largest_first,
    norm_matched,
    weighted_sum,
)
from fastmerge.registry import Param, Params, Recipe, Scope, TensorContext, method
from fastmerge.stages import Cut, Keep, OrderStatistic, Statistic, Trim

if TYPE_CHECKING:
    from torch import Tensor

_PAPER = "arXiv:2312.06795"
_PARAMS = (
    *delta_params(normalize=False, rescale=False, density="kept fraction of the expert's delta"),
    GAMMA,
    Param(
        "scope",
        "tensor",
        "tensor: density is met even if fewer outliers go (mergekit); "
        "row: gamma of each row goes, then density of the row stays (authors)",
        kind=str,
        choices=("tensor", "row"),
    ),
)


def _ranks(density: float, gamma: float, n: int, scope: str) -> list[int]:
    """Return how many lie above what is kept at all, and above what is removed as outliers."""
    top, target = int(gamma * n), int(density * n)
    if scope == "row":
        return [top + target, top]
    if density >= 1:
        return [n, 0]
    bottom = max(0, n - target - top)
    return [n - bottom, n - bottom - target]


def _trim(params: Params, context: TensorContext) -> Generator[Statistic, Any, Trim | None]:
    by_row = params.scope == "row"
    if not context.shape if by_row else all(density >= 1 for density in params.density):
        return None
    n = context.cols if by_row else context.n
    ranks = [
        _ranks(density, gamma, n, params.scope)
        for density, gamma in zip(params.density, params.gamma, strict=True)
    ]
    cuts: list[Cut] = yield OrderStatistic(ranks, scope="row" if by_row else "tensor")
    return Trim(keep=cuts[0], remove=cuts[1])


def _recipe(params: Params, context: TensorContext, elects: bool) -> Recipe:
    keep = Keep(trim=(yield from _trim(params, context)))
    return (yield from sparse_walk(params, keep, elects, "l1" if params.rescale else None))


@method(
    "breadcrumbs",
    title="Model Breadcrumbs",
    summary="removes the smallest and the largest changes, sums the rest",
    paper=_PAPER,
    base="required",
    params=_PARAMS,
    scope=Scope.TENSOR,
    presets={"paper": {"weight": 1.0, "scope": "row"}},
)
def breadcrumbs(params: Params, context: TensorContext) -> Recipe:
    """out = base + lambda * sum_k weight_k * middle_k(delta_k)."""
    return (yield from _recipe(params, context, elects=False))


@method(
    "breadcrumbs_ties",
    title="Model Breadcrumbs with TIES election",
    summary="removes the smallest and the largest changes, merges those of the elected sign",
    paper=_PAPER,
    base="required",
    params=_PARAMS,
    scope=Scope.TENSOR,
)
def breadcrumbs_ties(params: Params, context: TensorContext) -> Recipe:
    """As breadcrumbs, over the experts whose weighted change has the sign of the sum."""
    return (yield from _recipe(params, context, elects=True))


# ---- oracle --------------------------------------------------------------------------------------


def middle_oracle(delta: Tensor, params: Params) -> Tensor:
    """Return [K, ...]: deltas without their smallest and largest changes, rescaled if asked."""
    import torch

    sparse = []
    for d, density, gamma in zip(delta, params.density, params.gamma, strict=True):
        by_row = params.scope == "row"
        if (d.dim() == 0 if by_row else density >= 1) or d.numel() == 0:
            sparse.append(d)
            continue
        rows = d.reshape(-1, d.shape[-1]) if by_row else d.reshape(1, -1)
        length = rows.shape[1]
        first = int(length * gamma)
        if not by_row:  # fewer outliers go where density would not be met
            first = min(first, length - int(density * length))
        last = first + int(density * length)
        place = torch.stack([largest_first(row.abs()) for row in rows])
        kept = torch.where((place >= first) & (place < last), rows, 0.0).reshape(d.shape)
        sparse.append(norm_matched(d, kept) if params.rescale and density < 1 else kept)
    return torch.stack(sparse)


@breadcrumbs.oracle
def breadcrumbs_oracle(
    base: Tensor, experts: Sequence[Tensor], params: Params, context: TensorContext
) -> Tensor:
    """The sum in float64."""
    return base + weighted_sum(middle_oracle(deltas_of(base, experts), params), params)


@breadcrumbs_ties.oracle
def breadcrumbs_ties_oracle(
    base: Tensor, experts: Sequence[Tensor], params: Params, context: TensorContext
) -> Tensor:
    """The elected sum in float64."""
    return base + consensus_sum(middle_oracle(deltas_of(base, experts), params), params)
