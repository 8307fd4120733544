"""LoRE-Merging: a base and low-rank deltas are estimated together from the experts alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastmerge.linalg import spectrum
from fastmerge.methods.matrices import (
    LAMBDA,
    POLICY,
    WEIGHT,
    added,
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


@method(
    "lore",
    title="LoRE-Merging",
    summary="estimates a common base and low-rank deltas by turns, then adds the deltas' average",
    paper="arXiv:2502.10749",
    base="required",
    params=(
        WEIGHT,
        LAMBDA,
        Param("mu", 0.01, "threshold that singular values are shrunk by", low=0.0),
        Param("sweeps", 20, "of the descent by turns", kind=int, low=0),
        *POLICY,
    ),
    scope=scope_of,
    cost=lambda params, context: matrix_cost(
        params,
        context,
        blocks=2.0 * len(params.weight) + 4.0,
        flops=16.0 * len(params.weight) * params.sweeps,
    ),
)
def lore(params: Params, context: TensorContext) -> Recipe:
    """out = theta + lambda * mean_k(weight_k * d_k), theta and d_k by turns from d_k = 0:

    theta = mean_k(expert_k - d_k); d_k = the experts' distances from theta, singular values shrunk by mu.
    The base only says what is small: the result does not depend on it.
    """
    shape = shape_of(params, context)
    if shape is None:
        return mean_walk(params)
    found: Deltas = yield Matrices(shape)
    experts = [found[k] for k in range(len(found))]
    mean = experts[0].clone()
    for e in experts[1:]:
        mean.add_(e)
    mean.div_(len(experts))
    own = [e.new_zeros(e.shape) for e in experts]
    theta = mean
    for _ in range(params.sweeps):
        theta = mean.clone()
        for d in own:
            theta.sub_(d, alpha=1 / len(own))
        for k, e in enumerate(experts):
            own[k] = spectrum(e - theta).mapped(lambda s: (s - params.mu).clamp_min(0))
    out = theta.clone()
    for weight, d in zip(params.weight, own, strict=True):
        out.add_(d, alpha=params.lambda_ * weight / len(own))
    return Add(out)


@lore.oracle
def lore_oracle(
    base: Tensor, experts: Sequence[Tensor], params: Params, context: TensorContext
) -> Tensor:
    """The descent in float64, over whole experts."""
    import torch

    shape = shape_of(params, context)
    if shape is None:
        return mean_oracle(base, experts, params)
    whole = [e.reshape(shape) for e in experts]
    own = [torch.zeros(shape, dtype=torch.float64) for _ in whole]
    theta = added(whole) / len(whole)
    for _ in range(params.sweeps):
        theta = added(e - d for e, d in zip(whole, own, strict=True)) / len(whole)
        for k, e in enumerate(whole):
            u, s, vh = torch.linalg.svd(e - theta, full_matrices=False)
            own[k] = (u * (s - params.mu).clamp_min(0)) @ vh
    mean = added(w * d for w, d in zip(params.weight, own, strict=True)) / len(own)
    return on_base(theta, mean, params).reshape(base.shape)
