"""Rank cuts of what comes in pieces: exact, in hardly more than one reading, never at the sample's mercy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import agreement
import cases
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmerge import ops
from fastmerge.backends import Chunk, Sweep, streamed_order
from fastmerge.backends.cpu import CpuKernels
from fastmerge.backends.memory import tensor_of
from fastmerge.backends.streamed_order import StreamedOrder, merged, sampled_ranges, scratch_bytes
from fastmerge.backends.triton_plan import INF_KEY
from fastmerge.dtypes import DType
from fastmerge.evaluate import Operands, _within, sweep_statistic
from fastmerge.stages import Grain, OrderStatistic


def keys_of(chunk: Chunk, own: Sequence[int]) -> Iterator[torch.Tensor]:
    """Yield [n] of each expert: the bits of |delta|, in torch on the host."""
    wide = chunk.compute is DType.F64
    real, whole = (torch.float64, torch.int64) if wide else (torch.float32, torch.int32)
    base = tensor_of(chunk.base).to(real) if chunk.base else None
    for k in own:
        delta = tensor_of(chunk.experts[k]).to(real) - (base if base is not None else 0)
        yield delta.abs().view(whole).clamp(max=INF_KEY[wide] + 1)


class Streaming(CpuKernels):
    """The cpu backend, with rank cuts of tensors as a device has them. Notes what it was fed.

    fed: first element and number of elements of what keys were made of; passes: of what came in pieces.
    """

    name = "streaming"

    def __init__(self) -> None:
        super().__init__()
        self.fed: list[tuple[int, int]] = []
        self.whole = 0
        self.passes = 0

    def sweep(self, statistic: Any, n: int, cols: int, n_experts: int, compute: DType) -> Sweep:
        def whole() -> Sweep:
            self.whole += 1
            return CpuKernels.sweep(self, statistic, n, cols, n_experts, compute)

        def keys(chunk: Chunk, own: Sequence[int]) -> Iterator[torch.Tensor]:
            self.fed.append((chunk.start, chunk.n))
            return keys_of(chunk, own)

        plain = not isinstance(statistic, OrderStatistic)
        if plain or statistic.scope == "row" or statistic.of == "variance":
            return CpuKernels.sweep(self, statistic, n, cols, n_experts, compute)
        return _Counted(self, statistic, n, n_experts, compute is DType.F64, keys, whole)


class _Counted(StreamedOrder):
    def __init__(self, kernels: Streaming, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._kernels = kernels

    def next_pass(self) -> bool:
        self._kernels.passes += 1
        return super().next_pass()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample of runs of 16 elements, for tensors of some thousands, looked at 3000 elements at a time."""
    monkeypatch.setattr(streamed_order, "SMALLEST", 1)
    monkeypatch.setattr(streamed_order, "RUN", 16)
    monkeypatch.setattr(streamed_order, "PART", 3000)


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
        for fraction in (0.0, 0.3, 1.0):
            check(models, OrderStatistic(fraction_of_nonzero=fraction), limit, Streaming())


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, 20_000),
    limit=st.integers(50, 20_000),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
    ties=st.booleans(),
    sampled=st.booleans(),
    most=st.sampled_from([0, 20, 1 << 16]),
)
def test_any_size_rank_and_cutting(
    n: int, limit: int, share: float, seed: int, ties: bool, sampled: bool, most: int
) -> None:
    """Whether a sample is taken or not, and whether its brackets hold too much."""
    sizes = {"RUN": 16, "PART": 3000, "SMALLEST": 600 if sampled else 1 << 22}
    with patch.multiple(streamed_order, most_candidates=lambda n, targets: most, **sizes):
        models = operands(n, 1, torch.bfloat16, ties, seed)
        check(models, OrderStatistic([[int(share * n)]]), limit, Streaming())
        check(models, OrderStatistic(fraction_of_nonzero=share), limit, Streaming())


@pytest.mark.parametrize("ties", [False, True])
def test_one_reading_and_a_bit(ties: bool) -> None:
    """A sixteenth for the sample, everything, and of each expert the chunk with its last tie."""
    n, limit = 5_000_000, 400_000
    kernels = Streaming()
    check(operands(n, 2, torch.bfloat16, ties), OrderStatistic([[n // 3]] * 2), limit, kernels)
    assert kernels.passes == 3
    assert n < sum(m for _, m in kernels.fed) <= 1.0625 * n + 2 * limit
    one = Streaming()
    check(operands(n, 1, torch.bfloat16, ties), OrderStatistic([[n // 3]]), limit, one)
    assert n < sum(m for _, m in one.fed) <= 1.0625 * n + limit


def test_a_short_tensor_is_not_sampled() -> None:
    kernels = Streaming()
    n = 50_000
    check(operands(n, 1, torch.bfloat16), OrderStatistic([[n // 3]]), 7000, kernels)
    assert kernels.passes == 2
    assert n < sum(m for _, m in kernels.fed) <= n + 7000


@pytest.mark.usefixtures("short")
def test_with_all_ties_nothing_is_read_again() -> None:
    n, kernels = 30_000, Streaming()
    request = OrderStatistic([[n // 3]], all_ties=True)
    check(operands(n, 1, torch.bfloat16, ties=True), request, 4000, kernels)
    assert kernels.passes == 2
    assert sum(m for _, m in kernels.fed) <= 1.0625 * n


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("ranks", [[0], [-5], [30_000], [10**9], [0, 30_001]])
def test_ranks_that_leave_nothing_to_find_read_nothing(ranks: list[int]) -> None:
    kernels = Streaming()
    check(operands(30_000, 1, torch.float32), OrderStatistic([ranks]), 4000, kernels)
    assert not kernels.fed


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wrong", ["below", "above", "around"])
def test_a_bracket_that_misses_costs_time_alone(
    wrong: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two readings in bins of what is left on the one side bring down any number of keys of float32."""
    n = 30_000
    models = operands(n, 2, dtype, ties=True)
    largest = INF_KEY[dtype is torch.float64] + 1
    real = streamed_order.bracket
    missed: list[tuple[int, int]] = []

    def miss(*arguments: Any) -> tuple[int, int]:
        low, high = real(*arguments)
        if not missed:  # of the first target alone
            bad = {"below": (0, 0), "above": (largest, largest), "around": (0, largest)}
            missed.append((low, high))
            return bad[wrong]
        return low, high

    monkeypatch.setattr(streamed_order, "bracket", miss)
    kernels = Streaming()
    check(models, OrderStatistic([[n // 4], [n // 5]]), 4000, kernels)
    assert missed[0][0] > 0
    # A sample, a count, bins and a count where it missed, a tie.
    assert kernels.passes == (3 if wrong == "around" else 5)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 4), (torch.float64, 5)])
def test_too_many_candidates_cost_time_alone(
    dtype: torch.dtype, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reading narrows a bracket 2^16 times; what is kept stays bounded."""
    n = 30_000
    monkeypatch.setattr(streamed_order, "most_candidates", lambda n, targets: 10)
    monkeypatch.setattr(streamed_order, "PART", 100)
    kept = []
    count = streamed_order._Target.count

    def watch(self: Any, keys: torch.Tensor, first: int, most: int) -> None:
        count(self, keys, first, most)
        kept.append(sum(len(distinct) - 2 for _, _, distinct, _ in self._parts))

    monkeypatch.setattr(streamed_order._Target, "count", watch)
    kernels = Streaming()
    check(operands(n, 2, dtype), OrderStatistic([[n // 3]] * 2), 4000, kernels)
    assert 3 < kernels.passes <= most + 1
    assert max(kept) <= 10


@pytest.mark.usefixtures("short")
def test_chunks_may_differ_from_pass_to_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts that become known in different passes have their last ties in ranges that overlap."""
    n = 24_000
    held = held_of(operands(n, 2, torch.bfloat16, ties=True))
    real = streamed_order.bracket
    seen = []

    def miss(*arguments: Any) -> tuple[int, int]:
        seen.append(real(*arguments))
        return (0, 0) if len(seen) == 1 else seen[-1]

    monkeypatch.setattr(streamed_order, "bracket", miss)
    longest = []
    for share in (0.03, 0.05, 0.08, 0.1, 0.13, 0.15, 0.18, 0.2):
        seen.clear()
        request = OrderStatistic([[int(share * n), int(share * n) + 40]] * 2)
        sweep = Streaming().sweep(request, n, n, 2, DType.F32)
        limits = iter((999, 2500, 2500, 1700, 2000))
        again = True
        while again:
            wanted, limit = sweep.wanted(), next(limits)
            longest += [b - a for a, b in wanted or ()]
            for a, b in ((0, n),) if wanted is None else wanted:
                for _, chunk in held.slice(a, b).chunks(Grain.ELEMENT, limit):
                    sweep.feed(chunk)
            again = sweep.next_pass()
        assert next(limits, None) is None
        for x, y in zip(sweep.result(), sweep_statistic(CpuKernels(), request, held), strict=True):
            np.testing.assert_array_equal(x.value, y.value)
            np.testing.assert_array_equal(x.last_tie, y.last_tie)
    assert max(longest) > 2500


@pytest.mark.usefixtures("short")
def test_keys_that_many_share_are_not_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than half of all deltas are zero and the cut is among them: they are counted."""
    n = 30_000
    sorted_keys = []
    unique = torch.unique

    def watch(keys: torch.Tensor, **options: Any) -> Any:
        sorted_keys.append(len(keys))
        return unique(keys, **options)

    monkeypatch.setattr(torch, "unique", watch)
    models = operands(n, 1, torch.bfloat16, ties=True)
    zeros = int((models[1] == models[0]).sum())
    assert zeros > n // 2
    check(models, OrderStatistic([[n - zeros // 2]]), 4000, Streaming())
    assert sum(sorted_keys) < n // 20


@pytest.mark.usefixtures("short")
def test_neighbours_that_are_alike_widen_the_bracket() -> None:
    """Rows of very different sizes: a bracket as of independent elements would miss."""
    n, ranks = 64_000, range(10_000, 64_000, 10_000)
    kernels = Streaming()
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.rand(n // 64, generator=generator).repeat_interleave(64) * 20
        expert = torch.randn(n, generator=generator) * rows.exp()
        for rank in ranks:
            check([torch.zeros(n), expert], OrderStatistic([[rank]]), 9000, kernels)
    assert kernels.passes == 3 * 6 * len(ranks)


def test_equals_that_lie_together_widen_the_bracket() -> None:
    """How many are above the key is sure, how many equal it is not."""
    sample = torch.tensor([5, 3], dtype=torch.int32).repeat_interleave(16).repeat(32).view(64, 16)
    ordered = sample.flatten().sort(descending=True).values
    assert streamed_order.bracket(sample, ordered, 0.45, False) == (3, 5)
    assert streamed_order.bracket(sample, ordered, 0.1, False) == (5, INF_KEY[False] + 1)


def test_a_chunk_is_looked_at_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in a device's memory comes in chunks as large as its tensors: keys of a part at a time."""
    monkeypatch.setattr(streamed_order, "PART", 1 << 12)
    kernels = Streaming()
    check(operands(50_000, 1, torch.float32), OrderStatistic([[20_000]]), 49_000, kernels)
    assert max(m for _, m in kernels.fed) == 1 << 12


@pytest.mark.usefixtures("short")
def test_not_finite_keys_are_on_top() -> None:
    models = operands(20_000, 2, torch.float32)
    models[1][7::100] = float("inf")
    models[2][::50] = float("nan")
    for rank in (1, 150, 350, 5000):
        check(models, OrderStatistic([[rank], [rank]]), 3000, Streaming())


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("limit", [700, 5000])
def test_cuts_over_a_model_are_the_cpu_backends(limit: int) -> None:
    """Tensors of any size, one of them empty, runs of the sample and chunks across their borders."""
    models = [
        operands(n, 2, torch.bfloat16, ties=True, seed=n) for n in (4097, 3, 9000, 0, 12_345, 1)
    ]
    tensors = [cases.Operands(base, experts) for base, *experts in models]
    total = sum(len(base) for base, *_ in models)
    for share in (0.001, 0.2, 0.32, 0.5, 0.999):
        request = OrderStatistic([[int(share * total)], [total // 3]], scope="model")
        kernels = Streaming()
        agreement.check_model_cuts(kernels, tensors, request, limit)
        assert kernels.passes == 3


def test_a_tensor_that_comes_whole_is_done_at_once() -> None:
    kernels = Streaming()
    check(operands(100_000, 1, torch.bfloat16), OrderStatistic([[5000]]), 1 << 30, kernels)
    assert not kernels.fed and kernels.whole == 1


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


def test_overlapping_ranges_are_read_once() -> None:
    assert merged([(5, 9), (0, 4), (4, 5), (6, 12), (5, 9)]) == [(0, 4), (4, 5), (5, 12)]


def test_memory_is_bounded_however_long_a_model_is() -> None:
    """Eight experts in pieces of eight million elements: less than a GiB, where 70 billion keys are 2 TB."""
    most = [scratch_bytes(n, 1 << 23, 8, 1, False) for n in (10**10, 7 * 10**10, 10**13)]
    assert most[0] == most[1] == most[2] < 1 << 30
    assert scratch_bytes(1 << 22, 1 << 20, 8, 1, False) < most[0]
