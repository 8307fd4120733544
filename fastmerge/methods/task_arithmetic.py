"""Task arithmetic: add the weighted sum of task vectors to the base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastmerge.methods.deltas import delta_params, per_expert, plain_sum, without_statistics
from fastmerge.methods.oracle_deltas import deltas_of, weighted_sum
from fastmerge.registry import Params, TensorContext, method
from fastmerge.stages import Walk

if TYPE_CHECKING:
    from torch import Tensor


@method(
    "task_arithmetic",
    title="Task Arithmetic",
    summary="base plus the weighted sum of task vectors",
    paper="arXiv:2212.04089",
    base="required",
    # density and rescale are mergekit's and unused there too.
    params=delta_params(normalize=False, rescale=False, density="accepted; nothing is trimmed"),
    presets={"paper": {"weight": 1.0, "normalize": False}},
)
@without_statistics
def task_arithmetic(params: Params, context: TensorContext) -> Walk:
    """out = base + lambda * sum_k weight_k * delta_k, divided by sum_k weight_k if `normalize`."""
    return Walk(per_expert(params.weight), combine=plain_sum(params))


@task_arithmetic.oracle
def task_arithmetic_oracle(
    base: Tensor, experts: Sequence[Tensor], params: Params, context: TensorContext
) -> Tensor:
    """The sum in float64."""
    return base + weighted_sum(deltas_of(base, experts), params)
