"""Passthrough: one model's tensor as it is, or scaled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastmerge.methods.deltas import per_expert, without_statistics
from fastmerge.registry import Param, Params, TensorContext, method
from fastmerge.stages import Copy, Walk

if TYPE_CHECKING:
    from torch import Tensor


@method(
    "passthrough",
    title="Passthrough",
    summary="copies one model's tensor, scaled if asked",
    paper="",
    base="ignored",
    base_is_operand=True,
    params=(Param("scale", None, "factor of the tensor; null copies it", scope="input"),),
    n_inputs=(1, 1),
)
@without_statistics
def passthrough(params: Params, context: TensorContext) -> Walk | Copy:
    """out = expert, or scale * expert."""
    scale = params.scale[0]
    return Copy(0) if scale is None else Walk(per_expert([scale]), add_base=False)


@passthrough.oracle
def passthrough_oracle(
    base: Tensor | None, experts: Sequence[Tensor], params: Params, context: TensorContext
) -> Tensor:
    """The tensor times `scale`."""
    return experts[0] if params.scale[0] is None else params.scale[0] * experts[0]
