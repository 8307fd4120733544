"""What the recipes of the delta family share: parameters, rescale factors, the ways to combine.

out = base + lambda * (sum_k weight_k * factor_k * kept(expert_k - base)) / divisor
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Sequence
from typing import Any, Literal

import numpy as np

from fastmerge.registry import REQUIRED, Param, Params, Recipe, RecipeFunction, TensorContext
from fastmerge.stages import F64, Combine, Copy, Elect, Keep, MomentResult, Moments, Statistic, Walk

#: Norms and divisors below these are not divided by.
SMALLEST_NORM = 1e-7
SMALLEST_DIVISOR = 1e-8

_MOMENT_OF: dict[str, Literal["abs", "square", "max"]] = {
    "l1": "abs",
    "l2": "square",
    "linf": "max",
}

WEIGHT = Param("weight", REQUIRED, "coefficient of the expert's delta", scope="expert")
GAMMA = Param(
    "gamma", 0.01, "removed fraction of largest changes", scope="expert", low=0.0, high=1.0
)
RESCALE_MODE = Param(
    "rescale_mode",
    "l1",
    "what rescale restores: a norm of the tensor's delta, or each survivor by 1/keep probability",
    kind=str,
    choices=("l1", "l2", "linf", "inverse_keep"),
)


def delta_params(*, normalize: bool, rescale: bool, density: str) -> tuple[Param, ...]:
    """Return the parameters that every delta method of mergekit 0.1.5 has; `density` is its doc."""
    return (
        WEIGHT,
        Param("density", 1.0, density, scope="expert", low=0.0, high=1.0),
        Param("normalize", normalize, "divide by the weights that took part", kind=bool),
        Param("rescale", rescale, "scale survivors up for what was removed", kind=bool),
        Param("lambda", 1.0, "scale of the merged delta"),
        Param("int8_mask", False, "accepted for mergekit's sake; changes nothing", kind=bool),
    )


def without_statistics(recipe: Callable[[Params, TensorContext], Walk | Copy]) -> RecipeFunction:
    """Make a recipe of a plain function: a generator that asks for nothing."""

    @functools.wraps(recipe)
    def generator(params: Params, context: TensorContext) -> Recipe:
        yield from ()
        return recipe(params, context)

    return generator


def per_expert(values: Sequence[float] | F64) -> F64:
    """Return [K, 1] float64: one coefficient per expert for the whole tensor."""
    return np.asarray(values, np.float64).reshape(-1, 1)


def norm_factors(
    keep: Keep,
    density: Sequence[float],
    norm: str = "l1",
    scope: Literal["tensor", "model"] = "tensor",
    always: bool = False,
) -> Generator[Statistic, Any, F64]:
    """Return [K] float64: norm(delta) / norm(kept delta); 1 for whole experts and tiny norms.

    `factors = yield from norm_factors(...)`. `always` asks even where every expert is whole: recipes
    of a merge of model scope must ask alike for all tensors.
    """
    whole = np.asarray(density, np.float64) >= 1
    if bool(whole.all()) and not always:
        return np.ones(len(density))
    moments: MomentResult = yield Moments(_MOMENT_OF[norm], keep, scope)
    before, after = moments.all, moments.kept
    if norm == "l2":
        before, after = np.sqrt(before), np.sqrt(after)
    skip = whole | (before < SMALLEST_NORM) | (after < SMALLEST_NORM)
    return np.where(skip, 1.0, before / np.where(skip, 1.0, after))


def plain_sum(params: Params) -> Combine:
    """Return the combination without election: a sum, over that of the weights if `normalize`."""
    total = float(sum(params.weight))
    if not params.normalize or abs(total) < SMALLEST_DIVISOR:
        return Combine(lambda_=params.lambda_)
    return Combine(divide_by="constant", divisor=total, lambda_=params.lambda_)


def elected_sum(params: Params) -> Combine:
    """Return the combination after an election: divided by the elected weights if `normalize`."""
    if not params.normalize:
        return Combine(lambda_=params.lambda_)
    return Combine(divide_by="weight", divisor_weight=params.weight, lambda_=params.lambda_)


def sparse_walk(
    params: Params, keep: Keep, elects: bool, norm: str | None
) -> Generator[Statistic, Any, Walk]:
    """Return the walk of sparsified deltas: `norm` restored (None: not), then summed or elected."""
    factor: F64 = np.ones(len(params.weight))
    if norm is not None:
        factor = yield from norm_factors(keep, params.density, norm)
    return Walk(
        per_expert(np.asarray(params.weight, np.float64) * factor),
        keep=keep,
        elect=Elect() if elects else None,
        combine=elected_sum(params) if elects else plain_sum(params),
    )
