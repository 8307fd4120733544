"""What is timed of a GPU backend, kernel by kernel: each with the bytes that it must move at the least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from gpu_ferry import placed
from gpu_operands import cases as toys
from gpu_operands import chunk_of, compare, family, to_host, whole
from gpu_timing import Run

from fastmerge import bench_coded, ops
from fastmerge.backends import Buffer, Coded, Kernels
from fastmerge.evaluate import run_walk, run_walks, sweep_statistic
from fastmerge.stages import (
    Combine,
    Cut,
    Drop,
    Elect,
    Gram,
    Keep,
    Moments,
    OrderStatistic,
    RankedDrop,
    Select,
    Statistic,
    Trim,
    Walk,
)

COLS = 4096
#: Elements at which a case is verified on its own before it is timed.
VERIFIED = 36 * COLS
#: Elements of the sample that cuts are taken from: what a walk costs does not depend on the exact cut.
SAMPLED = 1 << 18

#: Makes of kernels and operands where they lie what is to be repeated; it returns what it computes.
Prepare = Callable[[Kernels, toys.Operands], Callable[[], Any]]


@dataclass(frozen=True)
class Case:
    """kernel: as verification names it. n_bytes(n): what it must move for n elements of each operand.

    in_sweeps: its time is told in readings of the operands at copy bandwidth.
    """

    name: str
    kernel: str
    n_experts: int
    n_bytes: Callable[[int], float]
    prepare: Prepare
    in_sweeps: bool = False
    with_base: bool = True

    def operands(self, held: toys.Operands) -> toys.Operands:
        return toys.Operands(held.base if self.with_base else None, held.experts[: self.n_experts])

    def check(self, kernels: Kernels, referee: Kernels, held: toys.Operands) -> None:
        """Raise gpu_operands.Mismatch unless the case gives the referee's bits on `held`."""
        mine = self.operands(held)
        compare(self.prepare(kernels, mine)(), self.prepare(referee, to_host(mine))())

    def run(self, kernels: Kernels, sets: Sequence[toys.Operands]) -> Run:
        prepared = [self.prepare(kernels, self.operands(held)) for held in sets]
        return lambda i: prepared[i]()


def operand_sets(device: Any, n: int, k: int, seed: int, n_sets: int) -> list[toys.Operands]:
    """Return sets of a base and k experts, [rows, COLS] bf16 on the device."""
    sets = [family(device, n, k, seed + i) for i in range(n_sets)]
    return [
        toys.Operands(
            None if held.base is None else held.base.view(-1, COLS),
            [e.view(-1, COLS) for e in held.experts],
        )
        for held in sets
    ]


# ---- walks -----------------------------------------------------------------------------------------


def _walk(
    name: str,
    k: int,
    build: Callable[[toys.Operands], Walk],
    with_base: bool = True,
    kernel: str = "walk",
) -> Case:
    """A walk must read its operands and write its result, 2 bytes an element each."""

    def prepare(kernels: Kernels, held: toys.Operands) -> Callable[[], Any]:
        walk = build(held)
        out = torch.empty_like(held.experts[0])
        operands, target = whole(held), ops.buffer_of(out, "out")

        def run() -> Any:
            run_walk(kernels, walk, operands, target, kernels.chunk_elements)
            return out

        return run

    def n_bytes(n: int) -> float:
        return 2.0 * n * (k + 1 + with_base)

    return Case(f"{name} K={k}", kernel, k, n_bytes, prepare, with_base=with_base)


def _cut(held: toys.Operands, kept: float, k: int | None = None) -> Cut:
    """Return a cut that keeps about this fraction, from a sample on the host; a tie in the middle."""
    assert held.base is not None
    origin = held.base.reshape(-1)[:SAMPLED].cpu().float()
    sizes = [(e.reshape(-1)[:SAMPLED].cpu().float() - origin).abs() for e in held.experts]
    if k == 1:  # variance over experts
        sizes = [torch.stack(sizes).var(0, correction=0)]
    n = len(origin)
    rank = max(1, min(n, n - int(kept * n)))
    value = np.array([[float(s.kthvalue(rank).values)] for s in sizes])
    return Cut(value, np.full(value.shape, held.base.numel() // 2, np.int64))


def _half(held: toys.Operands) -> Any:
    return np.full((len(held.experts), 1), 0.5)


def _mean(held: toys.Operands) -> Combine:
    return Combine(divide_by="weight", divisor_weight=[0.5] * len(held.experts))


def _drop(held: toys.Operands) -> Drop:
    k = len(held.experts)
    return Drop([0.5] * k, [1 + 977 * e for e in range(k)], rescale=True)


def _ranked(k: int, rescale: bool = False) -> RankedDrop:
    return RankedDrop([0.3] * k, [0.7] * k, [1 + 977 * e for e in range(k)], rescale=rescale)


def _linear(held: toys.Operands) -> Walk:
    k = len(held.experts)
    return Walk(np.ones((k, 1)), combine=Combine(divide_by="constant", divisor=k), add_base=False)


def _ties(held: toys.Operands) -> Walk:
    return Walk(
        _half(held), keep=Keep(Trim(_cut(held, 0.3))), elect=Elect("mass"), combine=_mean(held)
    )


def _breadcrumbs(held: toys.Operands) -> Walk:
    return Walk(_half(held), keep=Keep(Trim(_cut(held, 0.85), _cut(held, 0.05))))


def _sce(held: toys.Operands) -> Walk:
    mean = Combine(divide_by="weight", divisor_weight=[0.5] * len(held.experts), floor=1e-6)
    return Walk(
        _half(held),
        keep=Keep(select=Select(_cut(held, 0.1, 1))),
        elect=Elect("delta"),
        combine=mean,
    )


# ---- statistics and masks --------------------------------------------------------------------------


def _statistic(
    name: str,
    kernel: str,
    k: int,
    request: Callable[[toys.Operands], Statistic],
    in_sweeps: bool = False,
) -> Case:
    """A statistic must read its operands once; what it writes is small."""

    def prepare(kernels: Kernels, held: toys.Operands) -> Callable[[], Any]:
        wanted, operands = request(held), whole(held)
        return lambda: sweep_statistic(kernels, wanted, operands, kernels.chunk_elements)

    return Case(f"{name} K={k}", kernel, k, lambda n: 2.0 * n * (k + 1), prepare, in_sweeps)


def _mask(name: str, k: int, keep: Keep, reads: bool) -> Case:
    """A mask is a byte an element and expert; draws need no operand, ranks need all."""

    def prepare(kernels: Kernels, held: toys.Operands) -> Callable[[], Any]:
        chunk = chunk_of(held)
        return lambda: kernels.keep_mask(keep, chunk)

    def n_bytes(n: int) -> float:
        return n * (1.0 * k + 2.0 * reads * (k + 1))

    return Case(f"{name} K={k}", "keep mask", k, n_bytes, prepare)


# ---- codes -----------------------------------------------------------------------------------------

#: Formats that are timed: one of each arithmetic and layout that has a kernel of its own.
CODED = ("nf4", "int4-asym", "nvfp4", "mxfp4", "fp8", "q4_0", "q4_k")


def _bytes_of(x: Buffer | Coded) -> int:
    parts = x.slots.values() if isinstance(x, Coded) else [x]
    return sum(part.n * part.dtype.itemsize for part in parts)


def _empty(name: str, n: int, where: torch.device) -> Coded:
    return placed(bench_coded.empty(name, n)[1], where)


def _into(name: str) -> Case:
    """TIES into codes: reads base and experts, writes codes and scales."""

    def prepare(kernels: Kernels, held: toys.Operands) -> Callable[[], Any]:
        where = held.experts[0].device
        walk, operands = _ties(held), whole(held)
        out = _empty(name, operands.n, where)

        def run() -> Any:
            run_walk(kernels, walk, operands, out, kernels.chunk_elements)
            return [part.owner for part in out.slots.values()]

        return run

    def n_bytes(n: int) -> float:
        return 10.0 * n + _bytes_of(bench_coded.empty(name, n)[1])

    return Case(f"ties to {name} K=4", "codes", 4, n_bytes, prepare)


def _from(name: str, k: int) -> Case:
    """The mean of codes, bf16: reads codes and scales, writes 2 bytes an element."""

    def prepare(kernels: Kernels, held: toys.Operands) -> Callable[[], Any]:
        where, operands = held.experts[0].device, whole(held)
        alone = Walk(np.ones((1, 1)), add_base=False)
        experts = []
        for expert in operands.experts:
            coded = _empty(name, operands.n, where)
            run_walk(kernels, alone, replace(operands, base=None, experts=[expert]), coded)
            experts.append(coded)
        walk, out = _linear(held), torch.empty_like(held.experts[0])
        coded_operands = replace(operands, base=None, experts=experts)
        target = ops.buffer_of(out, "out")

        def run() -> Any:
            run_walk(kernels, walk, coded_operands, target, kernels.chunk_elements)
            return out

        return run

    def n_bytes(n: int) -> float:
        return 2.0 * n + k * _bytes_of(bench_coded.empty(name, n)[1])

    return Case(f"average of {name} K={k}", "codes", k, n_bytes, prepare, with_base=False)


# ---- all of them -----------------------------------------------------------------------------------


def all_cases() -> list[Case]:
    """Return every kernel in its main shapes."""
    found = []
    for k in (2, 4, 8):
        found += [
            _walk("linear", k, _linear, with_base=False),
            _walk("task arithmetic", k, lambda held: Walk(_half(held))),
            _walk("ties", k, _ties),
            _statistic(
                "exact select", "order of delta", k,
                lambda held: OrderStatistic([[held.experts[0].numel() * 3 // 10]] * len(held.experts)),
                in_sweeps=True,
            ),
        ]  # fmt: skip
    for k in (4, 8, 2):
        found += [
            _walk("dare", k, lambda held: Walk(_half(held), keep=Keep(drop=_drop(held)))),
            _walk(
                "dare ties", k,
                lambda held: Walk(_half(held), keep=Keep(drop=_drop(held)), elect=Elect("mass")),
            ),
            _walk("breadcrumbs", k, _breadcrumbs),
            _walk("sce", k, _sce),
        ]  # fmt: skip
    found += [
        _statistic(
            "moments of trimmed", "moments", 4, lambda held: Moments("abs", Keep(Trim(_cut(held, 0.3)))),
        ),
        _statistic("squares", "moments", 4, lambda held: Moments("square")),
        _statistic("gram", "gram", 4, lambda held: Gram()),
        _mask("keep mask", 4, Keep(drop=Drop([0.5] * 4, [1, 2, 3, 4])), reads=False),
        _walk("della", 4, lambda held: Walk(_half(held), keep=Keep(drop=_ranked(4))), kernel="any walk"),
        _walk(
            "della rescaled", 4,
            lambda held: Walk(_half(held), keep=Keep(drop=_ranked(4, rescale=True))), kernel="any walk",
        ),
        _mask("ranked rows", 4, Keep(drop=_ranked(4)), reads=True),
        _statistic(
            "row select", "row order", 4,
            lambda held: OrderStatistic([[COLS * 3 // 10]] * 4, scope="row"), in_sweeps=True,
        ),
        _statistic(
            "variance select", "order of variance", 4,
            lambda held: OrderStatistic(of="variance", fraction_of_nonzero=0.1), in_sweeps=True,
        ),
    ]  # fmt: skip
    return found + [_into(name) for name in CODED] + [_from(name, 4) for name in CODED]


# ---- many small tensors ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Small:
    """Tensors as norms, biases and small matrices of a model are, and a TIES walk over each."""

    operands: list[toys.Operands]
    walks: list[Walk]

    @classmethod
    def of(cls, device: Any, count: int, largest: int, k: int, seed: int) -> Small:
        rng = np.random.default_rng(seed)
        sizes = rng.integers(min(4096, largest // 2), largest + 1, count)
        held = family(device, int(sizes.sum()), k, seed)
        assert held.base is not None
        ends = np.cumsum(sizes)
        parts = [slice(int(b - n), int(b)) for n, b in zip(sizes, ends, strict=True)]
        operands = [
            toys.Operands(held.base[p].clone(), [e[p].clone() for e in held.experts]) for p in parts
        ]
        return cls(operands, [_ties(h) for h in operands])

    @property
    def n_bytes(self) -> float:
        return sum(2.0 * h.experts[0].numel() * (len(h.experts) + 2) for h in self.operands)

    def _jobs(self) -> tuple[list[torch.Tensor], list[Any]]:
        outs = [torch.empty_like(h.experts[0]) for h in self.operands]
        return outs, [
            (walk, whole(h), ops.buffer_of(out, "out"))
            for walk, h, out in zip(self.walks, self.operands, outs, strict=True)
        ]

    def together(self, kernels: Kernels) -> Callable[[], Any]:
        outs, jobs = self._jobs()

        def run() -> Any:
            run_walks(kernels, jobs, kernels.chunk_elements)
            return outs

        return run

    def one_by_one(self, kernels: Kernels) -> Callable[[], Any]:
        outs, jobs = self._jobs()

        def run() -> Any:
            for job in jobs:
                run_walk(kernels, *job, kernels.chunk_elements)
            return outs

        return run

    def on_host(self) -> Small:
        return Small([to_host(h) for h in self.operands], self.walks)

    def cuts(self) -> list[list[float]]:
        """Return each tensor's cut values, for the eager form of the same walk."""
        found = []
        for walk in self.walks:
            assert walk.keep.trim
            found.append([float(v) for v in walk.keep.trim.keep.value[:, 0]])
        return found
