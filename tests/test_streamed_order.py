"""Rank cuts of what comes in pieces: exact, in hardly more than one reading, never at the sample's mercy."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmerge import ops
from fastmerge.backends import Chunk, Sweep, streamed_order
from fastmerge.backends.cpu import CpuKernels
from fastmerge.backends.memory import tensor_of
from fastmerge.backends.streamed_order import StreamedOrder, sampled_ranges
from fastmerge.backends.triton_plan import INF_KEY
from fastmerge.dtypes import DType
from fastmerge.evaluate import Operands, _within, sweep_statistic
from fastmerge.stages import OrderStatistic


def keys_of(chunk: Chunk) -> torch.Tensor:
    """Return [K, n]: the bits of |delta|, in torch on the host."""
    wide = chunk.compute is DType.F64
    real, whole = (torch.float64, torch.int64) if wide else (torch.float32, torch.int32)
    base = tensor_of(chunk.base).to(real) if chunk.base else None
    rows = []
    for expert in chunk.experts:
        delta = tensor_of(expert).to(real) - (base if base is not None else 0)
        rows.append(delta.abs().view(whole).clamp(max=INF_KEY[wide] + 1))
    return torch.stack(rows)


class Streaming(CpuKernels):
    """The cpu backend, with rank cuts of tensors as a device has them. Notes what it was fed."""

    name = "streaming"

    def __init__(self) -> None:
        super().__init__()
        self.fed: list[tuple[int, int]] = []
        self.fell_back = 0

    def sweep(self, statistic: Any, n: int, cols: int, n_experts: int, compute: DType) -> Sweep:
        def passes() -> Sweep:
            self.fell_back += 1
            return CpuKernels.sweep(self, statistic, n, cols, n_experts, compute)

        def keys(chunk: Chunk) -> torch.Tensor:
            self.fed.append((chunk.start, chunk.n))
            return keys_of(chunk)

        plain = not isinstance(statistic, OrderStatistic)
        if plain or statistic.scope == "row" or statistic.of == "variance":
            return CpuKernels.sweep(self, statistic, n, cols, n_experts, compute)
        return StreamedOrder(statistic, n, n_experts, compute is DType.F64, keys, passes)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs of 16 elements, for tensors of some thousands."""
    monkeypatch.setattr(streamed_order, "RUN", 16)
    yield


def operands(
    n: int, k: int, dtype: torch.dtype, ties: bool = False, seed: int = 0
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(n, generator=generator)
    models = [base]
    for _ in range(k):
        delta = torch.randn(n, generator=generator) * 0.01
        if ties:
            delta = (delta * 200).round() / 200 * (torch.rand(n, generator=generator) < 0.4)
        models.append(base + delta)
    return [m.to(dtype) for m in models]


def held_of(models: list[torch.Tensor]) -> Operands:
    buffers = [ops.buffer_of(m, "model") for m in models]
    compute = DType.F64 if models[0].dtype is torch.float64 else DType.F32
    return Operands(buffers[0], buffers[1:], len(models[0]), compute)


def check(
    models: list[torch.Tensor], request: OrderStatistic, limit: int, kernels: Streaming
) -> None:
    held = held_of(models)
    got = sweep_statistic(kernels, request, held, limit)
    want = sweep_statistic(ops.choose("cpu", "cpu"), request, held)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(x.value, y.value, err_msg=str(request))
        np.testing.assert_array_equal(x.last_tie, y.last_tie, err_msg=str(request))


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_cuts_are_the_cpu_backends(dtype: torch.dtype, ties: bool) -> None:
    n = 30_011
    models = operands(n, 2, dtype, ties)
    for limit in (997, 8192, 30_010):
        for all_ties in (False, True):
            ranks = [[1, n // 5, n], [0, n // 2, n - 1]]
            check(models, OrderStatistic(ranks, all_ties=all_ties), limit, Streaming())
        check(models, OrderStatistic(fraction_of_nonzero=0.3), limit, Streaming())
        check(models, OrderStatistic(fraction_of_nonzero=1.0), limit, Streaming())


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(600, 20_000),
    limit=st.integers(50, 20_000),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
    ties=st.booleans(),
)
def test_any_size_rank_and_cutting(n: int, limit: int, share: float, seed: int, ties: bool) -> None:
    run, streamed_order.RUN = streamed_order.RUN, 16
    try:
        models = operands(n, 1, torch.bfloat16, ties, seed)
        check(models, OrderStatistic([[int(share * n)]]), limit, Streaming())
    finally:
        streamed_order.RUN = run


@pytest.mark.parametrize("ties", [False, True])
def test_one_reading_and_a_bit(ties: bool) -> None:
    n, limit = 5_000_000, 400_000
    kernels = Streaming()
    check(operands(n, 2, torch.bfloat16, ties), OrderStatistic([[n // 3]] * 2), limit, kernels)
    assert kernels.fell_back == 0
    assert sum(m for _, m in kernels.fed) <= 1.1 * n + 2 * limit


@pytest.mark.usefixtures("short")
def test_a_bracket_that_misses_costs_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 30_000
    models = operands(n, 2, torch.float32)
    bracket = StreamedOrder._bracket

    for wrong in (lambda t: (0, 0), lambda t: (INF_KEY[False], INF_KEY[False])):

        def miss(self: StreamedOrder, wrong: Any = wrong) -> None:
            bracket(self)
            for t in self._targets[:1]:
                t.low, t.high = wrong(t)

        monkeypatch.setattr(StreamedOrder, "_bracket", miss)
        kernels = Streaming()
        check(models, OrderStatistic([[n // 3]] * 2), 4000, kernels)
        assert kernels.fell_back == 1


@pytest.mark.usefixtures("short")
def test_too_many_candidates_cost_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 30_000
    monkeypatch.setattr(streamed_order, "most_candidates", lambda n, targets: 10)
    kernels = Streaming()
    check(operands(n, 2, torch.float32), OrderStatistic([[n // 3]] * 2), 4000, kernels)
    assert kernels.fell_back == 1


@pytest.mark.usefixtures("short")
def test_not_finite_keys_are_on_top() -> None:
    models = operands(20_000, 2, torch.float32)
    models[1][7::100] = float("inf")
    models[2][::50] = float("nan")
    for rank in (1, 150, 350, 5000):
        check(models, OrderStatistic([[rank], [rank]]), 3000, Streaming())


def test_a_tensor_that_comes_whole_is_done_at_once() -> None:
    kernels = Streaming()
    check(operands(100_000, 1, torch.bfloat16), OrderStatistic([[5000]]), 1 << 30, kernels)
    assert not kernels.fed and kernels.fell_back == 1


@pytest.mark.parametrize("n", [1024, 50_000, 4_200_000, 70_000_000_000])
def test_places_of_the_sample(n: int) -> None:
    ranges = sampled_ranges(n)
    assert ranges == sampled_ranges(n)
    assert all(b - a == streamed_order.RUN for a, b in ranges)
    assert ranges[0][0] >= 0 and ranges[-1][1] <= n
    assert all(b <= c for (_, b), (c, _) in pairwise(ranges))
    assert sum(b - a for a, b in ranges) <= max(n / streamed_order.SHARE, streamed_order.RUN)
    # Nowhere between two runs is more than two strides left out.
    gaps = [c - b for (_, b), (c, _) in pairwise(ranges)]
    assert max(gaps, default=0) <= 2 * n / len(ranges)


def test_ranges_of_a_model_fall_to_its_tensors() -> None:
    offsets, sizes = {3: 0, 5: 10, 8: 10, 9: 25}, {3: 10, 5: 0, 8: 15, 9: 5}
    assert _within(None, offsets, sizes) == {3: None, 5: None, 8: None, 9: None}
    assert _within([(2, 4), (8, 27)], offsets, sizes) == {
        3: [(2, 4), (8, 10)], 8: [(0, 15)], 9: [(0, 2)],
    }  # fmt: skip
    assert _within([(26, 27)], offsets, sizes) == {9: [(1, 2)]}


def test_backends_of_devices_use_it() -> None:
    from fastmerge.backends.triton import TritonKernels

    kernels = TritonKernels("cpu")
    request = OrderStatistic([[5]])
    large = streamed_order.SMALLEST
    assert isinstance(kernels.sweep(request, large, 1, 1, DType.F32), StreamedOrder)
    assert not isinstance(kernels.sweep(request, large - 1, 1, 1, DType.F32), StreamedOrder)
    by_row = OrderStatistic([[5]], scope="row")
    assert not isinstance(kernels.sweep(by_row, large, 64, 1, DType.F32), StreamedOrder)
