"""Methods that decompose: against their oracles, what each must obey, and in merges of files."""

from __future__ import annotations

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
from fastmerge.linalg import polar, spectrum, svd
from fastmerge.methods.matrices import TABLES

#: (method, parameters)
RULES: list[tuple[str, dict[str, Any]]] = [
    ("tsv_m", {}),
    ("tsv_m", {"weight": [0.5, 1.0, 2.0], "lambda": 0.7, "rank_fraction": 0.2}),
    ("tsv_m", {"mode": "compat"}),
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


@pytest.mark.parametrize("method", METHODS)
def test_order_of_experts_does_not_matter(method: str) -> None:
    deltas = [decaying(k, (33, 65)) for k in range(3)]
    params = {"mu": 0.2} if method == "lore" else {}
    a = merged_delta(method, deltas, **params)
    assert apart(merged_delta(method, deltas[::-1], **params), a) < 1e-9


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("wudi", "optmerge", "lore")])
def test_scaled_deltas_give_a_scaled_result(method: str) -> None:
    deltas = [decaying(k, (33, 65)) for k in range(3)]
    a = merged_delta(method, deltas)
    for c in (1e4, 1e-6):
        assert apart(merged_delta(method, [c * d for d in deltas]), c * a) < 1e-8


@pytest.mark.parametrize("method", [m for m in METHODS if m != "wudi"])
def test_rotated_deltas_give_a_rotated_result(method: str) -> None:
    """Adam goes coordinate by coordinate; all others know no axes."""
    deltas = [decaying(k, (33, 65)) for k in range(3)]
    p, q = (torch.linalg.qr(decaying(7 + n, (n, n), 0.1)).Q for n in (33, 65))
    params = {"mu": 0.2} if method == "lore" else {}
    a = merged_delta(method, deltas, **params)
    turned = merged_delta(method, [p @ d @ q for d in deltas], **params)
    assert apart(turned, p @ a @ q) < 1e-8


# ---- primitives ----------------------------------------------------------------------------------


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
