"""DELLA: drop small changes more often than large ones, then elect a sign or sum (linear)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastmerge.errors import RecipeError
from fastmerge.methods.deltas import RESCALE_MODE, delta_params, sparse_walk
from fastmerge.methods.oracle_deltas import (
    consensus_sum,
    deltas_of,
    given_mask,
    norm_matched,
    weighted_sum,
)
from fastmerge.methods.oracle_draws import ranked_keep_draw
from fastmerge.registry import Param, Params, Recipe, Scope, TensorContext, method
from fastmerge.stages import Axis, Keep, RankedDrop

if TYPE_CHECKING:
    from torch import Tensor

_PAPER = "arXiv:2406.11617"


def _params(normalize: bool) -> tuple[Param, ...]:
    return (
        *delta_params(normalize=normalize, rescale=True, density="mean probability of keeping"),
        Param(
            "epsilon",
            0.15,
            "half the range of probabilities: density - epsilon for the smallest change",
            scope="expert",
            low=0.0,
        ),
        RESCALE_MODE,
        Param(
            "rank_by",
            "row",
            "rank of the change in its row or tensor, or its size between the row's extremes",
            kind=str,
            choices=("row", "tensor", "value"),
        ),
        Param(
            "window",
            None,
            "the whole range of probabilities (the authors' window_size); in place of epsilon",
            scope="expert",
            low=0.0,
        ),
    )


def probability_range(params: Params) -> tuple[list[float], list[float]]:
    """Return per expert the least and the largest keep probability.

    Raises:
        RecipeError: they do not lie strictly between 0 and 1 while density does.
    """
    low, high = [], []
    for k, density in enumerate(params.density):
        window = params.window[k]
        half = params.epsilon[k] if window is None else window / 2
        if density <= 0 or density >= 1:
            half = 0.0
        elif not (density - half > 0 and density + half < 1):
            word = f"epsilon {half:g}" if window is None else f"window {window:g}"
            raise RecipeError(
                f"{word} of expert {k} leaves (0, 1) around density {density:g}: keep "
                f"probabilities {density - half:g} to {density + half:g}; make it smaller"
            )
        low.append(density - half)
        high.append(density + half)
    return low, high


def _scope(params: Params, context: TensorContext) -> Scope:
    return Scope.WHOLE if params.rank_by == "tensor" else Scope.TENSOR


def _recipe(params: Params, context: TensorContext, elects: bool) -> Recipe:
    inverse = params.rescale and params.rescale_mode == "inverse_keep"
    low, high = probability_range(params)
    drop = RankedDrop(
        low,
        high,
        context.keys("drop"),
        axis=Axis.TENSOR if params.rank_by == "tensor" else Axis.ROW,
        by="value" if params.rank_by == "value" else "rank",
        rescale=inverse,
    )
    keep = Keep(drop=drop, given=context.given)
    norm = params.rescale_mode if params.rescale and not inverse else None
    return (yield from sparse_walk(params, keep, elects, norm))


@method(
    "della",
    title="DELLA",
    summary="drops small changes more often, merges those of the elected sign",
    paper=_PAPER,
    base="required",
    params=_params(normalize=True),
    scope=_scope,
    presets={"paper": {"weight": 1.0, "normalize": True, "rescale_mode": "inverse_keep"}},
)
def della(params: Params, context: TensorContext) -> Recipe:
    """keep probability of element i: density - epsilon + 2 epsilon * rank_i / (row length - 1)."""
    return (yield from _recipe(params, context, elects=True))


@method(
    "della_linear",
    title="DELLA without election",
    summary="drops small changes more often, sums the rest",
    paper=_PAPER,
    base="required",
    params=_params(normalize=False),
    scope=_scope,
    presets={"paper": {"weight": 1.0, "rescale_mode": "inverse_keep"}},
)
def della_linear(params: Params, context: TensorContext) -> Recipe:
    """As della, summed like task arithmetic."""
    return (yield from _recipe(params, context, elects=False))


# ---- oracle --------------------------------------------------------------------------------------


def probability_oracle(delta: Tensor, density: float, half: float, rank_by: str) -> Tensor:
    """Return each element's keep probability; a row of one element has the density itself."""
    import torch

    columns = delta.shape[-1] if delta.dim() else 1
    size = delta.abs().reshape(1, -1) if rank_by == "tensor" else delta.abs().reshape(-1, columns)
    if rank_by == "value":
        least, most = size.aminmax(dim=1, keepdim=True)
        share = (size - least) / (most - least + 1e-7)
    elif size.shape[1] == 1:
        share = torch.full_like(size, 0.5)
    else:
        ascending = torch.argsort(size, dim=1, stable=True)
        share = torch.argsort(ascending, dim=1).double() / (size.shape[1] - 1)
    return (density - half + 2 * half * share).reshape(delta.shape)


def dropped_oracle(delta: Tensor, params: Params, context: TensorContext) -> Tensor:
    """Return [K, ...]: deltas with changes dropped and the rest rescaled."""
    import torch

    keys = context.keys("drop")
    sparse = []
    for k, (d, density) in enumerate(zip(delta, params.density, strict=True)):
        mask = given_mask(context, k, d)
        inside = 0 < density < 1 and d.numel() > 0
        used = torch.ones_like(d)
        if inside:
            half = params.epsilon[k] if params.window[k] is None else params.window[k] / 2
            used = probability_oracle(d, density, half, params.rank_by)
        if mask is None and inside:
            mask, used = ranked_keep_draw(keys[k], used)
        elif mask is None:
            mask = torch.full(d.shape, density >= 1)
        kept = torch.where(mask, d, 0.0)
        if params.rescale and params.rescale_mode == "inverse_keep":
            kept = torch.where(mask, kept / used, 0.0)
        elif params.rescale and density < 1:
            kept = norm_matched(d, kept, params.rescale_mode)
        sparse.append(kept)
    return torch.stack(sparse)


@della.oracle
def della_oracle(
    base: Tensor, experts: Sequence[Tensor], params: Params, context: TensorContext
) -> Tensor:
    """The elected sum in float64, with the masks of `context.given` or drawn by an own Philox."""
    return base + consensus_sum(dropped_oracle(deltas_of(base, experts), params, context), params)


@della_linear.oracle
def della_linear_oracle(
    base: Tensor, experts: Sequence[Tensor], params: Params, context: TensorContext
) -> Tensor:
    """The sum in float64, with the masks of `context.given` or drawn by an own Philox."""
    return base + weighted_sum(dropped_oracle(deltas_of(base, experts), params, context), params)
