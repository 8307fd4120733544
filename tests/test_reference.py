"""The reference backend against scalar definitions: draws, rounding, cuts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from reference_drive import (
    END,
    KERNELS,
    M32,
    awkward,
    bits_of,
    buffer,
    chunk,
    sort_key,
    sweep,
    walk,
)

from fastmerge.backends import Chunk
from fastmerge.backends.reference_arithmetic import (
    draws,
    key_of,
    philox,
    ranks_of,
    rounded,
    variance,
)
from fastmerge.dtypes import DType
from fastmerge.stages import (
    Axis,
    Cut,
    Drop,
    GivenMask,
    Keep,
    OrderStatistic,
    RankedDrop,
    Select,
    Trim,
    Walk,
)

# ---- draws ---------------------------------------------------------------------------------------


def scalar_philox(counter: Sequence[int], key: int) -> list[int]:
    c, k0, k1 = list(counter), key & M32, key >> 32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k0, p1 & M32, p0 >> 32 ^ c[3] ^ k1, p0 & M32]
        k0, k1 = (k0 + 0x9E3779B9) & M32, (k1 + 0xBB67AE85) & M32
    return c


def scalar_draw(key: int, i: int, bits: int) -> int:
    if bits == 32:
        return scalar_philox([(i >> 2) & M32, i >> 34, 0, 0], key)[i & 3]
    j = i & 7
    word = scalar_philox([(i >> 3) & M32, i >> 35, 0, 0], key)[j >> 1]
    return word >> 16 if j & 1 else word & 0xFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([M32] * 4, [M32] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_answers(
    counter: list[int], key: list[int], words: list[int]
) -> None:
    got = philox([torch.tensor([c]) for c in counter], key[0] | key[1] << 32)
    assert [int(w) for w in got] == words
    assert scalar_philox(counter, key[0] | key[1] << 32) == words


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("first", [0, 5, 2**35 - 9, 2**40 + 3])
def test_draws_follow_the_counter_convention(bits: int, first: int) -> None:
    key = 0xFEDCBA9876543210
    index = torch.arange(first, first + 40)
    want = [scalar_draw(key, i, bits) for i in index.tolist()]
    assert draws(key, index, bits).tolist() == want


PROBABILITIES = [0.0, 1.0, 1e-12, 0.001, 0.00499, 0.005, 0.1, 0.5, 0.995, 0.9951, 1 - 1e-12]


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("compute", [DType.F32, DType.F64])
def test_drop_compares_draws_to_the_threshold_and_rescales(p: float, compute: DType) -> None:
    n, key = 777, 0x0123456789ABCDEF
    real = getattr(torch, compute.torch)
    x = torch.linspace(1, 2, n, dtype=real)
    full = 2**32 if 0 < p < 0.005 or 0.995 < p < 1 else 2**16
    t = min(max(math.floor(p * full + 0.5), 1), full - 1)
    kept = [
        p >= 1 or (p > 0 and scalar_draw(key, i, 32 if full > 2**16 else 16) < t) for i in range(n)
    ]
    keep = Keep(drop=Drop([p], [key], rescale=True))
    assert KERNELS.keep_mask(keep, chunk(None, [x], 7, compute))[0].astype(bool).tolist() == kept
    inv = torch.tensor(full / t if 0 < p < 1 else 1.0, dtype=torch.float64).to(real)
    out, _ = walk(
        Walk(np.ones((1, 1)), keep=keep, add_base=False), chunk(None, [x], 7, compute), real
    )
    assert torch.equal(out, torch.where(torch.tensor(kept), x * inv, torch.zeros_like(x)))


def test_given_masks_replace_the_draw_and_rescale_by_the_exact_probability() -> None:
    x = torch.arange(1.0, 7.0)
    masks = [np.array([0, 1, 2, 0, 255, 1], np.uint8)]
    kept = torch.tensor(masks[0] != 0)
    for p in (0.0, 0.3, 1.0):
        keep = Keep(drop=Drop([p], [5], rescale=True), given=GivenMask(masks))
        inv = torch.tensor(1 / p if 0 < p < 1 else 1.0)
        w = Walk(np.ones((1, 1)), keep=keep, add_base=False)
        out, _ = walk(w, chunk(None, [x], 6), torch.float32)
        assert torch.equal(out, torch.where(kept, x * inv, torch.zeros(6)))
    ranked = RankedDrop([0.2], [0.9], [5], Axis.TENSOR, rescale=True)
    p_i = KERNELS.keep_probability(ranked, chunk(None, [x], 6))
    w = Walk(
        np.ones((1, 1)),
        keep=Keep(drop=ranked, given=GivenMask([torch.tensor(masks[0])])),
        add_base=False,
    )
    out, _ = walk(w, chunk(None, [x], 6), torch.float32)
    inv = torch.tensor(1.0 / p_i[0]).to(torch.float32)
    assert torch.equal(out, torch.where(kept, x * inv, torch.zeros(6)))


@pytest.mark.parametrize("axis", [Axis.ROW, Axis.TENSOR])
@pytest.mark.parametrize("by", ["rank", "value"])
@pytest.mark.parametrize("cols", [1, 6, 60])
def test_ranked_drop_matches_scalars(axis: Axis, by: Any, cols: int) -> None:
    rng = np.random.default_rng(cols)
    n, keys = 60, [3, 2**63 + 11, 9, 10]
    # The third and fourth never draw, whatever their formula gives.
    low, high = [0.0, 0.3, 1.0, 0.4], [1.0, 0.6, 0.2, 0.0]
    experts = [
        awkward(rng, n),
        torch.tensor(rng.standard_normal(n)).float(),
        *[awkward(rng, n)] * 2,
    ]
    drop = RankedDrop(low, high, keys, axis, by, rescale=True)
    c = chunk(None, experts, cols)
    mask, probability = KERNELS.keep_mask(Keep(drop=drop), c), KERNELS.keep_probability(drop, c)
    length = cols if axis is Axis.ROW else n
    for k, x in enumerate(experts):
        sizes = [abs(float(v)) for v in x]
        out, _ = walk(
            Walk(np.eye(4)[k][:, None], keep=Keep(drop=drop), add_base=False), c, torch.float32
        )
        for i in range(n):
            first = i // length * length
            unit = sizes[first : first + length]
            if by == "value":
                q = (sizes[i] - min(unit)) / ((max(unit) - min(unit)) + 1e-7)
            elif length == 1:
                q = 0.5
            else:
                order = sorted((size, j) for j, size in enumerate(unit))
                q = order.index((sizes[i], i - first)) / (length - 1)
            p = low[k] + (high[k] - low[k]) * q
            assert probability[k, i] == p
            t = min(max(math.floor(p * 65536 + 0.5), 0), 65536)
            kept = scalar_draw(keys[k], i, 16) < t
            inv = np.float32(65536.0 / t) if t else np.float32(0)
            if low[k] >= 1 or high[k] <= 0:
                kept, inv = low[k] >= 1, np.float32(1)
            assert bool(mask[k, i]) == kept
            assert float(out[i]) == (float(np.float32(x[i]) * inv) if kept else 0.0)


def test_a_ranked_drop_without_chance_gives_zero_not_nan() -> None:
    x = torch.tensor([0.0, -3.0, 5.0])
    drop = RankedDrop([0.0], [1.0], [1], Axis.TENSOR, "rank", rescale=True)
    c = chunk(None, [x], 3)
    assert KERNELS.keep_probability(drop, c)[0].tolist() == [0.0, 0.5, 1.0]
    given = GivenMask([np.array([0, 0, 1], np.uint8)])
    for keep in (Keep(drop=drop), Keep(drop=drop, given=given)):
        out, _ = walk(Walk(np.ones((1, 1)), keep=keep, add_base=False), c, torch.float32)
        assert out[0] == 0 and out[2] == 5  # 1 / p_0 is infinite, and element 0 is not kept


def test_nan_in_a_unit_drops_what_has_no_probability() -> None:
    x = torch.tensor([1.0, math.nan, 2.0, 1.0, 2.0, 3.0])
    drop = RankedDrop([0.9], [0.99], [1], Axis.ROW, "value")
    c = chunk(None, [x], 3)
    p = KERNELS.keep_probability(drop, c)[0]
    assert np.isnan(p).tolist() == [True] * 3 + [False] * 3
    assert KERNELS.keep_mask(Keep(drop=drop), c)[0, :3].tolist() == [0, 0, 0]


# ---- rounding ------------------------------------------------------------------------------------


def nearest_even(x: Fraction, mantissa: int, least: int, most: int) -> Fraction | None:
    """Round |x| to `mantissa` explicit bits, exponents in [least, most]; None is infinity."""
    if x == 0:
        return x
    exponent = least
    while Fraction(2) ** (exponent + 1) <= x:
        exponent += 1
    unit = Fraction(2) ** (exponent - mantissa)
    out = round(x / unit) * unit  # Fraction rounds half to even
    return None if out >= Fraction(2) ** (most + 1) else out


FORMATS = {torch.bfloat16: (7, -126, 127), torch.float16: (10, -14, 15)}


@pytest.mark.parametrize("dtype", list(FORMATS))
def test_float64_rounds_once_at_and_beside_every_kind_of_midpoint(dtype: torch.dtype) -> None:
    mantissa, _, most = FORMATS[dtype]
    every = torch.arange(0, 2**15, dtype=torch.int16).view(dtype).to(torch.float64)
    finite = every[every.isfinite()]
    mid = (finite[:-1] + finite[1:]) / 2  # exact: two more bits than either neighbour
    top = torch.tensor([2.0 ** (most + 1) - 2.0 ** (most - mantissa - 1)], dtype=torch.float64)
    mid = torch.cat([mid, top])
    up, down = torch.full_like(mid, math.inf), torch.zeros_like(mid)
    points = torch.cat([mid, mid.nextafter(up), mid.nextafter(down)])
    # Round-half-even by index: neighbours of midpoint i are patterns i and i + 1.
    i = torch.arange(len(mid))
    want = torch.cat([i + (i & 1), i + 1, i])
    for sign in (1, -1):
        got = bits_of(rounded(points * sign, dtype)).to(torch.int64)
        assert torch.equal(got & 0x7FFF, want)
        assert bool(((got < 0) == (sign < 0)).all())
    exact = rounded(finite, dtype)
    assert torch.equal(bits_of(exact), torch.arange(len(finite), dtype=torch.int16))


@pytest.mark.parametrize("dtype", list(FORMATS))
@pytest.mark.parametrize("real", [torch.float32, torch.float64])
def test_rounding_equals_rational_rounding(dtype: torch.dtype, real: torch.dtype) -> None:
    rng = np.random.default_rng(1)
    low, high = (-150, 129) if dtype is torch.bfloat16 else (-28, 17)
    raw = rng.standard_normal(400) * 2.0 ** rng.integers(low, high, 400)
    x = torch.tensor(raw).to(real)
    x = x[x.isfinite()]
    for v, got in zip(x.tolist(), rounded(x, dtype).tolist(), strict=True):
        want = nearest_even(abs(Fraction(v)), *FORMATS[dtype])
        assert abs(got) == (math.inf if want is None else want)
        assert math.copysign(1, got) == math.copysign(1, v)


def test_fp16_overflows_at_65520() -> None:
    x = torch.tensor([65519.99, 65520.0, -65520.0, 1e300], dtype=torch.float64)
    assert rounded(x, torch.float16).tolist() == [65504.0, math.inf, -math.inf, math.inf]


@pytest.mark.parametrize("real", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("dtype", "quiet"),
    [
        (torch.bfloat16, 0x7FC0),
        (torch.float16, 0x7E00),
        (torch.float32, 0x7FC00000),
        (torch.float64, 0x7FF8000000000000),
    ],
)
def test_nan_is_stored_without_payload_and_with_its_sign(
    real: torch.dtype, dtype: torch.dtype, quiet: int
) -> None:
    if real is torch.float32:
        patterns = torch.tensor([0x7FC12345, 0x7FFFFFFF, 0x7F800001] * 20, dtype=torch.int32)
        patterns = torch.cat([patterns, patterns | torch.iinfo(torch.int32).min])
    else:
        patterns = torch.tensor([0x7FF8 << 48 | 77, END, 0x7FF0 << 48 | 1] * 20)
        patterns = torch.cat([patterns, patterns | torch.iinfo(torch.int64).min])
    got = bits_of(rounded(patterns.view(real), dtype)).tolist()
    width = torch.empty(0, dtype=dtype).element_size() * 8
    assert got == [quiet] * 60 + [quiet - 2 ** (width - 1)] * 60
    assert len(set(key_of(patterns.view(real)).tolist())) == 1


def test_subnormals_and_zero_signs_survive_a_walk() -> None:
    x = torch.tensor([1e-45, -1e-45, 0.0, -0.0, 1e-40])
    out, _ = walk(Walk(np.ones((1, 1)), add_base=False), chunk(None, [x], 5), torch.float32)
    assert torch.equal(bits_of(out), bits_of(x))
    kept_base, _ = walk(Walk(np.ones((0, 1))), chunk_without_experts(x), torch.float64)
    assert torch.equal(bits_of(kept_base), bits_of(x.double()))


def chunk_without_experts(base: torch.Tensor) -> Chunk:
    return Chunk(buffer(base), [], 0, base.numel(), base.numel(), DType.F32)


# ---- cuts ----------------------------------------------------------------------------------------


def brute_above(x: Sequence[float], rank: int) -> set[int]:
    """The `rank` elements of largest magnitude, lower indices first among equals."""
    order = sorted(range(len(x)), key=lambda i: (not math.isnan(x[i]), -sort_key(x[i])[1], i))
    return set(order[: max(rank, 0)])


def tensors_with_ties(n: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(n)
    nonfinite = awkward(rng, n)
    nonfinite[::5], nonfinite[1::7] = math.nan, -math.inf
    return {
        "normal": torch.tensor(rng.standard_normal(n)).float(),
        "ties": awkward(rng, n),
        "equal": torch.full((n,), -1.5),
        "zeros": torch.tensor([0.0, -0.0] * n)[:n],
        "subnormal": torch.tensor(rng.integers(-5, 6, n) * 1.4e-45).float(),
        "nonfinite": nonfinite,
    }


@pytest.mark.parametrize("kind", list(tensors_with_ties(1)))
@pytest.mark.parametrize("n", [1, 2, 37])
def test_a_cut_keeps_exactly_the_largest(kind: str, n: int) -> None:
    x = tensors_with_ties(n)[kind]
    c = chunk(None, [x], n)
    ranks = [-1, 0, *range(1, n + 2)]
    cuts = sweep(OrderStatistic([ranks]), [c], n)
    for rank, cut in zip(ranks, cuts, strict=True):
        if rank <= 0:  # only NaN is above infinity
            assert (cut.value[0, 0], cut.last_tie[0, 0]) == (math.inf, -1)
            want = {i for i in range(n) if x[i].isnan()}
        elif rank >= n:
            assert (cut.value[0, 0], cut.last_tie[0, 0]) == (-1, END)
            want = set(range(n))
        else:
            want = brute_above(x.tolist(), rank)
        mask = KERNELS.keep_mask(Keep(trim=Trim(cut)), c)[0]
        assert set(np.flatnonzero(mask)) == want
    rank = n // 2
    (cut,) = sweep(OrderStatistic([[rank]], all_ties=True), [c], n)
    if rank > 0:
        mask = KERNELS.keep_mask(Keep(trim=Trim(cut)), c)[0]
        least = min(sort_key(x.tolist()[i]) for i in brute_above(x.tolist(), rank))
        assert set(np.flatnonzero(mask)) == {
            i for i in range(n) if sort_key(x.tolist()[i]) >= least
        }
        assert cut.last_tie[0, 0] == END


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 1.0])
def test_fraction_of_nonzero_counts_nonzero_elements(fraction: float) -> None:
    for kind, x in tensors_with_ties(37).items():
        if kind == "nonfinite":
            continue
        c = chunk(None, [x], 37)
        (cut,) = sweep(OrderStatistic(fraction_of_nonzero=fraction), [c], 37)
        n_nonzero = int((x != 0).sum())
        mask = KERNELS.keep_mask(Keep(trim=Trim(cut)), c)[0]
        assert set(np.flatnonzero(mask)) == brute_above(x.tolist(), int(fraction * n_nonzero))
        if fraction == 1 and n_nonzero:
            assert (cut.value[0, 0], cut.last_tie[0, 0]) == (0, -1)


def test_row_cuts_hold_flat_indices_and_apply_per_row() -> None:
    rng = np.random.default_rng(3)
    rows, cols = 6, 9
    base, experts = awkward(rng, 54), [awkward(rng, 54) for _ in range(2)]
    chunks = [chunk(base, experts, cols, start=a, stop=b) for a, b in ((0, 18), (18, 54))]
    keeps, removes = sweep(OrderStatistic([[5, 2]] * 2, scope="row"), chunks, 54)
    assert keeps.axis is Axis.ROW and keeps.value.shape == (2, rows)
    whole = KERNELS.keep_mask(Keep(trim=Trim(keeps, removes)), chunk(base, experts, cols))
    for k in range(2):
        delta = (experts[k] - base).tolist()
        for r in range(rows):
            row = delta[r * cols : (r + 1) * cols]
            want = brute_above(row, 5) - brute_above(row, 2)
            assert set(np.flatnonzero(whole[k, r * cols : (r + 1) * cols])) == want
            first = r * cols
            assert first <= keeps.last_tie[k, r] < first + cols
    parts = [KERNELS.keep_mask(Keep(trim=Trim(keeps, removes)), c) for c in chunks]
    assert np.array_equal(np.concatenate(parts, 1), whole)


def test_cuts_by_column_apply_per_column() -> None:
    x = torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0, 2.0])
    cut = Cut(np.array([[2.0, 1.0, -1.0]]), np.array([[5, 3, -1]]), Axis.COLUMN)
    mask = KERNELS.keep_mask(Keep(trim=Trim(cut)), chunk(None, [x], 3))
    assert mask.tolist() == [[0, 1, 1, 1, 1, 1]]


def test_model_cuts_are_over_all_tensors_in_the_order_they_come() -> None:
    rng = np.random.default_rng(4)
    x = awkward(rng, 50)
    pieces = [(0, 0, 20), (0, 20, 21), (21, 0, 29)]  # offset, start, stop of the part in its tensor
    chunks = [
        Chunk(None, [buffer(x).slice(o + a, o + b)], a, b - a, 1, DType.F32) for o, a, b in pieces
    ]
    for rank in range(52):
        (got,) = sweep(
            OrderStatistic([[rank]], scope="model"), chunks, 50, [o for o, _, _ in pieces]
        )
        (want,) = sweep(OrderStatistic([[rank]]), [chunk(None, [x], 1)], 50)
        assert (got.value, got.last_tie) == (want.value, want.last_tie)


@pytest.mark.parametrize("compute", [DType.F32, DType.F64])
def test_variance_matches_scalars_and_selects(compute: DType) -> None:
    rng = np.random.default_rng(6)
    scalar = np.float32 if compute is DType.F32 else np.float64
    dtype = torch.float32 if compute is DType.F32 else torch.float64
    x = torch.tensor(rng.standard_normal((3, 20))).to(dtype)
    want = []
    for i in range(20):
        d = [scalar(v) for v in x[:, i].tolist()]
        mean = ((d[0] + d[1]) + d[2]) / scalar(3)
        e = [v - mean for v in d]
        want.append(((e[0] * e[0] + e[1] * e[1]) + e[2] * e[2]) / scalar(3))
    assert variance(x)[0].tolist() == [float(v) for v in want]
    c = chunk(None, list(x), 20, compute)
    (cut,) = sweep(OrderStatistic([[6]], of="variance"), [c], 20)
    assert cut.value.shape == (1, 1)
    mask = KERNELS.keep_mask(Keep(select=Select(cut)), c)
    for k in range(3):
        assert set(np.flatnonzero(mask[k])) == brute_above([float(v) for v in want], 6)


def test_ranks_count_smaller_and_earlier_equal_elements() -> None:
    for x in tensors_with_ties(37).values():
        keys = key_of(x).tolist()
        want = [
            sum(other < key or (other == key and j < i) for j, other in enumerate(keys))
            for i, key in enumerate(keys)
        ]
        assert ranks_of(key_of(x)).tolist() == want
