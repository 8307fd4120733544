"""The reference backend against scalar definitions: sums and walks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from reference_drive import KERNELS, bits_of, buffer, chunk, sort_key, sweep, walk

from fastmerge.backends import Buffer, Chunk
from fastmerge.backends.reference_arithmetic import (
    sum_columns,
    sum_units,
)
from fastmerge.dtypes import DType
from fastmerge.stages import (
    Axis,
    Combine,
    Drop,
    Elect,
    Gram,
    Keep,
    Moments,
    OrderStatistic,
    RankedDrop,
    SignBalance,
    Walk,
)

# ---- sums ----------------------------------------------------------------------------------------

MOMENTS = ("abs", "square", "max")


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
        absolute, square, high = (sweep(Moments(of, keep), parts, n) for of in MOMENTS)
        for k, d in enumerate(delta):
            v = torch.where(torch.tensor(mask[k]) != 0, d, torch.zeros_like(d))
            for x, which in ((d, "all"), (v, "kept")):
                assert getattr(absolute, which)[k] == scalar_sum(x.abs().tolist())
                assert getattr(square, which)[k] == scalar_sum((x * x).tolist())
                assert getattr(high, which)[k] == float(x.abs().max())


def test_statistics_of_nothing() -> None:
    empty = Chunk(None, [Buffer(0, DType.F32, 0)] * 2, 0, 0, 5, DType.F32)
    for of in MOMENTS:
        moments = sweep(Moments(of), [empty], 0)
        assert moments.all.tolist() == moments.kept.tolist() == [0.0, 0.0]
    assert sweep(Gram(), [empty], 0).tolist() == np.zeros((2, 2, 1)).tolist()
    assert sweep(Gram(axis=Axis.ROW), [empty], 0).shape == (2, 2, 0)
    none, some = sweep(OrderStatistic([[0, 1]] * 2), [empty], 0)
    assert none.value.tolist() == [[math.inf]] * 2 and some.value.tolist() == [[-1]] * 2
    walked = Walk(np.ones((2, 1)), add_base=False)
    assert KERNELS.walk(walked, empty, Buffer(0, DType.BF16, 0)) is False


def test_nan_is_the_largest_moment() -> None:
    x = torch.tensor([math.inf, math.nan, 1.0])
    for of in MOMENTS:
        assert math.isnan(sweep(Moments(of), [chunk(None, [x], 3)], 3).all[0])


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
        for add_base, only_delta in ((True, False), (False, False), (False, True)):
            w = Walk(
                np.array(coefficient)[:, None],
                elect=elect,
                combine=combine,
                add_base=add_base,
                only_delta=only_delta,
            )
            c = chunk(base if w.takes_base else None, experts, n, compute)
            got, bad = walk(w, c, dtype)
            want, balance = [], 0
            for i in range(n):
                b = real(base[i].item())
                v = [real(x[i].item()) - (b if w.takes_base else 0) for x in experts]
                out, sign = scalar_walk(w, b, v, coefficient, real)
                want.append(out)
                balance += sign
            assert_same_reals(got, want, f"{combine}, {add_base=}, {only_delta=}, seed {seed}")
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


def test_a_base_is_not_both_added_and_left_out() -> None:
    with pytest.raises(ValueError, match="say add_base=False"):
        Walk(np.ones((1, 1)), only_delta=True)
