"""What methods of scope MATRIX share: which tensors they take for matrices, and what becomes of the others.

A tensor is decomposed where it has two dimensions and no rule takes it out: embeddings, output heads
and position tables have rows that are tokens, not outputs of a layer; kernels of convolutions have
more dimensions. What is not decomposed is averaged: out = base + lambda * mean_k(weight_k * delta_k).
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from fastmerge.errors import RecipeError
from fastmerge.linalg import EPS
from fastmerge.methods.deltas import per_expert
from fastmerge.registry import Cost, Param, Params, Scope, TensorContext
from fastmerge.stages import Combine, Deltas, Walk

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT = Param("weight", 1.0, "factor of the expert's delta before anything else", scope="expert")
LAMBDA = Param("lambda", 1.0, "scale of the merged delta")

#: Embeddings of tokens and positions, output heads, projections of texts.
TABLES = re.compile(
    r"(^|[._])(embed\w*|\w*embeddings?|wte|wpe|lm_head|head|classifier|score|text_projection|output)\.weight$"
    r"|(^|[._])(position_ids|class_embedding|position_embedding|positional_embedding|text_projection)$"
)

POLICY = (
    Param(
        "tables",
        "mean",
        "of embeddings, output heads and position tables: averaged, or decomposed as others are",
        kind=str,
        choices=("mean", "matrix"),
    ),
    Param(
        "conv",
        "mean",
        "kernels with more than two dimensions: averaged, or decomposed as [out, in * height * width]",
        kind=str,
        choices=("mean", "flatten"),
    ),
    Param(
        "exclude", None, "regular expression: tensors whose names it finds are averaged", kind=str
    ),
)

MODE = Param(
    "mode",
    "stable",
    "stable leaves out directions that are rounding noise; compat keeps them, as the authors' code does",
    kind=str,
    choices=("stable", "compat"),
)


def shape_of(params: Params, context: TensorContext) -> tuple[int, int] | None:
    """Return the shape of the matrix that a tensor is taken for, or None: it is averaged."""
    shape = context.shape
    if len(shape) < 2 or min(shape) == 0:
        return None
    if len(shape) > 2 and params.conv == "mean":
        return None
    if params.tables == "mean" and TABLES.search(context.name):
        return None
    if params.exclude is not None and _pattern(params.exclude).search(context.name):
        return None
    return shape[0], math.prod(shape[1:])


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise RecipeError(f"exclude is not a regular expression: {text!r} ({error})") from None


def scope_of(params: Params, context: TensorContext) -> Scope:
    """Return MATRIX for what is decomposed, ELEMENT for the rest."""
    return Scope.ELEMENT if shape_of(params, context) is None else Scope.MATRIX


def mean_walk(params: Params) -> Walk:
    """Return the walk of what is not decomposed."""
    n_experts = len(params.weight)
    combine = Combine(divide_by="constant", divisor=float(n_experts), lambda_=params.lambda_)
    return Walk(per_expert(params.weight), combine=combine)


def sum_of(deltas: Deltas, weight: Sequence[float]) -> Tensor:
    """Return sum_k weight_k * delta_k, one delta in memory at a time."""
    total = deltas[0].mul_(weight[0])
    for k in range(1, len(deltas)):
        total.add_(deltas[k], alpha=weight[k])
    return total


def matrix_cost(params: Params, context: TensorContext, blocks: float, flops: float) -> Cost:
    """Return the cost of a matrix [m, n], r the shorter side.

    blocks: how many matrices of its size, in the compute type, there are at a time, beside four r x r
    in float64.
    flops: in units of m n r.
    """
    shape = shape_of(params, context)
    if shape is None:
        return Cost(0, 0.0)
    m, n = shape
    r = min(m, n)
    return Cost(int(blocks * 4 * m * n) + 4 * 8 * r * r, flops * m * n * r)


# ---- oracles --------------------------------------------------------------------------------------


def mean_oracle(base: Tensor, experts: Sequence[Tensor], params: Params) -> Tensor:
    """The average in float64."""
    total = added(w * (e - base) for w, e in zip(params.weight, experts, strict=True))
    return on_base(base, total / len(experts), params)


def on_base(base: Tensor, merged: Tensor, params: Params) -> Tensor:
    """Return base + lambda * merged."""
    return base + merged.reshape(base.shape) * float(params.lambda_)


def polar_oracle(a: Tensor, stable: bool) -> Tensor:
    """U V^T by a full decomposition; stable: of what is more than rounding in float32."""
    import torch

    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    kept = int((s > max(a.shape) * EPS[4] * s.max()).sum()) if stable and len(s) else len(s)
    product: Tensor = u[:, :kept] @ vh[:kept]
    return product


def added(tensors: Iterable[Tensor]) -> Tensor:
    """Return the sum of at least one tensor."""
    return functools.reduce(operator.add, tensors)
