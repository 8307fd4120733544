"""Methods that decompose: against their oracles, what each must obey, and in merges of files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from oracle_cases import oracle
from torch import Tensor
from vector_runners import BackendRunner

import fastmerge
from fastmerge.errors import NonFiniteError, RecipeError
from fastmerge.linalg import polar, quadratic, spectrum, svd
from fastmerge.linalg.leading import refined
from fastmerge.methods.matrices import TABLES

#: (method, parameters)
RULES: list[tuple[str, dict[str, Any]]] = [
    ("tsv_m", {}),
    ("tsv_m", {"weight": [0.5, 1.0, 2.0], "lambda": 0.7, "rank_fraction": 0.2}),
    ("tsv_m", {"mode": "compat"}),
    ("tsv_m", {"expert_scale": "outliers"}),
    (
        "tsv_m",
        {
            "expert_scale": "outliers",
            "rank_by": "sparsity",
            "gamma": 2.0,
            "weight": [0.5, 1.0, -2.0],
        },
    ),
    ("iso_c", {}),
    ("iso_c", {"lambda": 1.5, "iso_divisor": "rank", "weight": [0.5, 1.0, 2.0]}),
    ("iso_cts", {}),
    ("iso_cts", {"common_space_fraction": 0.5, "weight": [0.5, 1.0, 2.0]}),
    ("star", {}),
    ("star", {"eta": 80.0, "weight": [0.5, 1.0, 2.0], "lambda": 0.5}),
    ("subspace_boosting", {}),
    ("subspace_boosting", {"beta": 0.3, "weight": [0.5, 1.0, 2.0]}),
    ("svc", {}),
    ("svc", {"alpha": 1.0, "weight": 0.3}),
    ("lore", {"mu": 1.0, "sweeps": 3}),
    ("twin_merging", {"mask_rate": 0.5, "weight": [0.2, 0.3, 0.5]}),
    ("wudi", {"steps": 20}),
    ("wudi", {"solver": "exact"}),
    ("wudi", {"solver": "swudi"}),
    ("wudi", {"solver": "aswudi"}),
    ("adarank", {}),
    ("adarank", {"rank_fraction": 0.4, "weight": [0.5, 1.0, 2.0], "lambda": 0.7}),
    ("opcm", {}),
    ("opcm", {"alpha": 0.8, "lambda": 1.5}),
    ("opcm", {"merged_experts": 2, "merged_lambda": 1.3}),
    ("knots", {}),
    ("knots", {"density": 0.6, "weight": [0.5, 1.0, 2.0], "merge_func": "dis-sum"}),
    ("knots", {"density": 0.5, "scope": "model", "merge_func": "mean"}),
    ("dop", {"steps": 20}),
    ("dop", {"steps": 20, "weight": [0.5, 1.0, 2.0], "lambda": 0.7, "mgda": False, "epsilon": 0.9}),
    ("dop", {"steps": 20, "space": "v", "epsilon": 1.0, "ema_beta": 0.5}),
    ("dop", {"steps": 20, "space": "u"}),
    ("optmerge", {}),
    ("optmerge", {"lr": 0.01, "steps": 50.0}),
]
IDS = [f"{m}-{i}" for i, (m, _) in enumerate(RULES)]
METHODS = sorted({m for m, _ in RULES})
SHAPES = [(64, 64), (48, 96), (96, 48), (33, 65)]


def decaying(seed: int, shape: tuple[int, int], power: float = 0.5) -> Tensor:
    """Return a float64 matrix with singular values i^-power, 5 % apart at least."""
    generator = torch.Generator().manual_seed(seed)
    r = min(shape)
    u, v = (
        torch.linalg.qr(torch.randn(n, r, generator=generator, dtype=torch.float64)).Q
        for n in shape
    )
    s = torch.arange(1, r + 1, dtype=torch.float64) ** -power
    for i in range(1, r):
        s[i] = min(s[i], s[i - 1] * 0.95)
    return (u * s) @ v.mT


def operands(shape: tuple[int, int], n: int = 3, power: float = 0.5) -> tuple[Tensor, list[Tensor]]:
    base = torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return base, [base + decaying(31 * k + shape[0], shape, power) for k in range(n)]


def apart(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def merged_delta(method: str, deltas: list[Tensor], **params: Any) -> Tensor:
    base = torch.zeros_like(deltas[0])
    return fastmerge.merge_tensors(base, deltas, method=method, **params)


# ---- against the oracles -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*SHAPES, (7,), (), (5, 0), (1, 9), (2, 3, 8)], ids=str)
@pytest.mark.parametrize(("method", "params"), RULES, ids=IDS)
def test_recipes_compute_their_oracles(
    method: str, params: dict[str, Any], shape: tuple[int, ...]
) -> None:
    if len(shape) == 2 and min(shape) > 1:
        base, experts = operands(shape)  # type: ignore[arg-type]
    else:
        generator = torch.Generator().manual_seed(3)
        base, *experts = torch.randn((4, *shape), generator=generator, dtype=torch.float64)
    want = oracle(method, base, experts, **params)
    for backend in ("reference", "cpu"):
        got = BackendRunner(backend).merge(method, base, experts, **params)
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-9), backend


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("method", "params"), RULES, ids=IDS)
def test_float32_is_near_the_oracle(
    method: str, params: dict[str, Any], shape: tuple[int, int], power: float
) -> None:
    """1e-4 of the merged delta for what is of full rank."""
    _, experts = operands(shape, power=power)
    single = [(e - operands(shape)[0]).float() for e in experts]
    want = oracle(
        method, torch.zeros(shape, dtype=torch.float64), [d.double() for d in single], **params
    )
    assert apart(merged_delta(method, single, **params), want) < 1e-4


@pytest.mark.parametrize("method", [m for m in METHODS if m != "twin_merging"])
def test_low_rank_deltas_do_not_depend_on_what_rounding_left(method: str) -> None:
    """Experts of rank 4: the oracle in float64 leaves out the same directions."""
    generator = torch.Generator().manual_seed(5)
    deltas = [
        (torch.randn(64, 4, generator=generator) @ torch.randn(4, 64, generator=generator)) / 8
        for _ in range(4)
    ]
    params: dict[str, Any] = {"mu": 0.5} if method == "lore" else {}
    got = merged_delta(method, deltas, **params)
    again = merged_delta(method, [d.mT.contiguous() for d in deltas], **params).mT
    want = oracle(
        method, torch.zeros(64, 64, dtype=torch.float64), [d.double() for d in deltas], **params
    )
    assert apart(got, want) < 1e-4
    if method in ("tsv_m", "iso_c", "star", "subspace_boosting", "lore"):
        assert apart(again, got) < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_equal_experts_and_zeros_are_no_accident(method: str) -> None:
    delta = decaying(1, (40, 40)).float()
    nothing = torch.zeros_like(delta)
    for deltas in ([delta, delta.clone()], [delta, nothing], [nothing, nothing]):
        found = merged_delta(method, deltas)
        assert torch.isfinite(found).all()
        want = oracle(method, nothing.double(), [d.double() for d in deltas])
        assert float((found - want).norm()) < 1e-4 * max(1.0, float(want.norm()))


# ---- what they obey ------------------------------------------------------------------------------


def test_tsv_keeps_the_singular_values() -> None:
    _, experts = operands((48, 96), 4)
    deltas = [e - operands((48, 96))[0] for e in experts]
    kept = torch.cat([torch.linalg.svdvals(d)[:12] for d in deltas]).sort(descending=True).values
    found = torch.linalg.svdvals(merged_delta("tsv_m", deltas))
    assert torch.allclose(found, kept, rtol=1e-9)


def test_one_expert_is_itself() -> None:
    delta = decaying(2, (33, 65))
    assert apart(merged_delta("tsv_m", [delta]), delta) < 1e-12
    assert apart(merged_delta("wudi", [delta], steps=0), delta) < 1e-12


def test_iso_is_flat_and_idempotent() -> None:
    delta = merged_delta("iso_c", [decaying(3, (48, 96)), decaying(4, (48, 96))])
    s = torch.linalg.svdvals(delta)
    assert torch.allclose(s, s.mean().expand_as(s), rtol=1e-12)
    assert apart(merged_delta("iso_c", [delta]), delta) < 1e-12


def test_star_keeps_the_nuclear_norm() -> None:
    delta = decaying(5, (48, 96))
    found = torch.linalg.svdvals(merged_delta("star", [delta]))
    assert float(found.sum()) == pytest.approx(float(torch.linalg.svdvals(delta).sum()), rel=1e-12)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("opcm", "dop")])
def test_order_of_experts_does_not_matter(method: str) -> None:
    deltas = [decaying(k, (33, 65)) for k in range(3)]
    params = {"mu": 0.2} if method == "lore" else {}
    a = merged_delta(method, deltas, **params)
    assert apart(merged_delta(method, deltas[::-1], **params), a) < 1e-9


@pytest.mark.parametrize(
    "method", [m for m in METHODS if m not in ("wudi", "dop", "optmerge", "lore")]
)
def test_scaled_deltas_give_a_scaled_result(method: str) -> None:
    deltas = [decaying(k, (33, 65)) for k in range(3)]
    params = {"least_singular_value": 0.0} if method == "knots" else {}
    a = merged_delta(method, deltas, **params)
    for c in (1e4, 1e-6):
        assert apart(merged_delta(method, [c * d for d in deltas], **params), c * a) < 1e-8


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("wudi", "knots", "dop")])
def test_rotated_deltas_give_a_rotated_result(method: str) -> None:
    """Adam goes coordinate by coordinate, as KnOTS' election does; all others know no axes."""
    deltas = [decaying(k, (33, 65)) for k in range(3)]
    p, q = (torch.linalg.qr(decaying(7 + n, (n, n), 0.1)).Q for n in (33, 65))
    params = {"mu": 0.2} if method == "lore" else {}
    a = merged_delta(method, deltas, **params)
    turned = merged_delta(method, [p @ d @ q for d in deltas], **params)
    assert apart(turned, p @ a @ q) < 1e-8


# ---- primitives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["factored_svd", "polar", "spectrum", "svd", "truncated_svd"])
def test_decompositions_are_among_the_operations(name: str) -> None:
    assert getattr(fastmerge.ops, name) is getattr(fastmerge.linalg, name)


@pytest.mark.parametrize("route", ["newton", "express", "gram", "svd"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_route_gives_the_polar_factor(route: Any, shape: tuple[int, int]) -> None:
    a = decaying(11, shape).float()
    u, _, vh = torch.linalg.svd(a.double(), full_matrices=False)
    found = polar(a, route=route)
    assert found.route == route and found.rank == min(shape)
    assert found.error <= 1e-5
    assert apart(found.q, u @ vh) < 2e-5


@pytest.mark.parametrize("route", ["newton", "express", "gram", "svd"])
def test_a_polar_factor_leaves_out_directions_that_are_noise(route: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(60, 3, generator=generator) @ torch.randn(3, 80, generator=generator)
    u, _, vh = torch.linalg.svd(a.double(), full_matrices=False)
    found = polar(a, route=route)
    assert found.rank == 3
    assert apart(found.q, u[:, :3] @ vh[:3]) < 1e-5
    if route in ("newton", "express"):
        assert found.route == f"{route}, then gram"


#: Least singular values, in what counts as noise beside a largest one of 1, and how Newton's iteration ends.
LEAST_VALUES = [
    ([0.0], "newton, then gram"),
    ([0.1, 0.3, 0.5, 1.5, 1.9], "newton, then gram"),
    ([0.9], "newton, then gram"),
    ([1.5], "newton"),
    ([30.0], "newton"),
]


@pytest.mark.parametrize("least, route", LEAST_VALUES, ids=str)
@pytest.mark.parametrize("columns", [96, 140])
def test_iterations_tell_noise_from_the_least_directions(
    columns: int, least: list[float], route: str
) -> None:
    generator = torch.Generator().manual_seed(5)
    u, v = (
        torch.linalg.qr(torch.randn(n, 96, generator=generator, dtype=torch.float64)).Q
        for n in (96, columns)
    )
    noise = columns * 2.0**-23
    s = torch.logspace(0, math.log10(3 * noise), 96, dtype=torch.float64)
    s[-len(least) :] = torch.tensor(least, dtype=torch.float64).flip(0) * noise
    a = ((u * s) @ v.mT).float()
    u, s, vh = torch.linalg.svd(a.double(), full_matrices=False)  # of what float32 made of it
    kept = 96 - sum(x < 1 for x in least)
    for asked in ("newton", "express"):
        found = polar(a, route=asked)
        assert found.rank == kept and found.error <= 1e-5
        # Steps in float32 know the least direction of those that count to about eps32 / s.
        worst = 1e-5 if "gram" in found.route else 5e-4
        assert apart(found.q, u[:, :kept] @ vh[:kept]) < worst
        if asked == "newton":
            assert found.route == route


@pytest.mark.parametrize("route", ["newton", "express"])
@pytest.mark.parametrize("columns", [96, 140])
def test_noise_is_told_where_a_library_reports_a_factor_of_nan(
    route: Any, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As cuSOLVER does of a matrix that is not positive definite: no error, and NaN in the factor."""
    generator = torch.Generator().manual_seed(6)
    a = torch.randn(96, 5, generator=generator) @ torch.randn(5, columns, generator=generator)
    real = torch.linalg.cholesky_ex

    def silent(square: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        lower, info = real(square)
        first = int(info) - 1
        if first >= 0:
            lower = lower.clone()
            lower[first:, first:] = torch.nan
        return lower, torch.zeros_like(info)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", silent)
    found = polar(a, route=route)
    assert found.rank == 5 and found.route == f"{route}, then gram"


@pytest.mark.parametrize("lr, steps", [(1e-4, 300.0), (1e-3, 40.0), (1e-2, 7.0)])
def test_a_polynomial_stands_for_an_iteration(lr: float, steps: float) -> None:
    """In float64: products alone give what eigenvectors give."""
    generator = torch.Generator().manual_seed(7)
    start, z, w = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((30, 50), (30, 24), (24, 50))
    )
    w /= torch.linalg.matrix_norm(w, 2)
    kept = quadratic.heavy_ball(lr, 0.9, steps)
    values, vectors = torch.linalg.eigh(w.mT @ w)
    values, vectors = values[-24:], vectors[:, -24:]
    want = quadratic.filtered(start, z @ w, values, vectors, kept)
    found = quadratic.iterated(start, z, w, 1.0, kept)
    assert found is not None
    assert apart(found - start, want - start) < 1e-8


def test_no_polynomial_stands_for_what_is_not_smooth() -> None:
    assert quadratic.polynomial(quadratic.heavy_ball(1e-4, 0.9, math.inf), 1.0) is None
    assert quadratic.polynomial(quadratic.heavy_ball(1.0, 0.9, 300.0), 1.0) is None
    assert quadratic.polynomial(quadratic.heavy_ball(1e-4, 0.9, 0.0), 1.0) is None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_routes_decompose_alike(shape: tuple[int, int]) -> None:
    a = decaying(12, shape, 1.0).float()
    want = torch.linalg.svd(a.double(), full_matrices=False)
    for route in ("gram", "lapack"):
        found = spectrum(a, route=route)  # type: ignore[arg-type]
        assert torch.allclose(found.s, want.S, rtol=1e-5, atol=1e-6)
        cut = svd(a, 10, route=route)  # type: ignore[arg-type]
        assert cut.s.shape == (10,) and cut.u.dtype is torch.float32
        assert apart(cut.product(), (want.U[:, :10] * want.S[:10]) @ want.Vh[:10]) < 1e-5
        assert apart(found.mapped(lambda s: s), a) < 1e-5


@pytest.mark.parametrize("shape", [(800, 850), (900, 800)], ids=str)
@pytest.mark.parametrize("kind", ["noise", "low rank and noise", "slow decay"])
def test_leading_triples_are_refined(kind: str, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(7)
    m, n, k = *shape, 100
    a = torch.randn(shape, generator=generator)
    if kind == "low rank and noise":
        a += torch.randn(m, 8, generator=generator) @ torch.randn(8, n, generator=generator)
    if kind == "slow decay":
        u, _, vh = torch.linalg.svd(a, full_matrices=False)
        a = (u * torch.arange(1.0, min(shape) + 1) ** -0.5) @ vh
    wanted = svd(a.double(), k)
    assert refined([a if m < n else a.mT], k) is not None
    found = svd(a, k)
    assert float((found.s / wanted.s - 1).abs().max()) < 1e-6
    assert apart(found.product().double(), wanted.product()) < 1e-6
    for basis in (found.u.mT, found.vh):
        assert float((basis @ basis.mT - torch.eye(k)).abs().max()) < 1e-5


def test_what_float32_cannot_refine_is_decomposed_in_float64() -> None:
    """The last triples asked for lie below 1/64 of the first; then there are too many; or none."""
    generator = torch.Generator().manual_seed(7)
    u, _, vh = torch.linalg.svd(torch.randn(800, 800, generator=generator))
    a = (u * torch.arange(1.0, 801.0) ** -1.0) @ vh
    assert refined([a], 50) is not None
    assert refined([a], 100) is None
    assert refined([a], 400) is None
    assert refined([torch.zeros(800, 800)], 10) is None
    assert apart(svd(a, 100).product().double(), svd(a.double(), 100).product()) < 1e-6
    assert svd(torch.zeros(800, 800), 10, floor=None).s.tolist() == []


# ---- which tensors, and bad input ----------------------------------------------------------------


def test_tables_are_averaged_unless_told_otherwise() -> None:
    deltas = [decaying(k, (16, 12)) for k in range(2)]
    base = torch.zeros_like(deltas[0])
    mean = (deltas[0] + deltas[1]) / 2
    for name in ("model.embed_tokens.weight", "lm_head.weight", "transformer.wte.weight"):
        merged = fastmerge.merge_tensors(base, deltas, method="tsv_m", name=name)
        assert torch.allclose(merged, mean)
        merged = fastmerge.merge_tensors(base, deltas, method="tsv_m", name=name, tables="matrix")
        assert not torch.allclose(merged, mean)
    merged = fastmerge.merge_tensors(
        base, deltas, method="tsv_m", name="a.q.weight", exclude=r"\.q\."
    )
    assert torch.allclose(merged, mean)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        assert not TABLES.search(name)


def test_kernels_of_convolutions_are_averaged_or_flattened() -> None:
    deltas = [decaying(k, (16, 12)).reshape(16, 3, 2, 2) for k in range(2)]
    base = torch.zeros_like(deltas[0])
    merged = fastmerge.merge_tensors(base, deltas, method="iso_c")
    assert torch.allclose(merged, (deltas[0] + deltas[1]) / 2)
    flat = fastmerge.merge_tensors(base, deltas, method="iso_c", conv="flatten")
    want = merged_delta("iso_c", [d.reshape(16, 12) for d in deltas])
    assert torch.allclose(flat.reshape(16, 12), want)


def test_a_wrong_pattern_is_refused() -> None:
    with pytest.raises(RecipeError, match="exclude is not a regular expression"):
        merged_delta("tsv_m", [decaying(0, (8, 8))], exclude="(")


@pytest.mark.parametrize("method", METHODS)
def test_nan_is_refused_or_spreads(method: str) -> None:
    deltas = [decaying(k, (8, 12)).float() for k in range(2)]
    deltas[1][3, 4] = torch.nan
    with pytest.raises(NonFiniteError, match=r"experts\[1\].*index 40"):
        merged_delta(method, deltas)
    assert merged_delta(method, deltas, nan_policy="propagate").isnan().all()


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tsv_m", "iso_c"])
def test_files_merge_as_tensors_do(method: str, tmp_path: Path) -> None:
    shapes = {
        "a.weight": (96, 64),
        "a.bias": (96,),
        "lm_head.weight": (50, 64),
        "b.weight": (64, 160),
    }
    families.write_family(tmp_path, shapes, torch.bfloat16)
    lines = [f"merge_method: {method}", "base_model: ./base", "models:"]
    lines += [f"- model: ./e{k}" for k in (1, 2, 3)]
    (tmp_path / "m.yaml").write_text("\n".join(lines) + "\n")
    fastmerge.merge(tmp_path / "m.yaml", tmp_path / "out")
    states = [families.load(tmp_path / n) for n in ("base", "e1", "e2", "e3", "out")]
    want = fastmerge.merge_state_dicts(states[0], states[1:4], method=method)
    for name, tensor in want.items():
        assert families.same_bits(states[4][name], tensor), name


def test_opcm_goes_on_from_a_merge(tmp_path: Path) -> None:
    """Three experts at once, or one added to the merge of two: which is rounded to its type between."""
    shapes = {"a.weight": (48, 32), "a.bias": (48,), "lm_head.weight": (50, 32)}
    families.write_family(tmp_path, shapes, torch.float32)

    def recipe(name: str, experts: list[int]) -> Path:
        lines = ["merge_method: opcm", "base_model: ./base", "models:"]
        lines += [f"- model: ./e{k}" for k in experts]
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n")
        return path

    fastmerge.merge(recipe("all.yaml", [1, 2, 3]), tmp_path / "whole")
    fastmerge.merge(recipe("two.yaml", [1, 2]), tmp_path / "two")
    fastmerge.merge(recipe("more.yaml", [3]), tmp_path / "three", append=tmp_path / "two")
    states = {n: families.load(tmp_path / n) for n in ("base", "e1", "e2", "e3", "whole", "three")}
    experts = [states[f"e{k}"] for k in (1, 2, 3)]
    want = fastmerge.merge_state_dicts(states["base"], experts, method="opcm")
    for name, tensor in want.items():
        assert families.same_bits(states["whole"][name], tensor), name
        torch.testing.assert_close(states["three"][name], tensor, rtol=1e-5, atol=1e-6)
    known = json.loads((tmp_path / "three" / "fastmerge_manifest.json").read_text())["joined"]
    assert known["merged_experts"] == 3
    with pytest.raises(RecipeError, match="no merge that can be gone on with"):
        fastmerge.merge(recipe("ties.yaml", [3]), tmp_path / "x", append=_linear(tmp_path))


def _linear(tmp_path: Path) -> Path:
    lines = ["merge_method: linear", "models:", "- model: ./e1", "parameters: {weight: 1.0}"]
    (tmp_path / "l.yaml").write_text("\n".join(lines) + "\n")
    fastmerge.merge(tmp_path / "l.yaml", tmp_path / "linear")
    return tmp_path / "linear"


def test_a_merge_that_joins_is_the_same_in_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recipes that may not wait in memory run twice."""
    base, experts = operands((40, 30))
    states = [{"a.weight": x, "b.weight": 2 * x} for x in (base, *experts)]
    want = fastmerge.merge_state_dicts(states[0], states[1:], method="opcm")
    monkeypatch.setattr("fastmerge.tensors.WAITING_BYTES", 0)
    again = fastmerge.merge_state_dicts(states[0], states[1:], method="opcm")
    for name, tensor in want.items():
        assert families.same_bits(again[name], tensor), name


# ---- adapters, masks, fused projections ----------------------------------------------------------


def lora(seed: int, shape: tuple[int, int], rank: int, like: Tensor) -> fastmerge.LoraTensor:
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(shape[0], rank, generator=generator) / 8
    a = torch.randn(rank, shape[1], generator=generator) / 8
    return fastmerge.LoraTensor(like, b, a, 0.5)


@pytest.mark.parametrize("shape", [(64, 48), (48, 96)], ids=str)
@pytest.mark.parametrize("method", ["knots", "tsv_m", "iso_c", "linear", "ties"])
def test_adapters_merge_as_what_they_make(method: str, shape: tuple[int, int]) -> None:
    base = torch.zeros(shape)
    adapters = [lora(k, shape, 4 + k, base) for k in range(3)]
    dense = [base + 0.5 * t.b @ t.a for t in adapters]
    params: dict[str, Any] = {"weight": 0.5} if method in ("linear", "ties") else {}
    got = fastmerge.merge_tensors(base, adapters, method=method, **params)
    assert apart(got, fastmerge.merge_tensors(base, dense, method=method, **params)) < 1e-4


@pytest.mark.parametrize(
    ("method", "params"), [("knots", {"density": 0.7}), ("tsv_m", {}), ("iso_c", {})]
)
def test_no_delta_of_adapters_is_formed(
    method: str, params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = torch.randn(64, 48, generator=torch.Generator().manual_seed(1))
    adapters = [lora(k, (64, 48), 4, base) for k in range(3)]
    want = fastmerge.merge_tensors(base, adapters, method=method, **params)

    def fail(*_: Any) -> None:
        raise AssertionError("a delta was formed")

    monkeypatch.setattr("fastmerge.evaluate._Deltas._sum", fail)
    again = fastmerge.merge_tensors(base, adapters, method=method, **params)
    assert torch.equal(again, want)
    elsewhere = [lora(k, (64, 48), 4, base + 1) for k in range(3)]
    with pytest.raises(AssertionError, match="a delta was formed"):
        fastmerge.merge_tensors(base, elsewhere, method=method, **params)


def test_factors_that_do_not_fit_are_refused() -> None:
    weight = torch.zeros(8, 6)
    with pytest.raises(fastmerge.MergeError, match=r"b \[8, r\] and a \[r, 6\]"):
        fastmerge.LoraTensor(weight, torch.zeros(8, 2), torch.zeros(3, 6))
    with pytest.raises(fastmerge.MergeError, match="both factors alike"):
        fastmerge.LoraTensor(weight, torch.zeros(8, 2), torch.zeros(2, 6).half())


def test_adarank_keeps_what_the_masks_say() -> None:
    base, experts = operands((24, 16), 2)
    masks = [torch.arange(16) % 2 * 2.0 - 1, torch.ones(16)]
    got = fastmerge.merge_tensors(base, experts, method="adarank", masks=masks, weight=1.0)
    u, s, vh = torch.linalg.svd(experts[0] - base, full_matrices=False)
    want = base + (u[:, 1::2] * s[1::2]) @ vh[1::2] + (experts[1] - base)
    assert apart(got, want) < 1e-12
    with pytest.raises(RecipeError, match=r"masks\[0\] of 'tensor' has 5 values for 16"):
        fastmerge.merge_tensors(base, experts, method="adarank", masks=[torch.ones(5)] * 2)


@pytest.mark.parametrize("method", ["tsv_m", "wudi", "knots", "lore"])
def test_fused_projections_are_one_matrix_or_one_each(method: str) -> None:
    base, experts = operands((48, 16), 2)
    name = "blocks.0.attn.qkv.weight"
    whole = fastmerge.merge_tensors(base, experts, method=method, name=name)
    split = fastmerge.merge_tensors(base, experts, method=method, name=name, fused="split")
    parts = [
        fastmerge.merge_tensors(b, list(e), method=method)
        for b, *e in zip(base.chunk(3), *(x.chunk(3) for x in experts), strict=True)
    ]
    assert apart(split, torch.cat(parts)) < 1e-12
    assert apart(split, whole) > 1e-6 or method == "lore"
    want = oracle(method, base, experts, name=name, fused="split")
    assert apart(split, want) < 1e-9


def test_a_plan_tells_what_decompositions_take(tmp_path: Path) -> None:
    shapes = {"a.weight": (96, 64), "a.bias": (96,)}
    families.write_family(tmp_path, shapes, torch.bfloat16)
    document = {"merge_method": "tsv_m", "base_model": str(tmp_path / "base")}
    models = [{"model": str(tmp_path / f"e{k}")} for k in (1, 2)]
    plan = fastmerge.plan({**document, "models": models})
    assert plan.flops == (2 * 8 + 20) * 96 * 64 * 64
    seen: list[float] = []
    fastmerge.merge({**document, "models": models}, tmp_path / "out", on_flops=seen.append)
    assert seen == [plan.flops]
