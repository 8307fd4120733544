"""Inputs and parameter sets for the tests of oracles and recipes."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import fastmerge
from fastmerge.recipe import keyword_params
from fastmerge.registry import TensorContext, get
from fastmerge.stages import GivenMask

DELTA_METHODS = (
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "breadcrumbs",
    "breadcrumbs_ties",
)
DRAWN = ("dare_linear", "dare_ties", "della", "della_linear")
THREE = {"weight": [0.5, 1.0, -0.25], "density": [0.3, 0.7, 0.5]}


def operands(
    name: str, n_experts: int, shape: tuple[int, ...] = (13, 17), grid: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Return base and experts in float64; grid: multiples of 1/4, full of ties and zero sums."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr((name, n_experts, shape)).encode()))
    values = torch.randn((n_experts + 1, *shape), generator=generator, dtype=torch.float64)
    if grid:
        values = (values * 4).round() / 4
    return values[0], list(values[1:])


def oracle(
    method: str,
    base: Tensor | None,
    experts: Sequence[Tensor],
    *,
    masks: Sequence[Tensor] | None = None,
    seed: int = 0,
    name: str = "tensor",
    **params: Any,
) -> Tensor:
    spec = get(method)
    inputs = list(experts)
    origin = base
    if spec.base_is_operand and base is not None:
        origin, inputs = None, [base, *inputs]
    resolved = keyword_params(spec, len(inputs), base is not None, params)
    given = None if masks is None else GivenMask(masks)
    shape = tuple(inputs[0].shape)
    n = inputs[0].numel()
    context = TensorContext(name, shape, len(inputs), origin is not None, seed, n, given)
    result: Tensor = spec.oracle(origin, inputs, resolved, context)
    return result


def reference(method: str, base: Tensor | None, experts: Sequence[Tensor], **params: Any) -> Tensor:
    merged: Tensor = fastmerge.merge_tensors(
        base, experts, method=method, backend="reference", **params
    )
    return merged


#: (method, number of experts, parameters); mergekit 0.1.5 takes all of these.
MERGEKIT: list[tuple[str, int, dict[str, Any]]] = [
    ("linear", 3, {"weight": [0.2, 0.5, 0.3, 0.7]}),
    ("linear", 3, {"weight": [0.2, -0.5, 0.3, 0.7], "normalize": False}),
    ("task_arithmetic", 3, {**THREE, "lambda": 0.7}),
    ("task_arithmetic", 3, {**THREE, "normalize": True, "rescale": True}),
    ("task_arithmetic", 2, {"weight": [1.0, -1.0], "normalize": True}),
    ("ties", 3, THREE),
    ("ties", 3, {**THREE, "normalize": False, "rescale": True, "lambda": 1.3, "int8_mask": True}),
    ("ties", 3, {"weight": 1.0, "density": [0.0, 1.0, 1e-6], "rescale": True}),
    ("breadcrumbs", 3, {**THREE, "gamma": [0.02, 0.1, 0.9]}),
    ("breadcrumbs", 3, {**THREE, "gamma": 0.0, "rescale": True, "normalize": True}),
    ("breadcrumbs_ties", 3, {**THREE, "gamma": 0.05}),
    ("breadcrumbs_ties", 2, {"weight": 1.0, "density": [1.0, 0.0], "normalize": True}),
    ("dare_linear", 2, {"weight": [1.0, 0.5], "density": [1.0, 0.0]}),
    ("dare_ties", 2, {"weight": [1.0, 0.5], "density": [1.0, 0.0], "normalize": True}),
    ("della", 2, {"weight": [1.0, 0.5], "density": [1.0, 0.0]}),
    ("della_linear", 2, {"weight": [1.0, 0.5], "density": 1.0}),
    ("slerp", 1, {"t": 0.3}),
    ("nuslerp", 2, {"weight": [1.0, 2.0]}),
    ("nuslerp", 2, {"weight": [1.0, -1.0], "nuslerp_flatten": False}),
    ("nuslerp", 2, {"weight": [0.3, 0.5], "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("model_stock", 3, {}),
    ("model_stock", 4, {"filter_wise": True}),
    ("sce", 3, {}),
    ("sce", 3, {"select_topk": 0.4, "int8_mask": True}),
    ("sce", 3, {"select_topk": 0.0}),
]

POWERS = [0.5, 1.0, -0.25]  # products with grid values are exact: zero votes are zero in both

RECIPES: list[tuple[str, int, dict[str, Any]]] = [
    *MERGEKIT,
    *(
        ("ties", 3, {"weight": POWERS, "density": [0.3, 1.0, 0.55], **rules})
        for rules in (
            {"count_rule": "threshold"},
            {"count_rule": "threshold_plus_one"},
            {"count_rule": "mask_rate", "scope": "model"},
            {"scope": "model", "rescale": True},
            {"elect": "normmass"},
            {"elect": "normfrac", "zero_sign": "tensor_majority"},
            {"elect": "count", "zero_selects": "none", "zero_sign": "tensor_majority"},
            {"elect_on": "unweighted", "divide_by": "count"},
            {"zero_sign": "global_majority", "merge_func": "dis-max"},
            {"zero_sign": "tensor_majority", "merge_func": "dis-sum", "lambda": 0.5},
            {"preset": "paper"},
            {"divide_by": "none"},
        )
    ),
    *(
        (m, 3, {"weight": POWERS, "density": [0.4, 1.0, 0.6], "rescale_mode": mode})
        for m in DRAWN
        for mode in ("l1", "l2", "linf", "inverse_keep")
    ),
    ("dare_linear", 2, {"weight": 1.0, "density": [0.002, 0.999], "preset": "paper"}),
    ("dare_linear", 2, {"weight": 1.0, "density": 0.5, "rescale": False, "normalize": True}),
    ("della", 3, {"weight": POWERS, "density": 0.5, "rank_by": "tensor", "window": 0.6}),
    ("della", 3, {"weight": POWERS, "density": 0.5, "rank_by": "value", "epsilon": 0.3}),
    ("della_linear", 2, {"density": 0.7, "window": [None, 0.2], "preset": "paper"}),
    ("breadcrumbs", 3, {"density": [0.4, 1.0, 0.0], "gamma": 0.2, "preset": "paper"}),
    ("breadcrumbs_ties", 3, {"weight": POWERS, "density": 0.5, "scope": "row", "rescale": True}),
    ("model_stock", 3, {"preset": "paper"}),
    ("model_stock", 3, {"preset": "paper", "filter_wise": True}),
    ("sce", 3, {"select_topk": 0.4, "preset": "paper"}),
    ("sce", 3, {"uniform_below": 100.0}),
    ("linear", 3, {"preset": "paper"}),
    ("task_arithmetic", 3, {"preset": "paper", "lambda": 0.3}),
]
