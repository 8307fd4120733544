"""The reference backend against scalar and brute-force renderings of docs/numerics.md."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from fastmerge.backends import Buffer, Chunk
from fastmerge.backends.reference import ReferenceKernels
from fastmerge.backends.reference_arithmetic import (
    draws,
    key_of,
    philox,
    ranks_of,
    rounded,
    sum_columns,
    sum_units,
    variance,
)
from fastmerge.dtypes import BY_TORCH, DType
from fastmerge.stages import (
    Axis,
    Combine,
    Cut,
    Drop,
    Elect,
    GivenMask,
    Gram,
    Keep,
    Moments,
    OrderStatistic,
    RankedDrop,
    Select,
    SignBalance,
    Trim,
    Walk,
)

KERNELS = ReferenceKernels()
END = 2**63 - 1
M32 = 0xFFFFFFFF


def buffer(x: torch.Tensor) -> Buffer:
    return Buffer(x.data_ptr(), BY_TORCH[str(x.dtype).removeprefix("torch.")], x.numel(), x)


def chunk(
    base: torch.Tensor | None,
    experts: Sequence[torch.Tensor],
    cols: int,
    compute: DType = DType.F32,
    start: int = 0,
    stop: int | None = None,
) -> Chunk:
    """Elements [start, stop) of whole tensors."""
    stop = experts[0].numel() if stop is None else stop
    part = [buffer(x).slice(start, stop) for x in experts]
    return Chunk(
        None if base is None else buffer(base).slice(start, stop),
        part,
        start,
        stop - start,
        cols,
        compute,
    )


def sweep(statistic: Any, chunks: Sequence[Chunk], n: int, offsets: Sequence[int] = ()) -> Any:
    first = chunks[0]
    s = KERNELS.sweep(statistic, n, first.cols, len(first.experts), first.compute)
    for c, offset in zip(chunks, offsets or [0] * len(chunks), strict=True):
        s.feed(c, offset)
    assert not s.next_pass()
    return s.result()


def walk(w: Walk, c: Chunk, out: torch.dtype) -> tuple[torch.Tensor, bool]:
    result = torch.empty(c.n, dtype=out)
    bad = KERNELS.walk(w, c, buffer(result))
    return result, bad


def bits_of(x: torch.Tensor) -> torch.Tensor:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def awkward(rng: np.random.Generator, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Few distinct magnitudes of both signs: ties, both zeros, subnormals."""
    pool = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1e-42, -1e-42, 3e-45, 2.0, -2.0, 1.5]
    return torch.tensor(rng.choice(pool, n)).to(dtype)


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


def sort_key(x: float) -> tuple[bool, float]:
    return (True, 0.0) if math.isnan(x) else (False, abs(x))


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


# ---- sums ----------------------------------------------------------------------------------------


def scalar_tree(parts: Sequence[float]) -> float:
    levels: dict[int, float] = {}
    for part in parts:
        level = 0
        while level in levels:
            part = levels.pop(level) + part
            level += 1
        levels[level] = part
    total = None
    for level in sorted(levels):
        total = levels[level] if total is None else levels[level] + total
    return 0.0 if total is None else total


def scalar_sum(terms: Sequence[float]) -> float:
    parts = []
    for first in range(0, len(terms), 4096):
        lanes = [0.0] * 64
        for s, term in enumerate(terms[first : first + 4096]):
            lanes[s % 64] += term
        half = 32
        while half:
            for j in range(half):
                lanes[j] += lanes[j + half]
            half //= 2
        parts.append(lanes[0])
    return scalar_tree(parts)


def scalar_column_sum(terms: Sequence[float]) -> float:
    parts = []
    for first in range(0, len(terms), 64):
        total = 0.0
        for term in terms[first : first + 64]:
            total += term
        parts.append(total)
    return scalar_tree(parts)


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 4095, 4096, 4097, 3 * 4096, 7 * 4096 + 11])
def test_sums_follow_the_order_and_are_close_to_exact(n: int) -> None:
    rng = np.random.default_rng(n)
    terms = rng.standard_normal((2, n)) * 10.0 ** rng.integers(-8, 8, (2, n))
    got = sum_units(torch.tensor(terms)).tolist()
    for row, total in zip(terms.tolist(), got, strict=True):
        assert total == scalar_sum(row)
        # 64 steps in a lane, 6 halvings, 3 levels: the depth bounds the error.
        assert abs(total - math.fsum(row)) <= 75 * 2**-53 * math.fsum(map(abs, row))
    columns = sum_columns(torch.tensor(terms).T).tolist()
    assert columns == [scalar_column_sum(row) for row in terms.tolist()]


@pytest.mark.parametrize("compute", [DType.F32, DType.F64])
def test_gram_and_moments_match_scalars_for_any_chunking(compute: DType) -> None:
    rng = np.random.default_rng(8)
    rows, cols = 130, 67
    n = rows * cols
    types = [
        torch.bfloat16,
        torch.float16,
        torch.float32 if compute is DType.F32 else torch.float64,
    ]
    base, *experts = (torch.tensor(rng.standard_normal(n)).to(t) for t in [torch.float32, *types])
    real = getattr(torch, compute.torch)
    delta = [(x.to(real) - base.to(real)).double() for x in experts]
    cuts = [0, cols, 5 * cols, 5 * cols, 100 * cols, n]
    chunks = [chunk(base, experts, cols, compute, a, b) for a, b in itertools.pairwise(cuts)]
    whole = [chunk(base, experts, cols, compute)]
    for parts in (whole, chunks):
        by_tensor = sweep(Gram(), parts, n)
        by_row = sweep(Gram(axis=Axis.ROW), parts, n)
        by_column = sweep(Gram(axis=Axis.COLUMN), parts, n)
        assert by_row.shape == (3, 3, rows) and by_column.shape == (3, 3, cols)
        for j, k in itertools.product(range(3), repeat=2):
            terms = (delta[j] * delta[k]).view(rows, cols)
            assert by_tensor[j, k, 0] == scalar_sum(terms.flatten().tolist())
            assert by_row[j, k].tolist() == [scalar_sum(row) for row in terms.tolist()]
            assert by_column[j, k].tolist() == [scalar_column_sum(c) for c in terms.T.tolist()]
    values = sweep(Gram(delta=False), chunks, n)
    x = experts[0].to(real).double()
    assert values[0, 0, 0] == scalar_sum((x * x).tolist())

    keep = Keep(drop=RankedDrop([0.2] * 3, [0.8] * 3, [1, 2, 3], rescale=True))
    mask = KERNELS.keep_mask(keep, whole[0])
    for parts in (whole, chunks):
        moments = sweep(Moments(keep), parts, n)
        for k, d in enumerate(delta):
            v = torch.where(torch.tensor(mask[k]) != 0, d, torch.zeros_like(d))
            for x, total, square, high in (
                (d, moments.abs, moments.square, moments.max),
                (v, moments.abs_kept, moments.square_kept, moments.max_kept),
            ):
                assert total[k] == scalar_sum(x.abs().tolist())
                assert square[k] == scalar_sum((x * x).tolist())
                assert high[k] == float(x.abs().max())


def test_statistics_of_nothing() -> None:
    empty = Chunk(None, [Buffer(0, DType.F32, 0)] * 2, 0, 0, 5, DType.F32)
    moments = sweep(Moments(), [empty], 0)
    assert moments.abs.tolist() == moments.max.tolist() == [0.0, 0.0]
    assert sweep(Gram(), [empty], 0).tolist() == np.zeros((2, 2, 1)).tolist()
    assert sweep(Gram(axis=Axis.ROW), [empty], 0).shape == (2, 2, 0)
    none, some = sweep(OrderStatistic([[0, 1]] * 2), [empty], 0)
    assert none.value.tolist() == [[math.inf]] * 2 and some.value.tolist() == [[-1]] * 2
    walked = Walk(np.ones((2, 1)), add_base=False)
    assert KERNELS.walk(walked, empty, Buffer(0, DType.BF16, 0)) is False


def test_nan_is_the_largest_moment() -> None:
    x = torch.tensor([math.inf, math.nan, 1.0])
    moments = sweep(Moments(), [chunk(None, [x], 3)], 3)
    assert math.isnan(moments.max[0]) and math.isnan(moments.abs[0])


# ---- walk ----------------------------------------------------------------------------------------


def scalar_walk(
    w: Walk, base: Any, v: Sequence[Any], coefficient: Sequence[float], real: Callable[[float], Any]
) -> tuple[Any, int]:
    """Return one coordinate's output in Real and the sign it elects, from its kept values v."""
    zero, n_experts = real(0.0), len(v)
    value = [v[k] * real(coefficient[k]) for k in range(n_experts)]
    combine, elect = w.combine, w.elect
    weight = [real(x) for x in combine.divisor_weight or [1.0] * n_experts]
    total = zero
    if elect is None:
        merged = value[0]
        for x in value[1:]:
            if combine.by == "sum":
                merged = merged + x
            elif sort_key(float(x)) > sort_key(float(merged)):
                merged = x
        nobody, divisor = False, None
    else:
        scale = [real(x) for x in elect.vote_scale or [1.0] * n_experts]
        camps = {s: {"votes": zero, "value": zero, "weight": zero} for s in (1, -1)}
        best = best_vote = zero
        for k in range(n_experts):
            if elect.by == "mass":
                vote = value[k]
            elif elect.by == "count":
                vote = real(1) if v[k] > 0 else real(-1) if v[k] < 0 else v[k]
            elif elect.by == "normmass":
                vote = (v[k] * abs(v[k])) * scale[k]
            else:
                vote = v[k]
            score = (v[k] * v[k]) * scale[k]
            if score > best:
                best, best_vote = score, real(1) if v[k] > 0 else real(-1)
            if vote == 0:
                continue
            camp = camps[1 if vote > 0 else -1]
            camp["votes"] = camp["votes"] + vote
            camp["weight"] = camp["weight"] + weight[k]
            if combine.by == "sum":
                camp["value"] = camp["value"] + value[k]
            elif sort_key(float(value[k])) > sort_key(float(camp["value"])):
                camp["value"] = value[k]
        total = best_vote if elect.by == "normfrac" else camps[1]["votes"] + camps[-1]["votes"]
        nobody = bool(total == 0) and elect.on_zero == "none"
        plus = total > 0 or (total == 0 and elect.on_zero == "plus")
        elected = camps[1 if plus else -1]
        merged, divisor = elected["value"], elected["weight"]
    if nobody:
        merged = zero
    elif combine.divide_by == "constant":
        merged = merged / real(combine.divisor)
    elif combine.divide_by == "weight" and divisor is not None:
        if combine.floor > 0:
            divisor = max(divisor, real(combine.floor))
        elif divisor == 0:
            divisor = real(1)
        merged = merged / divisor
    if combine.lambda_ != 1:
        merged = merged * real(combine.lambda_)
    sign = 1 if total > 0 else 0 if total == 0 else -1
    return (base + merged if w.add_base else merged), sign


def walk_operands(
    nonfinite: bool, seed: int, n: int, n_experts: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Base and experts whose deltas hold zeros of both signs, tied and cancelling votes."""
    rng = np.random.default_rng(seed)
    base = torch.tensor(rng.choice([0.0, -0.0, 1.0, -0.75], n)).float()
    experts = []
    for k in range(n_experts):
        x = torch.tensor(rng.standard_normal(n)).float()
        coarse = torch.tensor(
            rng.choice([0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1e-42, 1e-30], n)
        ).float()
        x = torch.where(torch.tensor(rng.random(n) < 0.7), coarse, x)
        if nonfinite and k != 1:
            x[torch.tensor(rng.random(n) < 0.05)] = math.nan
            x[torch.tensor(rng.random(n) < 0.05)] = math.inf
            x[torch.tensor(rng.random(n) < 0.05)] = -math.inf
        experts.append(x)
    return base, experts


def assert_same_reals(got: torch.Tensor, want: Sequence[Any], what: str) -> None:
    """Equal bits, except that the sign of a NaN made by arithmetic is the machine's."""
    w = torch.tensor(np.array(want))
    assert got.dtype == w.dtype
    same = (bits_of(got) == bits_of(w)) | (got.isnan() & w.isnan())
    wrong = torch.nonzero(~same)
    assert not len(wrong), f"{what}: index {int(wrong[0])}, {got[wrong[0]]} != {w[wrong[0]]}"


ELECTS = [
    None,
    *(
        Elect(by, on_zero, scale)
        for by in ("mass", "delta", "count", "normmass", "normfrac")
        for on_zero in ("plus", "minus", "none")
        for scale in (None, (1.0, 0.3, 1.0))
        if scale is None or by.startswith("norm")
    ),
]
DIVISIONS: list[tuple[Any, ...]] = [
    ("none", 1.0, None, 0.0),
    ("constant", 3.0, None, 0.0),
    ("constant", -7.0, None, 0.0),
    ("weight", 1.0, (0.1, 0.2, 0.7), 0.0),
    ("weight", 1.0, (0.0, 0.2, -0.2), 0.0),
    ("weight", 1.0, (0.1, 0.2, 0.7), 0.25),
    ("weight", 1.0, None, 0.0),
]
COMBINES = [
    Combine(by, division[0], division[1], division[2], division[3], lam)
    for by in ("sum", "max")
    for division in DIVISIONS
    for lam in (1.0, -0.3)
]


@pytest.mark.parametrize("nonfinite", [False, True])
@pytest.mark.parametrize("compute", [DType.F32, DType.F64])
@pytest.mark.parametrize("elect", ELECTS, ids=str)
@np.errstate(all="ignore")
def test_walk_matches_scalars(elect: Elect | None, compute: DType, nonfinite: bool) -> None:
    n = 96
    real = np.float32 if compute is DType.F32 else np.float64
    dtype = torch.float32 if compute is DType.F32 else torch.float64
    for seed, combine in enumerate(COMBINES):
        base, experts = walk_operands(nonfinite, seed, n, 3)
        coefficient = [1.0, [-0.6, 0.0, 1.0][seed % 3], 0.7]
        for add_base in (True, False):
            w = Walk(
                np.array(coefficient)[:, None], elect=elect, combine=combine, add_base=add_base
            )
            c = chunk(base if add_base else None, experts, n, compute)
            got, bad = walk(w, c, dtype)
            want, balance = [], 0
            for i in range(n):
                b = real(base[i].item())
                v = [real(x[i].item()) - b if add_base else real(x[i].item()) for x in experts]
                out, sign = scalar_walk(w, b, v, coefficient, real)
                want.append(out)
                balance += sign
            assert_same_reals(got, want, f"{combine}, add_base={add_base}, seed {seed}")
            assert bad is any(bool((~x.isfinite()).any()) for x in experts)
            if elect is not None:
                statistic = SignBalance(Keep(), w.coefficient, elect)
                parts = [
                    chunk(c_base(c, base), experts, n, compute, a, b) for a, b in ((0, 5), (5, n))
                ]
                assert sweep(statistic, parts, n) == balance


def c_base(c: Chunk, base: torch.Tensor) -> torch.Tensor | None:
    return None if c.base is None else base


@pytest.mark.parametrize("axis", list(Axis))
def test_coefficients_by_axis_and_rescaled_drops_in_chunks(axis: Axis) -> None:
    rows, cols, n = 7, 5, 35
    base, experts = walk_operands(False, 11, n, 3)
    stored = [experts[0].to(torch.bfloat16), experts[1].to(torch.float16), experts[2]]
    units = {Axis.TENSOR: 1, Axis.ROW: rows, Axis.COLUMN: cols}[axis]
    coefficient = np.random.default_rng(1).standard_normal((3, units))
    drop = Drop([0.5, 0.9, 1.0], [1, 2, 3], rescale=True)
    w = Walk(coefficient, axis, Keep(drop=drop), Elect("mass"), Combine("sum", "constant", 3.0))
    whole = chunk(base, stored, cols)
    mask = KERNELS.keep_mask(w.keep, whole)
    inv = [np.float32(2.0), np.float32(65536 / math.floor(0.9 * 65536 + 0.5)), np.float32(1)]
    want = []
    for i in range(n):
        b = np.float32(base[i].item())
        v = [
            (np.float32(x[i].item()) - b) * inv[k] if mask[k, i] else np.float32(0)
            for k, x in enumerate(stored)
        ]
        u = {Axis.TENSOR: 0, Axis.ROW: i // cols, Axis.COLUMN: i % cols}[axis]
        want.append(scalar_walk(w, b, v, coefficient[:, u].tolist(), np.float32)[0])
    got, bad = walk(w, whole, torch.float32)
    assert not bad
    assert_same_reals(got, want, "whole")
    for step in (1, 8, 34):
        out = torch.empty(n)
        for a in range(0, n, step):
            part = chunk(base, stored, cols, start=a, stop=min(a + step, n))
            KERNELS.walk(w, part, buffer(out).slice(a, min(a + step, n)))
        assert torch.equal(bits_of(out), bits_of(got))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_walk_reports_any_operand_that_is_not_finite(dtype: torch.dtype, value: float) -> None:
    compute = DType.F64 if dtype is torch.float64 else DType.F32
    w = Walk(np.zeros((2, 1)))
    for where in range(3):
        operands = [torch.ones(40, dtype=dtype) for _ in range(3)]
        assert not walk(w, chunk(operands[0], operands[1:], 40, compute), dtype)[1]
        operands[where][39] = value
        assert walk(w, chunk(operands[0], operands[1:], 40, compute), dtype)[1]
    operands[2][39] = 1.0
    operands[0][39] = value
    out = torch.empty(40, dtype=dtype)
    assert KERNELS.walk(
        Walk(np.ones((0, 1))), Chunk(buffer(operands[0]), [], 0, 40, 40, compute), buffer(out)
    )


def test_output_may_be_the_base_itself() -> None:
    base, experts = walk_operands(True, 2, 50, 2)
    base[3] = math.inf
    w = Walk(np.ones((2, 1)))
    want, bad = walk(w, chunk(base, experts, 50), torch.float32)
    assert bad and KERNELS.walk(w, chunk(base, experts, 50), buffer(base))
    assert torch.equal(bits_of(base), bits_of(want))


def test_missing_base_is_an_error() -> None:
    x = torch.ones(3)
    with pytest.raises(ValueError, match="no base to add to"):
        walk(Walk(np.ones((1, 1))), chunk(None, [x], 3), torch.float32)
