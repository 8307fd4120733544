"""Linear: the weighted average of whole models, the base included if it is listed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastmerge.errors import RecipeError
from fastmerge.methods.deltas import per_expert, without_statistics
from fastmerge.registry import REQUIRED, Param, Params, TensorContext, method
from fastmerge.stages import Combine, Walk

if TYPE_CHECKING:
    from torch import Tensor


@method(
    "linear",
    title="Linear",
    summary="weighted average of the models",
    paper="arXiv:2203.05482",
    base="ignored",
    base_is_operand=True,
    params=(
        Param("weight", REQUIRED, "coefficient of the model", scope="input"),
        Param("normalize", True, "divide by the sum of weights", kind=bool),
    ),
    presets={"paper": {"weight": 1.0, "normalize": True}},
)
@without_statistics
def linear(params: Params, context: TensorContext) -> Walk:
    """out = sum_k weight_k * expert_k / sum_k weight_k, the division only if `normalize`."""
    combine = Combine()
    if params.normalize:
        total = float(sum(params.weight))
        if total == 0:
            raise RecipeError(
                f"weights of linear sum to 0 for {context.name!r}, got {params.weight}; "
                "change a weight or set normalize: false"
            )
        combine = Combine(divide_by="constant", divisor=total)
    return Walk(per_expert(params.weight), combine=combine, add_base=False)


@linear.oracle
def linear_oracle(
    base: Tensor | None, experts: Sequence[Tensor], params: Params, context: TensorContext
) -> Tensor:
    """The average in float64; experts are all operands, a base among them."""
    import torch

    weight = torch.tensor(params.weight, dtype=torch.float64)
    if params.normalize:
        weight = weight / weight.sum()
    merged: Tensor = torch.tensordot(weight, torch.stack(list(experts)), 1)
    return merged
