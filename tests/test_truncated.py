"""Truncated decompositions: their residual against the least there is, over kinds of spectra."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmerge.linalg import Term, Truncated, factored_svd, truncated_svd

I = torch.arange(1, 257, dtype=torch.float64)  # noqa: E741
SPECTRA = {
    "i^-0.5": I**-0.5,
    "i^-1": I**-1,
    "i^-2": I**-2,
    "exponential": torch.exp(-I / 10),
    "equal": torch.ones(256, dtype=torch.float64),
    "rank 20": I**-1 * (I <= 20),
    "condition 1e12": 10 ** (-12 * I / 256),
    "one large": torch.where(I == 1, 1e6, 1.0).double(),
    "tiny": 1e-20 * I**-1,
}
SHAPES = [(256, 300), (300, 256)]
TYPES = [torch.float32, torch.float64]


def with_spectrum(s: Tensor, shape: tuple[int, int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(n, len(s), generator=generator, dtype=torch.float64)).Q
        for n in shape
    )
    return (u * s) @ v.mT


def measured(a: Tensor, found: Truncated) -> float:
    return float((a.double() - found.svd.product().double()).norm() / a.double().norm())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_residual_is_near_the_least(
    spectrum: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    s = SPECTRA[spectrum]
    a = with_spectrum(s, shape).to(dtype)
    for rank in (1, 4, 16, 64):
        found = truncated_svd(a, rank)
        least = float(s[rank:].norm() / s.norm())
        # What rounding leaves of a matrix whose rank this is: of its entries, and of products.
        floor = 1e-14 if dtype is torch.float64 else 2e-6
        assert measured(a, found) <= 1.01 * least + floor, (rank, found.exact)
        assert found.residual == pytest.approx(measured(a, found), rel=1e-3, abs=floor)
        assert found.norm == pytest.approx(float(a.double().norm()), rel=1e-6)
        assert not found.exact
        u, _, vh = found.svd
        eye = torch.eye(u.shape[1], dtype=dtype)
        assert torch.allclose(u.mT @ u, eye, atol=1e-4)
        assert torch.allclose(vh @ vh.mT, eye, atol=1e-4)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("error", [0.5, 0.1, 0.02, 1e-4])
def test_targets_are_met_by_the_least_rank(
    error: float, spectrum: str, exact: bool, dtype: torch.dtype
) -> None:
    s = SPECTRA[spectrum]
    a = with_spectrum(s, SHAPES[0]).to(dtype)
    found = truncated_svd(a, error=error, exact=exact)
    assert measured(a, found) <= error * (1 + 1e-5)
    left = s.square().flip(0).cumsum(0).flip(0).sqrt() / s.norm()
    least = int((left > error).sum())
    k = len(found.svd.s)
    assert least <= k <= (least if found.exact else math.ceil(1.03 * least) + 1)
    energy = truncated_svd(a, energy=1 - error**2, exact=exact)
    assert abs(len(energy.svd.s) - k) <= 1


def test_rounding_of_the_matrix_is_no_triple() -> None:
    a = with_spectrum(SPECTRA["rank 20"], SHAPES[0])
    for dtype in TYPES:
        for exact in (True, False):
            assert len(truncated_svd(a.to(dtype), 64, exact=exact).svd.s) == 20
            assert len(truncated_svd(a.to(dtype), error=0.0, exact=exact).svd.s) >= 20


def test_nothing_to_keep() -> None:
    none = truncated_svd(torch.zeros(7, 5), 3)
    assert (none.norm, none.residual, len(none.svd.s)) == (0.0, 0.0, 0)
    assert none.svd.product().shape == (7, 5)
    empty = truncated_svd(torch.zeros(0, 5), 3)
    assert empty.svd.product().shape == (0, 5)


def test_seed_and_steps_decide() -> None:
    a = with_spectrum(SPECTRA["i^-0.5"], SHAPES[0])
    one, same, other = (truncated_svd(a, 16, seed=k) for k in (1, 1, 2))
    assert torch.equal(one.svd.u, same.svd.u) and not torch.equal(one.svd.u, other.svd.u)
    assert truncated_svd(a, 16, steps=8).residual < truncated_svd(a, 16, steps=0).residual


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    rank=st.one_of(st.none(), st.integers(1, 12)),
    seed=st.integers(0, 2**31),
)
def test_factors_give_the_triples_of_their_sum(
    shape: tuple[int, int], ranks: list[int], rank: int | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    m, n = shape

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    terms = [Term(float(normal(1)), normal(m, r), normal(r, n)) for r in ranks]
    dense = sum((t.scale * t.b @ t.a for t in terms), torch.zeros(m, n, dtype=torch.float64))
    found = factored_svd(terms, rank)
    s = torch.linalg.svdvals(dense)
    most = min(m, n, sum(ranks))
    k = most if rank is None else min(rank, most)
    assert len(found.svd.s) == k
    scale = max(float(s[0]), 1e-9)
    assert torch.allclose(found.svd.s, s[:k], atol=1e-11 * scale)
    missed = float((dense - found.svd.product()).norm())
    assert missed <= float(s[k:].norm()) + 1e-10 * scale
    assert found.residual * found.norm == pytest.approx(float(s[k:].norm()), abs=1e-10 * scale)


@pytest.mark.parametrize("rank", [8, 20, None])
@pytest.mark.parametrize("apart", [1.0, 1e-2, 1e-5, 1e-8, 0.0])
def test_factors_that_are_nearly_the_same_give_the_triples_too(
    apart: float, rank: int | None
) -> None:
    """As of adapters that started from one initialisation: a Cholesky factor of theirs tells too little."""
    generator = torch.Generator().manual_seed(3)
    b, a = torch.randn(2, 90, 16, generator=generator), torch.randn(2, 16, 70, generator=generator)
    terms = [Term(1.0, b[0], a[0]), Term(-0.5, b[1], a[0] + apart * a[1])]
    dense = torch.stack([t.scale * t.b.double() @ t.a.double() for t in terms]).sum(0)
    found = factored_svd(terms, rank)
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    k = len(found.svd.s)
    assert k == min(rank or 32, 32 if apart else 16)
    missed = found.svd.product() - (u[:, :k] * s[:k]) @ vh[:k]
    assert float(missed.norm()) < 1e-9 * float(dense.norm())
    for basis in (found.svd.u.mT, found.svd.vh):
        assert float((basis @ basis.mT - torch.eye(k)).norm()) < 1e-9


def test_factors_that_cancel_leave_nothing() -> None:
    b, a = torch.randn(30, 4), torch.randn(4, 20)
    found = factored_svd([Term(0.3, b, a), Term(-0.1, b, a), Term(-0.2, b, a)])
    assert len(found.svd.s) == 0 and found.svd.product().shape == (30, 20)
    assert found.norm < 1e-12
