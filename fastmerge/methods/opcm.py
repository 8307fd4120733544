"""OPCM: experts one after the other, each without what lies along the main directions of those before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastmerge.linalg import EPS, inner, spectrum
from fastmerge.methods.matrices import LAMBDA, POLICY, shape_of
from fastmerge.registry import Cost, Param, Params, Recipe, Scope, TensorContext, method
from fastmerge.stages import Add, Deltas, Joined, Matrices

if TYPE_CHECKING:
    from torch import Tensor


def _cost(params: Params, context: TensorContext) -> Cost:
    shape = shape_of(params, context)
    if shape is None:
        return Cost(3 * 4 * context.n, 0.0)
    m, n = shape
    r = min(shape)
    return Cost(6 * 4 * m * n + 4 * 8 * r * r, 24.0 * (context.n_experts - 1) * m * n * r)


@method(
    "opcm",
    title="OPCM",
    summary="adds experts one by one, each without its part along the main directions of those before",
    paper="arXiv:2501.09522",
    base="required",
    params=(
        LAMBDA,
        Param(
            "alpha",
            0.5,
            "share of the sum of singular values that the protected directions have at most",
            low=0.0,
            high=1.0,
        ),
        Param(
            "merged_experts",
            0,
            "the first model is such a merge of so many experts; 0: it is an expert like the others",
            kind=int,
            low=0,
        ),
        Param("merged_lambda", 1.0, "what that merge's deltas were divided by", low=0.0),
        *(rule for rule in POLICY if rule.name != "fused"),
    ),
    scope=Scope.MATRIX,
    cost=_cost,
    joins=lambda params: True,
)
def opcm(params: Params, context: TensorContext) -> Recipe:
    """out = base + lambda * Y * N / ||Y||, Y = Y_K, in the order of the models.

    Y_1 = delta_1; Y_t = Y_{t-1} + P_t(delta_t). With U diag(s) V^T = Y_{t-1} and the leading directions that
    have at most alpha of sum(s), P_t takes from a matrix its part within the leading left and right
    directions, and every <u_i, delta_t v_i>; other tensors are added as they are. ||Y|| is over the model, N
    the mean of the experts' ||delta_t|| over it.
    """
    shape = shape_of(params, context)
    deltas: Deltas = yield Matrices(shape or (1, context.n))
    total, squares = _accumulated(deltas, params, decompose=shape is not None)
    answer: Mapping[str, Any] = yield Joined(
        (squares, inner(total, total)), lambda values: _joined(values, params)
    )
    return Add(total, params.lambda_ * answer["scale"])


def _accumulated(deltas: Deltas, params: Params, decompose: bool) -> tuple[Tensor, list[float]]:
    """Return Y, and each delta's square."""
    total = deltas[0]
    squares = [inner(total, total)]
    if params.merged_experts:
        total = total * params.merged_lambda
    for k in range(1, len(deltas)):
        delta = deltas[k]
        squares.append(inner(delta, delta))
        total = total + (apart_from(total, delta, params.alpha) if decompose else delta)
    return total, squares


def apart_from(total: Tensor, delta: Tensor, alpha: float) -> Tensor:
    """Return delta - U_p U_p^T delta V_p V_p^T - U diag(e) V^T.

    p: the leading directions; e_i = u_i^T delta v_i beyond them, 0 for those. Directions of `total` that are
    rounding noise are none.
    """
    whole = spectrum(total)
    u, s, vh = whole.top(whole.rank())
    leading = _leading(s, alpha)
    u_p, v_p = u[:, :leading], vh[:leading]
    part = (u_p @ (u_p.mT @ delta @ v_p.mT)) @ v_p
    left = u[:, leading:]
    own = ((left.mT @ delta) * vh[leading:]).sum(1)
    return delta - part - (left * own) @ vh[leading:]


def _leading(s: Tensor, alpha: float) -> int:
    """Return how many of the largest values sum to at most alpha of all."""
    shares = s.double().cumsum(0)
    return int((shares <= alpha * shares[-1]).sum()) if len(s) else 0


def _joined(values: Sequence[tuple[list[float], float]], params: Params) -> dict[str, Any]:
    """Return the scale of Y, and what a later merge needs to go on from this one."""
    norms = [math.sqrt(sum(column)) for column in zip(*(v[0] for v in values), strict=True)]
    before = params.merged_experts or 1
    mean = (before * norms[0] + sum(norms[1:])) / (before + len(norms) - 1)
    norm = math.sqrt(sum(v[1] for v in values))
    return {
        "scale": mean / norm if norm else 0.0,
        "merged_experts": before + len(norms) - 1,
        "merged_lambda": norm / mean if mean else 1.0,
    }


@opcm.oracle
def opcm_oracle(
    base: Tensor, experts: Sequence[Tensor], params: Params, context: TensorContext
) -> Tensor:
    """`model_oracle` of a model that is this tensor alone."""
    models = [{context.name: expert} for expert in experts]
    return model_oracle({context.name: base}, models, params, [context])[context.name]


def model_oracle(
    base: Mapping[str, Tensor],
    experts: Sequence[Mapping[str, Tensor]],
    params: Params,
    contexts: Sequence[TensorContext],
) -> dict[str, Tensor]:
    """The authors' loop over a whole model in float64."""
    shapes = {c.name: shape_of(params, c) for c in contexts}
    deltas = [
        {n: (e[n] - base[n]).reshape(shape or (1, -1)) for n, shape in shapes.items()}
        for e in experts
    ]

    def norm(model: Mapping[str, Tensor]) -> float:
        return math.sqrt(sum(float((x * x).sum()) for x in model.values()))

    merged, scale = deltas[0], params.merged_lambda if params.merged_experts else 1.0
    norms = [norm(deltas[0])] * (params.merged_experts or 1)
    for delta in deltas[1:]:
        total = {
            n: scale * merged[n] + (_projected(merged[n], d, params) if shapes[n] else d)
            for n, d in delta.items()
        }
        norms.append(norm(delta))
        mean = sum(norms) / len(norms)
        scale = norm(total) / mean if mean else 1.0
        merged = {n: x / scale if scale else x for n, x in total.items()}
    return {n: base[n] + x.reshape(base[n].shape) * params.lambda_ for n, x in merged.items()}


def _projected(merged: Tensor, delta: Tensor, params: Params) -> Tensor:
    """U P V^T with what is taken from P = U^T delta V set to zero, and all beside U and V."""
    import torch

    if not bool(merged.any()):
        return delta
    u, s, vh = torch.linalg.svd(merged, full_matrices=False)
    kept = int((s > max(merged.shape) * EPS[4] * s[0]).sum())
    u, s, vh = u[:, :kept], s[:kept], vh[:kept]
    coefficients = u.mT @ delta @ vh.mT
    removed = torch.diag(coefficients.diagonal())
    split = int((s.cumsum(0) / s.sum() <= params.alpha).sum())
    removed[:split, :split] = coefficients[:split, :split]
    projected: Tensor = delta - u @ removed @ vh
    return projected
