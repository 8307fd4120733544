"""SCE: select where experts differ, weigh each by its squared changes, erase minority signs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastmerge.methods.deltas import per_expert
from fastmerge.methods.oracle_deltas import deltas_of, largest_first, spread
from fastmerge.registry import Param, Params, Recipe, Scope, TensorContext, method
from fastmerge.stages import (
    Combine,
    Cut,
    Elect,
    Keep,
    MomentResult,
    Moments,
    OrderStatistic,
    Select,
    Walk,
)

if TYPE_CHECKING:
    from torch import Tensor


@method(
    "sce",
    title="SCE",
    summary="weighs experts by their squared changes where they differ most, erases minority signs",
    paper="arXiv:2408.07990",
    base="required",
    params=(
        Param(
            "select_topk",
            1.0,
            "kept fraction of the coordinates whose variance over experts is not zero",
            low=0.0,
            high=1.0,
        ),
        Param("int8_mask", False, "accepted for mergekit's sake; changes nothing", kind=bool),
        Param(
            "select_applies_to",
            "all",
            "all: only selected coordinates are merged (mergekit); "
            "weights: they set the weights, every coordinate is merged (authors' code)",
            kind=str,
            choices=("all", "weights"),
        ),
        Param("uniform_below", 1e-6, "sum of mean squares below which weights are equal", low=0.0),
        Param(
            "divisor_floor",
            1e-6,
            "least divisor; 0 replaces only an exact 0, by 1",
            low=0.0,
        ),
    ),
    scope=Scope.TENSOR,
    presets={"paper": {"select_applies_to": "weights", "uniform_below": 0.0, "divisor_floor": 0.0}},
)
def sce(params: Params, context: TensorContext) -> Recipe:
    """out = base + sum_elected(w_k * delta_k) / sum_elected(w_k).

    w_k is the expert's share of the mean squares of the selected deltas.
    """
    keep = Keep()
    if params.select_topk < 1:
        cuts: list[Cut] = yield OrderStatistic(
            of="variance", fraction_of_nonzero=params.select_topk
        )
        keep = Keep(select=Select(cuts[0]))
    squares: MomentResult = yield Moments("square", keep)
    mean_square = squares.kept / max(context.n, 1)
    total = float(mean_square.sum())
    if total == 0 or total < params.uniform_below:
        weight = np.full(context.n_experts, 1 / max(context.n_experts, 1))
    else:
        weight = mean_square / total
    return Walk(
        per_expert(weight),
        keep=keep if params.select_applies_to == "all" else Keep(),
        elect=Elect(by="delta"),
        combine=Combine(
            divide_by="weight", divisor_weight=weight.tolist(), floor=params.divisor_floor
        ),
    )


# ---- oracle --------------------------------------------------------------------------------------


def selected_oracle(delta: Tensor, fraction: float) -> Tensor:
    """Return bool: the coordinates of largest variance over experts; delta: [K, ...]."""
    import torch

    if fraction >= 1:
        return torch.ones(delta.shape[1:], dtype=torch.bool)
    # Summed in order of experts, as docs/numerics.md defines: rounding decides among near equals.
    mean = sum(delta[1:], start=delta[0]) / len(delta)
    squares = [(d - mean) ** 2 for d in delta]
    variance = (sum(squares[1:], start=squares[0]) / len(delta)).flatten()
    n_selected = int(int((variance != 0).sum()) * fraction)
    return (largest_first(variance) < n_selected).reshape(delta.shape[1:])


def weights_oracle(delta: Tensor, uniform_below: float) -> Tensor:
    """Return [K]: shares of the mean squares, or equal ones where these are (nearly) zero."""
    import torch

    if delta[0].numel() == 0:
        return torch.full((len(delta),), 1 / len(delta), dtype=torch.float64)
    square = (delta**2).reshape(len(delta), -1).mean(1)
    total = square.sum()
    if total == 0 or total < uniform_below:
        return torch.full_like(square, 1 / len(square))
    return square / total


@sce.oracle
def sce_oracle(
    base: Tensor, experts: Sequence[Tensor], params: Params, context: TensorContext
) -> Tensor:
    """The algorithm in float64."""
    import torch

    delta = deltas_of(base, experts)
    selected = delta * selected_oracle(delta, params.select_topk)
    weight = spread(weights_oracle(selected, params.uniform_below).tolist(), delta)
    if params.select_applies_to == "all":
        delta = selected
    sign = torch.where(delta.sum(0) >= 0, 1.0, -1.0)
    share = weight * (delta.sign() == sign)
    total = share.sum(0)
    if params.divisor_floor > 0:
        total = total.clamp(min=params.divisor_floor)
    else:
        total = torch.where(total == 0, 1.0, total)
    return base + (share * delta).sum(0) / total
