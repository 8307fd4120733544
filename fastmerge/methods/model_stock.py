"""Model Stock: as far from the base towards the average as the angles between experts suggest."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastmerge.registry import Param, Params, Recipe, Scope, TensorContext, method
from fastmerge.stages import F64, Axis, Copy, Gram, Walk

if TYPE_CHECKING:
    from torch import Tensor

#: A product of two norms is at least this; a smaller denominator of t leaves the base.
SMALLEST_PRODUCT = 1e-6
SMALLEST_DENOMINATOR = 1e-6


@method(
    "model_stock",
    title="Model Stock",
    summary="interpolates between base and average by the experts' mutual angle",
    paper="arXiv:2403.19522",
    base="required",
    params=(
        Param("filter_wise", False, "one angle per row instead of per tensor", kind=bool),
        Param(
            "cos_rule",
            "mean_cosine",
            "what is averaged over the pairs of experts",
            kind=str,
            choices=("mean_cosine", "mean_angle"),
        ),
    ),
    n_inputs=(2, None),
    on_few="copy_base",
    scope=Scope.TENSOR,
    presets={"paper": {"cos_rule": "mean_angle"}},
)
def model_stock(params: Params, context: TensorContext) -> Recipe:
    """out = t * mean_k(expert_k) + (1-t) * base,  t = K cos / (1 + (K-1) cos), not clamped."""
    n_experts = context.n_experts
    if n_experts < 2:
        return Copy(0)
    axis = Axis.ROW if params.filter_wise else Axis.TENSOR
    gram: F64 = yield Gram(axis=axis)
    pairs = []
    for j, k in itertools.combinations(range(n_experts), 2):
        product = np.sqrt(gram[j, j]) * np.sqrt(gram[k, k])
        pairs.append(np.clip(gram[j, k] / np.maximum(product, SMALLEST_PRODUCT), -1.0, 1.0))
    if params.cos_rule == "mean_angle":
        cosine = np.cos(np.mean(np.arccos(pairs), axis=0))
    else:
        cosine = np.mean(pairs, axis=0)
    denominator = 1 + (n_experts - 1) * cosine
    singular = np.abs(denominator) < SMALLEST_DENOMINATOR
    t = np.where(singular, 0.0, n_experts * cosine / np.where(singular, 1.0, denominator))
    return Walk(np.tile(t / n_experts, (n_experts, 1)), axis=axis)


@model_stock.oracle
def model_stock_oracle(
    base: Tensor, experts: Sequence[Tensor], params: Params, context: TensorContext
) -> Tensor:
    """The interpolation in float64; a 1-D tensor is one row."""
    import torch

    n_experts = len(experts)
    if n_experts < 2 or base.numel() == 0:
        return base
    shape = (-1, base.shape[-1]) if params.filter_wise and base.dim() else (1, -1)
    origin = base.reshape(shape)
    rows = torch.stack([e.reshape(shape) for e in experts])
    offset = rows - origin
    norm = offset.norm(dim=-1)
    total = torch.zeros_like(norm[0])
    n_pairs = 0
    for j in range(n_experts):
        for k in range(j):
            dot = (offset[j] * offset[k]).sum(-1)
            cosine = (dot / (norm[j] * norm[k]).clamp(min=1e-6)).clamp(-1, 1)
            total += torch.arccos(cosine) if params.cos_rule == "mean_angle" else cosine
            n_pairs += 1
    mean = total / n_pairs
    if params.cos_rule == "mean_angle":
        mean = torch.cos(mean)
    denominator = 1 + (n_experts - 1) * mean
    t = torch.where(denominator.abs() < 1e-6, 0.0, n_experts * mean / denominator)[:, None]
    return (t * rows.mean(0) + (1 - t) * origin).reshape(base.shape)
