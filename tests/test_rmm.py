"""Reversible Model Merging: principal directions of small matrices, and packs that give back each model."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastmerge
from fastmerge.cli import main
from fastmerge.errors import RecipeError
from fastmerge.linalg import tiny
from fastmerge.linalg.tiny import principal
from fastmerge.packs.reversible import aligned, padded_factors, shared_term
from fastmerge.packs.terms import factors

SHAPES = {
    "model.layers.0.self_attn.q_proj.weight": (40, 40),
    "model.layers.0.mlp.up_proj.weight": (56, 40),
    "model.norm.weight": (40,),
    "lm_head.weight": (50, 40),
}
Q, UP, NORM, HEAD = SHAPES


def points(n: int, r: int, t: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, r, t, generator=generator, dtype=torch.float64)


# ---- many small matrices -------------------------------------------------------------------------

sizes = st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 7))


@given(sizes, st.integers(0, 99), st.sampled_from([1e-6, 1.0, 1e6]))
def test_enough_directions_are_exact(size: tuple[int, int, int], seed: int, scale: float) -> None:
    _, r, t = size
    x = scale * points(*size, seed)
    for p in range(min(r, t - 1), min(r, t) + 1):
        assert torch.allclose(principal(x, p).product(), x, rtol=0, atol=1e-13 * scale * 10)


@given(sizes, st.integers(0, 99))
def test_the_squared_error_is_what_is_discarded(size: tuple[int, int, int], seed: int) -> None:
    _, r, t = size
    x = points(*size, seed)
    s = torch.linalg.svdvals(x - x.mean(2, keepdim=True))
    errors = []
    for p in range(min(r, t) + 1):
        found = principal(x, p)
        error = (found.product() - x).square().sum((1, 2))
        assert torch.allclose(error, found.discarded, rtol=1e-9, atol=1e-12)
        assert torch.allclose(error, s[:, p:].square().sum(1), rtol=1e-9, atol=1e-12)
        errors.append(error)
    assert all(bool((b <= a + 1e-12).all()) for a, b in itertools.pairwise(errors))


def test_directions_are_those_of_the_decomposition() -> None:
    x = points(5, 6, 4)
    found = principal(x, 2)
    u, s, vh = torch.linalg.svd(x - x.mean(2, keepdim=True), full_matrices=False)
    want = (u[..., :2] * s[:, None, :2]) @ vh[:, :2]
    assert torch.allclose(found.basis @ found.coef, want, atol=1e-12)
    assert torch.allclose(found.basis.mT @ found.basis, torch.eye(2).double(), atol=1e-12)
    assert torch.allclose(found.mean, x.mean(2))


@pytest.mark.parametrize(("r", "t"), [(3, 6), (6, 3)])
def test_order_of_points_and_size_of_batches_do_not_matter(
    r: int, t: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = points(11, r, t)
    whole = principal(x, 2)
    order = torch.randperm(t, generator=torch.Generator().manual_seed(1))
    turned = principal(x[..., order], 2)
    assert torch.allclose(turned.product(), whole.product()[..., order], atol=1e-12)
    monkeypatch.setattr(tiny, "BATCH", 4)
    for a, b in zip(principal(x, 2), whole, strict=True):
        assert torch.equal(a, b)


def test_float32_points_are_decomposed_in_float64() -> None:
    x = points(4, 8, 3)
    x += 1e3  # centred first: what E[x^2] - mean^2 would lose
    found = principal(x.float(), 2)
    assert found.basis.dtype is torch.float32
    want = x.float().double()
    assert float((found.product().double() - want).abs().max()) < 1e-3 * 2**-9


def test_nothing_and_equal_points() -> None:
    assert principal(points(0, 3, 2), 1).product().shape == (0, 3, 2)
    found = principal(torch.ones(2, 3, 4), 1)
    assert torch.equal(found.product(), torch.ones(2, 3, 4)) and not found.discarded.any()


# ---- factors -------------------------------------------------------------------------------------


def test_signs_follow_the_reference() -> None:
    delta = points(1, 9, 7)[0]
    left, right = padded_factors(delta, 4)
    flipped = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None].double()
    for reference in (0, 1):
        for a, b in aligned([(left, right), (left * flipped, right * flipped)], reference):
            sign = flipped if reference else 1.0
            assert torch.allclose(a, left * sign) and torch.allclose(b, right * sign)


def test_changes_of_low_rank_have_rows_of_zeros() -> None:
    left, right = padded_factors(torch.zeros(5, 3), 2)
    assert left.shape == (2, 5) and right.shape == (2, 3) and not left.any()


@pytest.mark.parametrize("p", [0, 1, 2, 3])
def test_a_shared_term_decodes_to_each_models_factors(p: int) -> None:
    given_factors = [padded_factors(d, 5) for d in points(4, 12, 9)]
    term = shared_term(given_factors, p, 0, "float64")
    n = sum(part.numel() for part in term.parts.values())
    # (p (r + T) + r) / (r T) of the factors' numbers
    assert n == (12 + 9) * (p * (5 + 4) + 5)
    for t, (left, right) in enumerate(aligned(given_factors, 0)):
        a, b = factors(term, (12, 9), t)
        close = torch.allclose(a, left, atol=1e-12) and torch.allclose(b, right, atol=1e-12)
        assert close == (p == 3)


# ---- packs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    families.write_family(root, SHAPES, torch.float32, 4)
    return root


def made(models: Path, out: Path, names: str = "1234", **options: Any) -> Any:
    return fastmerge.rmm([models / f"e{k}" for k in names], models / "base", out, **options)


def truncated(models: Path, expert: str, name: str, rank: int) -> Tensor:
    base, model = (families.load(models / m)[name] for m in ("base", expert))
    u, s, vh = torch.linalg.svd((model - base).double(), full_matrices=False)
    return base.double() + (u[:, :rank] * s[:rank]) @ vh[:rank]


def test_enough_directions_restore_every_model(models: Path, tmp_path: Path) -> None:
    made(models, tmp_path / "pack", rank=6, p=3)
    for index, expert in enumerate(("e1", "e2", "e3", "e4")):
        model: str | int = expert if index % 2 else index
        fastmerge.revert(tmp_path / "pack", model, models / "base", tmp_path / expert)
        out, own = families.load(tmp_path / expert), families.load(models / expert)
        for name in (Q, UP):
            want = truncated(models, expert, name, 6)
            assert torch.allclose(out[name].double(), want, atol=1e-6)
        for name in (NORM, HEAD):
            assert torch.allclose(out[name], own[name], rtol=1e-6, atol=1e-7)


def test_fewer_directions_lose_more_and_take_less(models: Path, tmp_path: Path) -> None:
    reports = [made(models, tmp_path / str(p), rank=6, p=p).modules for p in range(4)]
    for rows in zip(*reports, strict=True):
        if rows[0].name in (Q, UP):
            assert [r.residual for r in rows] == sorted((r.residual for r in rows), reverse=True)
            assert [r.n_bytes for r in rows] == sorted(r.n_bytes for r in rows)
            m, n = rows[0].shape
            for p, row in enumerate(rows):
                assert row.n_bytes == 4 * (m + n) * (p * (6 + 4) + 6)


def test_order_of_models_does_not_matter(models: Path, tmp_path: Path) -> None:
    made(models, tmp_path / "a", "1234", rank=6, p=1, reference=0)
    made(models, tmp_path / "b", "4321", rank=6, p=1, reference=3)
    for expert in ("e1", "e3"):
        for pack in "ab":
            out = tmp_path / (pack + expert)
            fastmerge.revert(tmp_path / pack, expert, models / "base", out)
        a, b = (families.load(tmp_path / (pack + expert)) for pack in "ab")
        assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


def test_options_of_other_packs_hold(models: Path, tmp_path: Path) -> None:
    report = made(
        models, tmp_path / "p", rank=4, tables="matrix", exclude="up_proj", dtype="float16"
    )
    terms = {row.name: row.terms for row in report.modules}
    assert terms[HEAD] == terms[Q] == "shared_low_rank 4 1 float16"
    assert terms[UP] == "raw float16" and terms[NORM] == "raw float32"
    report = made(models, tmp_path / "q", rank=40, p=3)
    assert {row.terms for row in report.modules} == {"raw float32"}  # factors would take more


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        ("1", {}, "two models or more, got 1"),
        ("12", {"rank": 0}, "rank must be at least 1"),
        ("12", {"p": -1}, "p must be at least 0"),
        ("12", {"reference": 2}, r"reference must be in \[0, 1\], got 2"),
        ("12", {"rang": 2}, "strategy rmm has no option 'rang'; did you mean 'rank'"),
    ],
)
def test_bad_options_are_refused(
    names: str, options: dict[str, Any], words: str, models: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=words):
        made(models, tmp_path / "pack", names, **options)


def test_commands_pack_and_revert(models: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    experts = [str(models / f"e{k}") for k in (1, 2, 3)]
    base, pack, out = str(models / "base"), str(tmp_path / "pack"), str(tmp_path / "out")
    words = ["rmm", *experts, base, "--out", pack, "--rank", "4", "--p", "2", "-o", "dtype=float32"]
    done = runner.invoke(main, words)
    assert done.exit_code == 0 and "shared_low_rank 4 2 float32" in done.output, done.output
    done = runner.invoke(main, ["revert", pack, "--model", "e2", "--base", base, "--out", out])
    assert done.exit_code == 0 and "4 of them changed" in done.output, done.output
    want = truncated(models, "e2", Q, 4)
    assert torch.allclose(families.load(tmp_path / "out")[Q].double(), want, atol=1e-6)
