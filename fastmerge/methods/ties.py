"""TIES: trim small changes, elect one sign per coordinate, merge the experts that agree.

Defaults are mergekit's; the parameters after `int8_mask` select the rules of the authors' code and
of its ports.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmerge.methods.deltas import delta_params, norm_factors, per_expert
from fastmerge.methods.oracle_deltas import deltas_of, largest_first, norm_matched, spread
from fastmerge.registry import Param, Params, Recipe, Scope, TensorContext, method
from fastmerge.stages import (
    F64,
    Combine,
    Cut,
    Elect,
    Keep,
    MomentResult,
    Moments,
    OrderStatistic,
    SignBalance,
    Statistic,
    Trim,
    Walk,
)

if TYPE_CHECKING:
    from torch import Tensor


def _choice(name: str, choices: tuple[str, ...], doc: str) -> Param:
    """Return a parameter whose default is the first choice."""
    return Param(name, choices[0], doc, kind=str, choices=choices)


_RULES = (
    _choice("scope", ("tensor", "model"), "what density and norms are over"),
    _choice(
        "count_rule",
        ("exact", "threshold", "threshold_plus_one", "mask_rate"),
        "exact: k = max(1, int(density n)), lowest index wins ties; threshold: and all ties; "
        "threshold_plus_one: k = int(density n) + 1 and all ties (authors); "
        "mask_rate: k = n - int((1 - density) n) + 1 and all ties (MergeLM)",
    ),
    _choice(
        "elect",
        ("mass", "normmass", "normfrac", "count"),
        "what votes: changes, signed shares of the square sum, the largest such share, signs",
    ),
    _choice(
        "elect_on",
        ("weighted", "unweighted"),
        "mass of changes times weight, or of the kept changes alone",
    ),
    _choice(
        "zero_sign",
        ("positive", "global_majority", "tensor_majority"),
        "what an exact zero vote elects: plus, or the more frequent sign of model or tensor",
    ),
    _choice("zero_selects", ("negative", "none"), "what is merged when that majority is zero too"),
    _choice(
        "merge_func",
        ("dis-mean", "dis-sum", "dis-max"),
        "of the agreeing experts: sum divided as `divide_by` says, sum, or the largest change",
    ),
    _choice(
        "divide_by", ("weight", "count", "none"), "what dis-mean divides by, if `normalize` is on"
    ),
)


def _scope(params: Params, context: TensorContext) -> Scope:
    over_model = params.scope == "model" or params.zero_sign == "global_majority"
    return Scope.MODEL if over_model else Scope.TENSOR


@method(
    "ties",
    title="TIES",
    summary="trims small changes, elects a sign, merges the experts that agree",
    paper="arXiv:2306.01708",
    base="required",
    params=(
        *delta_params(normalize=True, rescale=False, density="kept fraction of the expert's delta"),
        *_RULES,
    ),
    scope=_scope,
    presets={
        "paper": {
            "weight": 1.0,
            "density": 0.2,
            "scope": "model",
            "count_rule": "threshold_plus_one",
            "elect_on": "unweighted",
            "zero_sign": "global_majority",
            "divide_by": "count",
        }
    },
)
def ties(params: Params, context: TensorContext) -> Recipe:
    """out = base + lambda * sum_elected(weight_k * trimmed_k) / sum_elected(weight_k)."""
    n_experts = context.n_experts
    keep = Keep(trim=(yield from _trim(params, context)))
    factor: F64 = np.ones(n_experts)
    if params.rescale:
        factor = yield from norm_factors(
            keep, params.density, "l1", params.scope, always=_scope(params, context) is Scope.MODEL
        )
    coefficient = per_expert(np.asarray(params.weight, np.float64) * factor)
    elect = yield from _election(params, keep, coefficient)
    return Walk(coefficient, keep=keep, elect=elect, combine=_combine(params, n_experts))


def _trim(params: Params, context: TensorContext) -> Generator[Statistic, Any, Trim | None]:
    over_model = params.scope == "model"
    # Recipes of a merge of model scope must ask alike for all tensors.
    if _scope(params, context) is Scope.TENSOR and all(density >= 1 for density in params.density):
        return None
    n = context.n_model if over_model else context.n
    ranks = [[_kept_count(density, n, params.count_rule)] for density in params.density]
    cuts: list[Cut] = yield OrderStatistic(
        ranks, scope=params.scope, all_ties=params.count_rule != "exact"
    )
    return Trim(cuts[0])


def _kept_count(density: float, n: int, rule: str) -> int:
    if density >= 1:
        return n
    if density <= 0:
        return 0
    if rule == "threshold_plus_one":
        return int(n * density) + 1
    if rule == "mask_rate":
        return n - int(n * (1 - density)) + 1
    return max(1, int(density * n))


def _election(params: Params, keep: Keep, coefficient: F64) -> Generator[Statistic, Any, Elect]:
    unweighted = params.elect == "mass" and params.elect_on == "unweighted"
    elect = Elect(by="delta" if unweighted else params.elect)
    if params.elect in ("normmass", "normfrac"):
        squares: MomentResult = yield Moments("square", keep, params.scope)
        square = squares.kept
        scale = np.where(square > 0, 1 / np.where(square > 0, square, 1.0), 0.0)
        elect = replace(elect, vote_scale=scale.tolist())
    if params.zero_sign == "positive":
        return elect
    over_model = params.zero_sign == "global_majority"
    balance: int = yield SignBalance(
        keep, coefficient, elect, scope="model" if over_model else "tensor"
    )
    if balance:
        return replace(elect, on_zero="plus" if balance > 0 else "minus")
    # dis-max multiplies the largest change by the elected sign, which is zero here.
    nothing = params.zero_selects == "none" or params.merge_func == "dis-max"
    return replace(elect, on_zero="none" if nothing else "minus")


def _combine(params: Params, n_experts: int) -> Combine:
    if params.merge_func == "dis-max":
        return Combine(by="max", lambda_=params.lambda_)
    if params.merge_func == "dis-sum" or not params.normalize or params.divide_by == "none":
        return Combine(lambda_=params.lambda_)
    weight = params.weight if params.divide_by == "weight" else [1.0] * n_experts
    return Combine(divide_by="weight", divisor_weight=weight, lambda_=params.lambda_)


# ---- oracle --------------------------------------------------------------------------------------


def trimmed_oracle(delta: Tensor, params: Params) -> Tensor:
    """Return [K, ...] bool: what is kept of each expert's delta; `delta` is the whole scope."""
    import torch

    masks = []
    for d, density in zip(delta, params.density, strict=True):
        size = d.abs().flatten()
        n = len(size)
        if density >= 1 or n == 0:
            mask = torch.ones(n, dtype=torch.bool)
        elif density <= 0:
            mask = torch.zeros(n, dtype=torch.bool)
        elif params.count_rule == "exact":
            mask = largest_first(size) < max(1, int(density * n))
        else:
            mask = size >= _threshold(size, density, params.count_rule)
        masks.append(mask.reshape(d.shape))
    return torch.stack(masks)


def _threshold(size: Tensor, density: float, rule: str) -> Tensor:
    """Return the smallest kept magnitude, counted from the smallest as the authors' code does."""
    n = len(size)
    if rule == "threshold":
        smallest = n - max(1, int(density * n)) + 1
    elif rule == "threshold_plus_one":
        smallest = n - int(n * density)
    else:
        smallest = int(n * (1 - density))
    return size.kthvalue(smallest).values if smallest > 0 else size.min()


def votes_oracle(kept: Tensor, value: Tensor, params: Params) -> Tensor:
    """Return [K, ...]: each expert's vote on each coordinate; only the sign of the sum counts.

    kept: trimmed deltas. value: the same, weighted.
    """
    if params.elect == "count":
        return kept.sign()
    if params.elect == "mass":
        return kept if params.elect_on == "unweighted" else value
    square = (kept * kept).reshape(len(kept), -1).sum(1)
    share = kept * kept / spread([float(s) or 1.0 for s in square], kept)
    if params.elect == "normmass":
        return kept.sign() * share
    largest = share.argmax(0, keepdim=True)
    return kept.new_zeros(kept.shape).scatter(0, largest, kept.sign().gather(0, largest))


def signs_oracle(vote: Tensor, params: Params) -> Tensor:
    """Return the elected sign of each coordinate, -1, 0 or 1; `vote` is the whole scope."""
    sign = vote.sum(0).sign()
    majority = 1.0 if params.zero_sign == "positive" else float(sign.sum().sign())
    sign[sign == 0] = majority
    return sign


@ties.oracle
def ties_oracle(
    base: Tensor, experts: Sequence[Tensor], params: Params, context: TensorContext
) -> Tensor:
    """The algorithm in float64. The tensor is the scope: for a model, pass it flattened."""
    import torch

    delta = deltas_of(base, experts)
    kept = delta * trimmed_oracle(delta, params)
    weight = spread(params.weight, delta)
    scaled = kept
    if params.rescale:
        scaled = torch.stack(
            [
                v if density >= 1 else norm_matched(d, v)
                for d, v, density in zip(delta, kept, params.density, strict=True)
            ]
        )
    value = weight * scaled
    vote = votes_oracle(kept, value, params)
    sign = signs_oracle(vote, params)
    # Who is with the elected sign is told by the vote, whose sign a weight may have turned.
    camp = vote if params.elect != "normfrac" else kept
    agrees = torch.where(sign > 0, camp > 0, camp < 0)
    if params.zero_selects == "none" or params.merge_func == "dis-max":
        agrees = agrees & (sign != 0)
    members = value * agrees
    if params.merge_func == "dis-max":
        merged = members.gather(0, members.abs().argmax(0, keepdim=True))[0]
    else:
        merged = members.sum(0)
        if params.merge_func == "dis-mean" and params.normalize and params.divide_by != "none":
            each = weight if params.divide_by == "weight" else torch.ones_like(weight)
            total = (each * agrees).sum(0)
            merged = merged / torch.where(total == 0, 1.0, total)
    return base + merged * float(params.lambda_)
