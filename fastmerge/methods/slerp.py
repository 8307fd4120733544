"""SLERP: turn from the base towards one other model along the arc between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastmerge.methods.deltas import per_expert
from fastmerge.registry import REQUIRED, Param, Params, Recipe, Scope, TensorContext, method
from fastmerge.stages import Gram, Walk

if TYPE_CHECKING:
    from torch import Tensor

#: Beyond this |cosine| the arc is taken for straight; a norm up to SMALLEST_NORM counts as 1.
STRAIGHT = 0.9995
SMALLEST_NORM = 1e-8


@method(
    "slerp",
    title="SLERP",
    summary="spherical interpolation between the base and one model",
    paper="https://en.wikipedia.org/wiki/Slerp",
    base="required",
    base_is_operand=True,
    params=(Param("t", REQUIRED, "0 is the base, 1 the other model"),),
    n_inputs=(2, 2),
    on_few="copy_single",
    scope=Scope.TENSOR,
)
def slerp(params: Params, context: TensorContext) -> Recipe:
    """out = sin((1-t) theta)/sin(theta) * base + sin(t theta)/sin(theta) * expert.

    theta is the angle between the two as flat vectors. They are not normalised: their lengths are
    interpolated by the same coefficients.
    """
    gram = (yield Gram(delta=False))[:, :, 0]
    norms = [math.sqrt(gram[k, k]) for k in range(2)]
    a, b = (norm if norm > SMALLEST_NORM else 1.0 for norm in norms)
    cosine = min(max(float(gram[0, 1]) / (a * b), -1.0), 1.0)
    t = params.t
    if abs(cosine) > STRAIGHT:
        return Walk(per_expert([1 - t, t]), add_base=False)
    theta = math.acos(cosine)
    parts = [math.sin((1 - t) * theta), math.sin(t * theta)]
    return Walk(per_expert([p / math.sin(theta) for p in parts]), add_base=False)


@slerp.oracle
def slerp_oracle(
    base: Tensor | None, experts: Sequence[Tensor], params: Params, context: TensorContext
) -> Tensor:
    """The interpolation in float64; experts are the base and the other model."""
    import torch

    first, second = experts
    units = []
    for vector in (first, second):
        norm = torch.linalg.vector_norm(vector)
        units.append(vector / norm if norm > 1e-8 else vector)
    cosine = (units[0] * units[1]).sum().clamp(-1, 1)
    if cosine.abs() > 0.9995:
        return torch.lerp(first, second, params.t)
    theta = torch.arccos(cosine)
    turned = torch.sin((1 - params.t) * theta) * first + torch.sin(params.t * theta) * second
    return turned / torch.sin(theta)
