"""NuSLERP: SLERP between two experts by their weights, on deltas if there is a base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastmerge.errors import RecipeError
from fastmerge.registry import REQUIRED, Param, Params, Recipe, Scope, TensorContext, method
from fastmerge.stages import F64, Axis, Gram, Walk

if TYPE_CHECKING:
    from torch import Tensor

#: A norm is at least this; 1 - cosine^2 up to COLLINEAR is a straight line; weights whose sum is
#: smaller than SMALLEST_TOTAL give the middle.
SMALLEST_NORM = 1e-7
COLLINEAR = 1e-16
SMALLEST_TOTAL = 1e-6


@method(
    "nuslerp",
    title="NuSLERP",
    summary="spherical interpolation between two experts by weight, on deltas if a base is given",
    paper="",
    base="optional",
    params=(
        Param("weight", REQUIRED, "the second's share is t", scope="expert"),
        Param("nuslerp_flatten", True, "one angle for the whole tensor", kind=bool),
        Param(
            "nuslerp_row_wise",
            False,
            "without flatten: one angle per column of the stored matrix, not per row",
            kind=bool,
        ),
    ),
    n_inputs=(2, 2),
    on_few="copy_single",
    scope=Scope.TENSOR,
)
def nuslerp(params: Params, context: TensorContext) -> Recipe:
    """out = [base +] sin((1-t) theta)/sin(theta) * x_1 + sin(t theta)/sin(theta) * x_2 per unit.

    x is the delta if there is a base, else the expert; t = w_2 / (w_1 + w_2).
    """
    first, second = params.weight
    total = first + second
    t = 0.5 if abs(total) < SMALLEST_TOTAL else second / total
    axis = _axis(params, context)
    gram: F64 = yield Gram(delta=context.has_base, axis=axis)
    coefficient = _arc(gram, t)
    return Walk(coefficient, axis=axis, add_base=context.has_base)


def _axis(params: Params, context: TensorContext) -> Axis:
    if params.nuslerp_flatten:
        return Axis.TENSOR
    if not params.nuslerp_row_wise or len(context.shape) < 2:
        return Axis.ROW
    if len(context.shape) > 2:
        raise RecipeError(
            f"nuslerp_row_wise needs a matrix, but {context.name!r} is {list(context.shape)}; "
            "set nuslerp_flatten or drop nuslerp_row_wise for it"
        )
    return Axis.COLUMN


def _arc(gram: F64, t: float) -> F64:
    """Return [2, U] coefficients from [2, 2, U] inner products."""
    a, b = gram[0, 0], gram[1, 1]
    tiny = SMALLEST_NORM**2
    # sqrt(a * b) is exact for equal vectors, so that they are collinear to the last bit.
    norm = np.where(
        (a > tiny) & (b > tiny),
        np.sqrt(a * b),
        np.sqrt(np.maximum(a, tiny)) * np.sqrt(np.maximum(b, tiny)),
    )
    cosine = np.clip(gram[0, 1] / norm, -1.0, 1.0)
    straight = 1 - cosine * cosine <= COLLINEAR
    theta = np.arccos(np.where(straight, 0.0, cosine))
    first = np.where(straight, 1 - t, np.sin((1 - t) * theta) / np.sin(theta))
    second = np.where(straight, t, np.sin(t * theta) / np.sin(theta))
    return np.stack([first, second])


@nuslerp.oracle
def nuslerp_oracle(
    base: Tensor | None, experts: Sequence[Tensor], params: Params, context: TensorContext
) -> Tensor:
    """The interpolation in float64 along the chosen dimension."""
    import torch

    origin = torch.zeros_like(experts[0]) if base is None else base
    total = sum(params.weight)
    t = params.weight[1] / total if abs(total) >= 1e-6 else 0.5
    vectors = [e - origin for e in experts]
    dims: list[int] = list(range(origin.dim()))
    if not params.nuslerp_flatten and origin.dim() > 0:
        dims = [0] if params.nuslerp_row_wise else [origin.dim() - 1]
    lengths = [torch.sqrt((v * v).sum(dims, keepdim=True)).clamp(min=1e-7) for v in vectors]
    cosine = (vectors[0] * vectors[1]).sum(dims, keepdim=True) / (lengths[0] * lengths[1])
    cosine = cosine.clamp(-1, 1)
    theta = torch.arccos(cosine)
    share = [torch.sin(s * theta) / torch.sin(theta) for s in (1 - t, t)]
    flat = 1 - cosine**2 <= 1e-16
    first, second = (torch.where(flat, s, arc) for s, arc in zip((1 - t, t), share, strict=True))
    return origin + first * vectors[0] + second * vectors[1]
