"""DARE: drop changes at random, rescale the rest, then sum (linear) or elect a sign (ties)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastmerge.methods.deltas import RESCALE_MODE, delta_params, sparse_walk
from fastmerge.methods.oracle_deltas import (
    consensus_sum,
    deltas_of,
    given_mask,
    norm_matched,
    weighted_sum,
)
from fastmerge.methods.oracle_draws import keep_draw
from fastmerge.registry import Params, Recipe, Scope, TensorContext, method
from fastmerge.stages import Drop, Keep

if TYPE_CHECKING:
    from torch import Tensor

_PAPER = "arXiv:2311.03099"
_PARAMS = (
    *delta_params(normalize=False, rescale=True, density="probability of keeping a change"),
    RESCALE_MODE,
)


def _scope(params: Params, context: TensorContext) -> Scope:
    matches_norm = params.rescale and params.rescale_mode != "inverse_keep"
    return Scope.TENSOR if matches_norm else Scope.ELEMENT


def _recipe(params: Params, context: TensorContext, elects: bool) -> Recipe:
    inverse = params.rescale and params.rescale_mode == "inverse_keep"
    drop = Drop(params.density, context.keys("drop"), rescale=inverse)
    keep = Keep(drop=drop, given=context.given)
    norm = params.rescale_mode if params.rescale and not inverse else None
    return (yield from sparse_walk(params, keep, elects, norm))


@method(
    "dare_linear",
    title="DARE",
    summary="drops changes at random, rescales the rest, sums them",
    paper=_PAPER,
    base="required",
    params=_PARAMS,
    scope=_scope,
    presets={"paper": {"weight": 1.0, "rescale": True, "rescale_mode": "inverse_keep"}},
)
def dare_linear(params: Params, context: TensorContext) -> Recipe:
    """out = base + lambda * sum_k weight_k * factor_k * mask_k * delta_k.

    mask_k ~ Bernoulli(density_k) per element; factor_k restores a norm or is 1/density_k.
    """
    return (yield from _recipe(params, context, elects=False))


@method(
    "dare_ties",
    title="DARE with TIES election",
    summary="drops changes at random, rescales the rest, merges those of the elected sign",
    paper=_PAPER,
    base="required",
    params=_PARAMS,
    scope=_scope,
    # The authors' second trim is a merge of its own: dare_linear for each expert, then ties.
    presets={
        "paper": {
            "weight": 1.0,
            "normalize": True,
            "rescale": True,
            "rescale_mode": "inverse_keep",
        }
    },
)
def dare_ties(params: Params, context: TensorContext) -> Recipe:
    """As dare_linear, over the experts whose weighted change has the sign of the sum."""
    return (yield from _recipe(params, context, elects=True))


# ---- oracle --------------------------------------------------------------------------------------


def dropped_oracle(delta: Tensor, params: Params, context: TensorContext) -> Tensor:
    """Return [K, ...]: deltas with changes dropped and the rest rescaled."""
    import torch

    keys = context.keys("drop")
    sparse = []
    for k, (d, density) in enumerate(zip(delta, params.density, strict=True)):
        used = density
        mask = given_mask(context, k, d)
        if mask is None and 0 < density < 1:
            drawn, used = keep_draw(keys[k], d.numel(), density)
            mask = drawn.reshape(d.shape)
        elif mask is None:
            mask = torch.full(d.shape, density >= 1)
        kept = torch.where(mask, d, 0.0)
        if params.rescale and params.rescale_mode == "inverse_keep":
            kept = kept / used if 0 < density < 1 else kept
        elif params.rescale and density < 1:
            kept = norm_matched(d, kept, params.rescale_mode)
        sparse.append(kept)
    return torch.stack(sparse)


@dare_linear.oracle
def dare_linear_oracle(
    base: Tensor, experts: Sequence[Tensor], params: Params, context: TensorContext
) -> Tensor:
    """The sum in float64, with the masks of `context.given` or drawn by an own Philox."""
    return base + weighted_sum(dropped_oracle(deltas_of(base, experts), params, context), params)


@dare_ties.oracle
def dare_ties_oracle(
    base: Tensor, experts: Sequence[Tensor], params: Params, context: TensorContext
) -> Tensor:
    """The elected sum in float64, with the masks of `context.given` or drawn by an own Philox."""
    return base + consensus_sum(dropped_oracle(deltas_of(base, experts), params, context), params)
