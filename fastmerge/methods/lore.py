"""LoRE-Merging: a base and low-rank deltas are estimated together from the experts alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastmerge.linalg import spectrum
from fastmerge.methods.matrices import (
    LAMBDA,
    WEIGHT,
    added,
    matrix_method,
    spectral_oracle,
    weighted_sum,
)
from fastmerge.registry import Param, Params
from fastmerge.stages import Add, Deltas

if TYPE_CHECKING:
    from torch import Tensor


@matrix_method(
    "lore",
    title="LoRE-Merging",
    summary="estimates a common base and low-rank deltas by turns, then adds the deltas' average",
    paper="arXiv:2502.10749",
    params=(
        WEIGHT,
        LAMBDA,
        Param("mu", 0.01, "threshold that singular values are shrunk by", low=0.0),
        Param("sweeps", 20, "of the descent by turns", kind=int, low=0),
    ),
    blocks=lambda n_experts: 2.0 * n_experts + 4.0,
    flops=lambda params, shape: (
        16.0 * len(params.weight) * params.sweeps * shape[0] * shape[1] * min(shape)
    ),
)
def lore(params: Params, deltas: Deltas) -> Add:
    """out = theta + lambda * mean_k(weight_k * d_k), theta and d_k by turns from d_k = 0:

    theta = mean_k(expert_k - d_k); d_k = the experts' distances from theta, singular values shrunk by mu.
    The base only says what is small: the result does not depend on it.
    """
    experts = [deltas[k] for k in range(len(deltas))]
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
def lore_oracle(deltas: Sequence[Tensor], params: Params) -> Tensor:
    """The descent in float64: whose origin does not matter, so that the deltas are whole experts."""
    import torch

    own = [torch.zeros_like(d) for d in deltas]
    theta = added(deltas) / len(deltas)
    for _ in range(params.sweeps):
        theta = added(e - d for e, d in zip(deltas, own, strict=True)) / len(deltas)
        own = [spectral_oracle(e - theta, lambda s: (s - params.mu).clamp_min(0)) for e in deltas]
    return theta + weighted_sum(own, params.weight) * float(params.lambda_ / len(own))
