"""Every oracle against mergekit 0.1.5, every recipe against its oracle, and what each must obey."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import test_matrices
import torch
from oracle_cases import (
    DELTA_METHODS,
    DRAWN,
    MERGEKIT,
    RECIPES,
    operands,
    oracle,
    reference,
)
from torch import Tensor
from vector_runners import BackendRunner, OracleRunner

from fastmerge.errors import RecipeError
from fastmerge.methods import della, oracle_draws
from fastmerge.registry import get, methods

# ---- against mergekit ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("shape", [(13, 17), (101,)], ids=["matrix", "vector"])
@pytest.mark.parametrize(
    ("method", "n_experts", "params"),
    MERGEKIT,
    ids=[f"{m}-{i}" for i, (m, _, _) in enumerate(MERGEKIT)],
)
def test_oracle_is_mergekits(
    method: str, n_experts: int, params: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    theirs = pytest.importorskip("mergekit.merge_methods", reason="needs the extra [oracle]")

    base, experts = operands(method, n_experts, shape)
    base, experts = base.to(dtype), [e.to(dtype) for e in experts]
    theirs_params: dict[str, Any] = dict(params)
    for name, value in params.items():
        scope = (get(method).param(name) or pytest.fail(name)).scope
        if scope == "expert" and not isinstance(value, list):
            theirs_params[name] = [value] * n_experts

    want = theirs.merge_tensors([base, *experts], method, parameters=theirs_params, base_index=0)
    got = oracle(method, base.double(), [e.double() for e in experts], **params)

    # fp32: they round every step; their DARE and DELLA go through float32 even for float64.
    tolerance = 1e-12 if dtype is torch.float64 and method not in DRAWN else 4e-6
    assert torch.allclose(got, want.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("flatten", [True, False])
def test_nuslerp_without_base_is_mergekits(flatten: bool) -> None:
    theirs = pytest.importorskip("mergekit.merge_methods", reason="needs the extra [oracle]")

    _, experts = operands("nuslerp", 2)
    params: dict[str, Any] = {"weight": [1.0, 3.0], "nuslerp_flatten": flatten}

    want = theirs.merge_tensors(experts, "nuslerp", parameters=params)

    assert torch.allclose(oracle("nuslerp", None, experts, **params), want, rtol=1e-12, atol=1e-12)


# ---- recipes against oracles ---------------------------------------------------------------------


@pytest.mark.parametrize("grid", [False, True], ids=["normal", "grid"])
@pytest.mark.parametrize("shape", [(13, 17), (101,), (6, 1), (2, 3, 8), (), (0,), (3, 0)], ids=str)
@pytest.mark.parametrize(
    ("method", "n_experts", "params"),
    RECIPES,
    ids=[f"{m}-{i}" for i, (m, _, _) in enumerate(RECIPES)],
)
def test_recipe_computes_the_oracle(
    method: str, n_experts: int, params: dict[str, Any], shape: tuple[int, ...], grid: bool
) -> None:
    if params.get("nuslerp_row_wise") and len(shape) > 2:
        return  # refused, see test_wrong_parameters_are_refused
    if "norm" in params.get("elect", "") and shape == ():
        # All shares of a lone element are 1, and a vote multiplied by 1 / square may miss that.
        return
    base, experts = operands(method, n_experts, shape, grid)
    origin = None if get(method).base == "ignored" else base
    inputs = [base, *experts] if origin is None else experts

    want = oracle(method, origin, inputs, **params)

    for backend in ("reference", "cpu"):
        got = BackendRunner(backend).merge(method, origin, inputs, **params)
        assert torch.allclose(got, want, rtol=1e-11, atol=1e-11), backend


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"rescale": True},
        {"elect": "normmass", "zero_sign": "global_majority", "zero_selects": "none"},
        {"elect": "normfrac", "count_rule": "threshold", "rescale": True},
        {"preset": "paper", "merge_func": "dis-max"},
        {"preset": "paper", "count_rule": "mask_rate", "lambda": 0.5},
    ],
    ids=str,
)
def test_model_scope_is_the_flattened_model(rules: dict[str, Any]) -> None:
    """Tensors of several shapes, listed out of order, scaled apart so that their cuts would differ."""
    shapes = {"z": (7, 5), "a": (33,), "m.1": (2, 3, 4), "b": (), "c": (4, 1)}
    states: list[dict[str, Tensor]] = [{} for _ in range(4)]
    for scale, (name, shape) in enumerate(shapes.items(), 1):
        base, experts = operands(name, 3, shape, grid=True)
        for state, tensor in zip(states, [base, *experts], strict=True):
            state[name] = scale * tensor
    params: dict[str, Any] = {
        "weight": [0.5, 1.0, 2.0],
        "density": [0.3, 1.0, 0.6],
        "scope": "model",
        **rules,
    }

    want = OracleRunner().merge("ties", states[0], states[1:], **params)

    for backend in ("reference", "cpu"):
        got = BackendRunner(backend).merge("ties", states[0], states[1:], **params)
        for name in shapes:
            assert torch.allclose(got[name], want[name], rtol=1e-11, atol=1e-11), (backend, name)


# ---- what every method obeys ---------------------------------------------------------------------

#: method -> parameters under which one expert is returned as it is
WHOLE: dict[str, dict[str, Any]] = {
    **{m: {"weight": 1.0} for m in DELTA_METHODS},
    "sce": {},
    "linear": {"weight": 1.0},
    "passthrough": {},
}
TRIMMED = {"weight": [1.0, 0.5, 0.25], "density": [0.4, 0.7, 0.5]}
#: method -> parameters for three experts
THREE_EXPERTS: dict[str, dict[str, Any]] = {
    **{m: TRIMMED for m in DELTA_METHODS},
    "sce": {"select_topk": 0.5, "preset": "paper"},
    "model_stock": {},
}


def keep_masks(experts: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.rand(e.shape, generator=generator) < 0.6 for e in experts]


def test_every_method_is_covered() -> None:
    tested = {m for m, _, _ in RECIPES} | {"passthrough"} | {m for m, _ in test_matrices.RULES}
    builtin = {n for n, s in methods().items() if s.recipe.__module__.startswith("fastmerge.")}
    assert builtin == tested


@pytest.mark.parametrize("method", THREE_EXPERTS)
def test_experts_equal_to_the_base_give_the_base(method: str) -> None:
    base, _ = operands(method, 1)
    assert torch.equal(oracle(method, base, [base] * 3, **THREE_EXPERTS[method]), base)


@pytest.mark.parametrize("method", WHOLE)
def test_one_whole_expert_is_returned(method: str) -> None:
    base, experts = operands(method, 1, grid=True)  # so that base + (expert - base) is exact
    origin = None if get(method).base == "ignored" else base
    assert torch.equal(oracle(method, origin, experts, **WHOLE[method]), experts[0])


@pytest.mark.parametrize("method", THREE_EXPERTS)
def test_order_of_experts_does_not_matter(method: str) -> None:
    base, experts = operands(method, 3)
    params: dict[str, Any] = THREE_EXPERTS[method]
    masks = keep_masks(experts) if method in DRAWN else None  # draws are keyed by position
    order = [2, 0, 1]

    def permuted(values: Any) -> Any:
        return [values[k] for k in order] if isinstance(values, list) else values

    straight = oracle(method, base, experts, masks=masks, **params)
    turned = oracle(
        method,
        base,
        permuted(experts),
        masks=permuted(masks),
        **{k: permuted(v) for k, v in params.items()},
    )
    assert torch.allclose(straight, turned, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("method", THREE_EXPERTS)
def test_deltas_scaled_by_a_power_of_two_scale_the_result(method: str) -> None:
    base, experts = operands(method, 3)
    zeros = torch.zeros_like(base)
    params: dict[str, Any] = THREE_EXPERTS[method]

    once = oracle(method, zeros, experts, **params)
    eightfold = oracle(method, zeros, [8 * e for e in experts], **params)

    assert torch.equal(8 * once, eightfold)


@pytest.mark.parametrize("method", ["ties", "breadcrumbs_ties", "dare_ties", "della"])
def test_no_merged_change_opposes_the_elected_sign(method: str) -> None:
    base, experts = operands(method, 3)
    zeros = torch.zeros_like(base)
    linear = {"ties": None, "breadcrumbs_ties": "breadcrumbs", "dare_ties": "dare_linear"}
    twin = linear.get(method, "della_linear")
    params: dict[str, Any] = {**TRIMMED, "normalize": False}
    if twin is None:  # ties itself has no twin without election: breadcrumbs without outliers
        twin, twin_params = "breadcrumbs", {**params, "gamma": 0.0}
    else:
        twin_params = params

    total = oracle(twin, zeros, experts, **twin_params)
    merged = oracle(method, zeros, experts, **params)

    assert bool((merged * total >= 0).all())


@pytest.mark.parametrize("method", ["ties", "della", "sce", "linear"])
def test_a_weighted_mean_stays_between_its_inputs(method: str) -> None:
    base, experts = operands(method, 3)
    params: dict[str, Any] = {} if method == "sce" else {"weight": [1.0, 0.5, 0.25]}
    inputs = [base, *experts] if method == "linear" else experts
    weights = {"weight": [1.0, 0.5, 0.25, 2.0]} if method == "linear" else params
    low = torch.stack([base, *experts]).amin(0) - 1e-12
    high = torch.stack([base, *experts]).amax(0) + 1e-12

    merged = oracle(method, None if method == "linear" else base, inputs, **weights)

    assert bool(((low <= merged) & (merged <= high)).all())


# ---- trims and draws -----------------------------------------------------------------------------


def test_trim_keeps_exactly_k_and_the_lowest_index_among_equals() -> None:
    zeros = torch.zeros(10, dtype=torch.float64)
    expert = torch.tensor([1, -2, 1, 2, 1, 1, -1, 1, 2, 1], dtype=torch.float64)

    merged = oracle("ties", zeros, [expert], weight=1.0, density=0.5)

    assert torch.equal(merged.nonzero().flatten(), torch.tensor([0, 1, 2, 3, 8]))


def test_philox_known_answers() -> None:
    """Random123's published vectors of philox4x32-10."""
    words = oracle_draws.philox(0, np.zeros(1, np.uint64))
    assert [hex(int(w)) for w in words[0]] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]


def test_inverse_keep_is_unbiased() -> None:
    n_seeds, density = 2048, 0.3
    base, experts = operands("dare", 1, (48,))
    params: dict[str, Any] = {"weight": 1.0, "density": density, "preset": "paper"}
    delta = experts[0] - base

    total = sum(
        oracle("dare_linear", base, experts, seed=s, **params) - base for s in range(n_seeds)
    )

    sigma = delta.abs() * ((1 - density) / density / n_seeds) ** 0.5
    assert bool(((total / n_seeds - delta).abs() < 5 * sigma).all())


@pytest.mark.parametrize("method", DRAWN)
def test_l1_rescale_conserves_the_l1_norm(method: str) -> None:
    base, experts = operands(method, 1)
    params: dict[str, Any] = {"weight": 1.0, "density": 0.4, "normalize": False}

    merged = oracle(method, base, experts, **params) - base

    assert torch.isclose(merged.abs().sum(), (experts[0] - base).abs().sum(), rtol=1e-12)


def test_della_without_a_window_is_dare() -> None:
    base, experts = operands("della", 3)
    params: dict[str, Any] = {"weight": 1.0, "density": [0.3, 0.5, 0.8], "preset": "paper"}

    dare = oracle("dare_linear", base, experts, **params)

    assert torch.equal(oracle("della_linear", base, experts, epsilon=0.0, **params), dare)


def test_della_probabilities_depend_on_ranks_and_average_to_the_density() -> None:
    delta = operands("ranks", 1, (5, 9))[0]
    p = della.probability_oracle(delta, 0.6, 0.2, "row")

    assert torch.allclose(p.mean(1), torch.full((5,), 0.6, dtype=torch.float64))
    assert torch.equal(p, della.probability_oracle(delta**3, 0.6, 0.2, "row"))
    alone = della.probability_oracle(delta[:, :1], 0.6, 0.2, "row")
    assert torch.equal(alone, torch.full((5, 1), 0.6, dtype=torch.float64))


# ---- edges ---------------------------------------------------------------------------------------


def test_model_stock_of_equal_experts_is_the_expert_and_of_orthogonal_ones_the_base() -> None:
    base = torch.zeros(4, dtype=torch.float64)
    one, other = torch.eye(4, dtype=torch.float64)[:2]
    assert torch.allclose(oracle("model_stock", base, [one, one]), one)
    assert torch.equal(oracle("model_stock", base, [one, other]), base)
    # 1 + (K - 1) cos = 0: no finite estimate
    for run in (oracle, reference):
        assert torch.equal(run("model_stock", base, [one, -one]), base)


@pytest.mark.parametrize("run", [oracle, reference], ids=["oracle", "recipe"])
def test_straight_lines_are_interpolated_linearly(run: Any) -> None:
    x = torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    zeros = torch.zeros_like(x)
    assert torch.allclose(run("slerp", x, [-x], t=0.25), 0.5 * x)
    for flatten in (True, False):
        merged = run("nuslerp", zeros, [x, 3 * x], weight=[1.0, 1.0], nuslerp_flatten=flatten)
        assert torch.allclose(merged, 2 * x, rtol=1e-7)


def test_sce_weighs_equally_where_changes_are_tiny() -> None:
    base = torch.zeros(5, dtype=torch.float64)
    experts = [torch.full_like(base, s) for s in (1e-4, 3e-4)]
    for run in (oracle, reference):
        assert torch.allclose(run("sce", base, experts), base + 2e-4)
        assert torch.allclose(run("sce", base, experts, preset="paper"), base + 2.8e-4)


@pytest.mark.parametrize(
    ("method", "params", "message"),
    [
        ("linear", {"weight": [1.0, -1.0]}, "weights of linear sum to 0"),
        ("della", {"weight": 1.0, "density": 0.9}, r"epsilon 0.15 of expert 0 leaves \(0, 1\)"),
        ("della", {"weight": 1.0, "density": 0.1, "window": 0.3}, "window 0.3 of expert 0"),
        ("ties", {"weight": 1.0, "density": 1.5}, r"density.* must be in \[0, 1\], got 1.5"),
        ("slerp", {}, "requires t"),
        ("nuslerp", {"weight": [1.0]}, "exactly 2"),
        (
            "nuslerp",
            {"weight": 1.0, "nuslerp_flatten": False, "nuslerp_row_wise": True},
            r"needs a matrix, but 'tensor' is \[2, 2, 2\]",
        ),
    ],
)
def test_wrong_parameters_are_refused(method: str, params: dict[str, Any], message: str) -> None:
    base, experts = operands(method, 1)
    origin, inputs = (None, [base, *experts]) if method == "linear" else (base, experts)
    if "nuslerp_row_wise" in params:
        origin, inputs = None, [torch.zeros(2, 2, 2)] * 2
    with pytest.raises(RecipeError, match=message):
        reference(method, origin, inputs, **params)
