"""The compiled backend against the reference: equal bits for every stage, type and chunking."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import cases
import numpy as np
import pytest
import torch
from agreement import PHILOX_ANSWERS, rng_of

from fastmerge import _cpu, ops
from fastmerge.evaluate import Operands, sweep_statistic
from fastmerge.stages import (
    Axis,
    Cut,
    Drop,
    Elect,
    Gram,
    Keep,
    OrderStatistic,
    RankedDrop,
    Trim,
    Walk,
)

ISAS = _cpu.available_isas().split()
SEEDS = range(60)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _cpu.isa()
    assert _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


def bits(x: torch.Tensor) -> np.ndarray:
    return x.contiguous().reshape(-1).view(torch.uint8).numpy()


def draw(seed: int, shape: tuple[int, ...]) -> tuple[np.random.Generator, cases.Operands, int]:
    rng = rng_of(seed, shape)
    k = int(rng.choice([1, 2, 3, 5, 8]))
    content = cases.CONTENTS[rng.integers(len(cases.CONTENTS))]
    held = cases.operands(rng, shape, k, content, with_base=bool(rng.random() < 0.8))
    if rng.random() < 0.1:
        held.experts[0] = held.experts[0].double()
    return rng, held, k


@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
def test_walk_is_bit_equal(shape: tuple[int, ...], isa: str) -> None:
    n_seeds = 12 if shape and np.prod(shape) > 10_000 else len(SEEDS)
    for seed in SEEDS[:n_seeds]:
        rng, held, k = draw(seed, shape)
        walk = cases.random_walk(rng, shape, k, held.base is not None)
        out_dtype = cases.FLOATS[rng.integers(4)]
        outs = [
            ops.fused_walk(
                held.base, held.experts, walk, out=torch.empty(shape, dtype=out_dtype), backend=name
            )
            for name in ("cpu", "reference")
        ]
        different = np.flatnonzero(bits(outs[0]) != bits(outs[1]))
        assert not different.size, (
            f"seed {seed}, first wrong byte {different[0]} of {different.size}: "
            f"cpu {outs[0].reshape(-1)[different[0] // outs[0].itemsize]}, "
            f"reference {outs[1].reshape(-1)[different[0] // outs[1].itemsize]}; {walk}"
        )


@pytest.mark.parametrize("dtype", cases.FLOATS[:3], ids=str)
def test_common_walks_are_bit_equal(dtype: torch.dtype, isa: str) -> None:
    """Operands of one type and one coefficient each: the walk that keeps its sums in registers."""
    for seed in range(120):
        rng = rng_of("common", seed, dtype)
        shape = ((4099,), (3, 5, 11), (64, 64))[seed % 3]
        k = int(rng.choice([1, 2, 3, 4, 8, 33], p=[0.1, 0.3, 0.2, 0.2, 0.15, 0.05]))
        content = cases.CONTENTS[rng.integers(len(cases.CONTENTS))]
        with_base = bool(rng.random() < 0.8)
        held = cases.operands(rng, shape, k, content, with_base)
        base = held.base.to(dtype) if held.base is not None else None
        experts = [e.to(dtype) for e in held.experts]
        if seed % 10 == 9:
            experts[0].reshape(-1)[::70] = float("nan")
        random = cases.random_walk(rng, shape, k, with_base)
        trim = Trim(cases.random_cut(rng, shape, k, False)) if seed & 1 else None
        p = rng.choice([0.0, 0.1, 0.5, 0.9, 1.0], k).tolist()
        keys = [int(x) for x in rng.integers(0, 2**63, k)]
        drop = Drop(p, keys, rescale=bool(rng.random() < 0.5)) if seed & 2 else None
        elect = Elect("mass", str(rng.choice(["plus", "minus", "none"]))) if seed & 4 else None  # type: ignore[arg-type]
        divide = random.combine.divide_by
        if divide != "none":
            divide = "weight" if elect and rng.random() < 0.7 else "constant"
        weights = rng.standard_normal(k).tolist() if divide == "weight" else None
        combine = replace(random.combine, by="sum", divide_by=divide, divisor_weight=weights)
        coefficient = rng.choice([0.5, 1.0, -0.3], (k, 1))
        walk = Walk(coefficient, Axis.TENSOR, Keep(trim, None, drop), elect, combine, with_base)
        outs = [
            ops.fused_walk(base, experts, walk, out=torch.empty(shape, dtype=dtype), backend=name)
            for name in ("cpu", "reference")
        ]
        if seed % 10 == 9:  # the sign of a NaN is the machine's
            torch.testing.assert_close(*outs, rtol=0, atol=0, equal_nan=True, msg=f"{seed}: {walk}")
        else:
            np.testing.assert_array_equal(bits(outs[0]), bits(outs[1]), err_msg=f"{seed}: {walk}")


@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
def test_statistics_are_equal(shape: tuple[int, ...], isa: str) -> None:
    n = int(np.prod(shape)) if shape else 1
    cols = shape[-1] if shape else 1
    for seed in SEEDS[:15]:
        rng, held, k = draw(seed, shape)
        scope = "row" if rng.random() < 0.4 else "tensor"
        unit = cols if scope == "row" else n
        ranks = [
            [int(rng.integers(-1, unit + 2)), int(rng.integers(0, unit + 1))] for _ in range(k)
        ]
        requests = [
            OrderStatistic(ranks, scope=scope, all_ties=bool(rng.random() < 0.3)),  # type: ignore[arg-type]
            OrderStatistic(of="variance", fraction_of_nonzero=float(rng.random())),
        ]
        for request in requests:
            a, b = (ops.order_statistic(held.base, held.experts, request, backend=name)
                    for name in ("cpu", "reference"))  # fmt: skip
            for x, y in zip(a, b, strict=True):
                np.testing.assert_array_equal(x.value, y.value)
                np.testing.assert_array_equal(x.last_tie, y.last_tie)
        keep = cases.random_keep(rng, shape, k)
        for of in ("abs", "square", "max"):
            a, b = (ops.moments(held.base, held.experts, of, keep, backend=name)
                    for name in ("cpu", "reference"))  # fmt: skip
            np.testing.assert_array_equal(a.all, b.all, err_msg=f"{of}, seed {seed}")
            np.testing.assert_array_equal(a.kept, b.kept, err_msg=f"{of}, seed {seed}")
        for axis in Axis:
            a, b = (ops.gram(held.base, held.experts, Gram(axis=axis), backend=name)
                    for name in ("cpu", "reference"))  # fmt: skip
            np.testing.assert_array_equal(a, b, err_msg=f"{axis}, seed {seed}")
        masks = [ops.keep_mask(held.base, held.experts, keep, backend=name)
                 for name in ("cpu", "reference")]  # fmt: skip
        np.testing.assert_array_equal(masks[0], masks[1])


LARGE = 200_003  # above what is selected directly: cuts are found by sample, bracket and count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("content", ["near", "grid", "equal", "wide", "mixed", "sorted", "nan"])
def test_large_rank_cuts_are_exact(content: str, dtype: torch.dtype, isa: str) -> None:
    """Whatever a bracket holds: nearly nothing, a great many equal keys, or not the cut at all."""
    rng = rng_of("large", content, dtype)
    kind = content if content in cases.CONTENTS else "normal"
    base = cases.tensor(rng, (LARGE,), kind, dtype)
    experts = [cases.tensor(rng, (LARGE,), kind, dtype) for _ in range(2)]
    if content == "near":
        experts = [(base.double() + 0.01 * e.double()).to(dtype) for e in experts]
    if content == "mixed":  # a value that fills half of it, beside many others
        for e in experts:
            e[rng.random(LARGE) < 0.5] = base[rng.random(LARGE) < 0.5][0]
        experts[1][:] = base
    if content == "sorted":  # neighbours are alike: a sample of runs says less than its size
        experts = [base[e.double().argsort()] for e in experts]
        experts[0] = (base.double() + torch.arange(LARGE).double() ** 2 * 1e-9).to(dtype)
    if content == "nan":
        experts[0][::7] = float("nan")
    requests = [
        OrderStatistic([[1, 150_000, 60_000], [100_001, LARGE, 0]]),
        OrderStatistic([[100_000], [20_000]], all_ties=True),
        OrderStatistic([[LARGE - 1], [0]]),
        OrderStatistic(of="variance", fraction_of_nonzero=0.3),
        OrderStatistic(of="variance", fraction_of_nonzero=1.0),
        OrderStatistic([[1000]], of="variance"),
    ]
    held = ops._chunk(base, experts)
    operands = Operands(held.base, held.experts, LARGE, held.compute)
    reference = ops.choose("cpu", "reference")
    for request in requests:
        expected = sweep_statistic(reference, request, operands)
        for limit in (LARGE, 50_001):
            found = sweep_statistic(ops.choose("cpu", "cpu"), request, operands, limit)
            for x, y in zip(found, expected, strict=True):
                np.testing.assert_array_equal(x.value, y.value, err_msg=str(request))
                np.testing.assert_array_equal(x.last_tie, y.last_tie, err_msg=str(request))


@pytest.mark.parametrize("shape", [(5, 512), (3, 2048), (2, 5632), (1, 512)], ids=str)
@pytest.mark.parametrize("content", ["near", "grid", "equal", "wide", "zeros", "sorted", "nan"])
def test_ranked_drops_of_long_rows(content: str, shape: tuple[int, int], isa: str) -> None:
    """Rows whose ranks are bounded by bins, not sorted: the same elements are dropped."""
    rng = rng_of("rows", content, shape)
    kind = content if content in cases.CONTENTS else "normal"
    base = cases.tensor(rng, shape, kind, torch.bfloat16)
    experts = [cases.tensor(rng, shape, kind, torch.bfloat16) for _ in range(2)]
    if content in ("near", "zeros"):
        experts = [(base.double() + 0.01 * e.double()).bfloat16() for e in experts]
    if content == "zeros":
        for e in experts:
            e[rng.random(shape) < 0.7] = 0
            e[rng.random(shape) < 0.5] = base[rng.random(shape) < 0.5][0]
        experts[1][:] = base
    if content == "sorted":
        experts[0] = (base.float() + torch.arange(base.numel()).view(shape) * 1e-3).bfloat16()
    if content == "nan":
        experts[0][:, ::7] = float("nan")
    low, high = ([0.2, 0.0], [0.9, 1e-7]) if content == "wide" else ([0.35, 0.7], [0.65, 0.7])
    drop = RankedDrop(low, high, [int(x) for x in rng.integers(0, 1 << 62, 2)])
    for keep in (
        Keep(drop=drop),
        Keep(trim=Trim(Cut(np.full((2, 1), 1e-3), np.full((2, 1), 77))), drop=drop),
    ):
        masks = [ops.keep_mask(base, experts, keep, backend=name) for name in ("cpu", "reference")]
        np.testing.assert_array_equal(*masks)
        for elect in (None, Elect("mass"), Elect("delta")):
            walk = Walk(np.full((2, 1), 0.5), keep=keep, elect=elect)
            a, b = (
                ops.fused_walk(base, experts, walk, backend=name) for name in ("cpu", "reference")
            )
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        for of in ("abs", "square", "max"):
            x, y = (
                ops.moments(base, experts, of, keep, backend=name) for name in ("cpu", "reference")
            )
            np.testing.assert_array_equal(x.kept, y.kept)


def test_thread_counts_do_not_show() -> None:
    results = []
    for threads in (1, 2, 5):
        _cpu.set_threads(threads)
        rng, held, k = draw(3, (33, 4099))
        walk = cases.random_walk(rng, (33, 4099), k, held.base is not None)
        out = ops.fused_walk(held.base, held.experts, walk, backend="cpu")
        gram = ops.gram(held.base, held.experts, backend="cpu")
        results.append((bits(out).tobytes(), gram.tobytes()))
    _cpu.set_threads(0)
    assert len(set(results)) == 1


def test_a_forked_child_has_threads_of_its_own() -> None:
    """A pool's threads do not survive a fork; waiting for them would never end."""
    _cpu.set_threads(3)
    rng, held, k = draw(4, (130, 4099))
    walk = cases.random_walk(rng, (130, 4099), k, held.base is not None)
    want = bits(ops.fused_walk(held.base, held.experts, walk, backend="cpu")).tobytes()
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)  # a child that hangs is killed
        same = bits(ops.fused_walk(held.base, held.experts, walk, backend="cpu")).tobytes() == want
        os._exit(0 if same else 1)
    _, status = os.waitpid(pid, 0)
    _cpu.set_threads(0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_nonfinite_values_are_reported_and_carried() -> None:
    base = torch.zeros(100)
    expert = torch.ones(100)
    expert[70] = float("nan")
    for name in ("cpu", "reference"):
        kernels = ops.choose("cpu", name)
        chunk = ops._chunk(base, [expert])
        out = torch.empty(100)

        assert kernels.walk(Walk(np.ones((1, 1))), chunk, ops.buffer_of(out, "out"))
        assert torch.isnan(out[70])
        assert torch.isfinite(out).sum() == 99


@pytest.mark.parametrize(("words", "drawn"), PHILOX_ANSWERS)
def test_known_answers_of_philox(words: tuple[int, ...], drawn: tuple[int, ...]) -> None:
    """Random123's kat_vectors; tests of the other backends have the same."""
    assert _cpu.philox(*words) == drawn


def test_forced_instruction_set_is_obeyed_or_refused() -> None:
    def run(level: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fastmerge.cli", "backends"],
            env={**os.environ, "FASTMERGE_CPU_ISA": level},
            capture_output=True,
            text=True,
            check=False,
        )

    assert "baseline of" in run("baseline").stdout
    refused = run("sse9")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: FASTMERGE_CPU_ISA='sse9' is not available here")


def nan_operands(shape: tuple[int, ...]) -> cases.Operands:
    rng = rng_of("nan", shape)
    held = cases.operands(rng, shape, 3, "grid")
    for x in held.experts[:1]:
        x.reshape(-1)[:: max(2, x.numel() // 9)] = float("nan")
    return held


@pytest.mark.parametrize("shape", [(127,), (33, 41)], ids=str)
def test_nan_is_carried_alike(shape: tuple[int, ...], isa: str) -> None:
    """NaN is the largest magnitude everywhere; what a walk makes of it is the same on both backends."""
    held = nan_operands(shape)
    n, k = int(np.prod(shape)), 3
    for seed in SEEDS:
        rng = rng_of("nan walk", seed)
        walk = cases.random_walk(rng, shape, k, True)
        outs = [
            ops.fused_walk(held.base, held.experts, walk, backend=name)
            for name in ("cpu", "reference")
        ]
        torch.testing.assert_close(*outs, rtol=0, atol=0, equal_nan=True, msg=f"{seed}: {walk}")
        keep = walk.keep
        a, b = (ops.moments(held.base, held.experts, "max", keep, backend=name)
                for name in ("cpu", "reference"))  # fmt: skip
        np.testing.assert_array_equal(a.all, b.all)
        np.testing.assert_array_equal(a.kept, b.kept)
        request = OrderStatistic([[int(rng.integers(1, n))]] * k)
        (x,), (y,) = (ops.order_statistic(held.base, held.experts, request, backend=name)
                      for name in ("cpu", "reference"))  # fmt: skip
        np.testing.assert_array_equal(x.value, y.value)
        np.testing.assert_array_equal(x.last_tie, y.last_tie)


def test_edges_of_the_definition_agree(isa: str) -> None:
    """No experts, a base that the walk does not use, probabilities that draw nothing."""
    held = cases.operands(rng_of("edges"), (6, 70), 2, "grid")
    walk = Walk(np.ones((2, 1)), add_base=False)
    a, b = (
        ops.fused_walk(held.base, held.experts, walk, backend=name) for name in ("cpu", "reference")
    )
    assert torch.equal(a, b)
    gram = Gram(delta=False)
    a, b = (ops.gram(held.base, held.experts, gram, backend=name) for name in ("cpu", "reference"))
    np.testing.assert_array_equal(a, b)
    for axis in (Axis.ROW, Axis.TENSOR):
        for by in ("rank", "value"):
            drop = RankedDrop([1.0, 0.2], [1.0, 0.6], [1, 2], axis=axis, by=by)  # type: ignore[arg-type]
            a, b = (ops.keep_probability(held.base, held.experts, drop, backend=name)
                    for name in ("cpu", "reference"))  # fmt: skip
            np.testing.assert_array_equal(a, b)
    chunk = replace(ops._chunk(held.base, held.experts), experts=[])
    for name in ("cpu", "reference"):
        out = torch.empty_like(held.base)
        ops.choose("cpu", name).walk(Walk(np.ones((0, 1))), chunk, ops.buffer_of(out, "out"))
        assert torch.equal(out, held.base)
