"""The compiled CPU backend: lowers stages to the structs of csrc/core/plan.hpp and calls csrc/cpu."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmerge.backends import MOST_DECIDED, Buffer, Chunk, Coded, Kernels, Sweep
from fastmerge.backends.lowering import (
    MOMENTS,
    given_masks,
    lower_coded,
    lower_keep,
    lower_operands,
    lower_walk,
)
from fastmerge.dtypes import DType
from fastmerge.errors import BackendError
from fastmerge.stages import (
    F64,
    Axis,
    Cut,
    Drop,
    Gram,
    Keep,
    MomentResult,
    Moments,
    OrderStatistic,
    RankedDrop,
    SignBalance,
    Statistic,
    Walk,
)

try:
    from fastmerge import _cpu
except ImportError as error:  # the package works without it: `fastmerge backends` shows the reason
    UNAVAILABLE: str | None = f"the compiled module does not load ({error})"
else:
    UNAVAILABLE = None
    _level = os.environ.get("FASTMERGE_CPU_ISA")
    if _level and not _cpu.set_isa(_level):
        raise BackendError(
            f"FASTMERGE_CPU_ISA={_level!r} is not available here; "
            f"this machine has: {_cpu.available_isas()}"
        )


def _operands(chunk: Chunk, with_base: bool = True) -> _cpu.Operands:
    operands: _cpu.Operands = lower_operands(_cpu, chunk, with_base)
    return operands


def _is_f64(chunk: Chunk) -> bool:
    return chunk.compute is DType.F64


def _keep(keep: Keep) -> tuple[_cpu.Keep, Sequence[Any]]:
    """Lower the keep stages; the second value holds memory that the first one points to."""
    masks = [
        np.ascontiguousarray(np.asarray(m), dtype=np.uint8).reshape(-1) for m in given_masks(keep)
    ]
    return lower_keep(_cpu, keep, [m.ctypes.data for m in masks]), masks


def _lower(walk: Walk) -> tuple[_cpu.Walk, Sequence[Any]]:
    keep, owned = _keep(walk.keep)
    return lower_walk(_cpu, walk, keep), owned


class _Order(Sweep):
    def __init__(self, request: OrderStatistic, n: int, cols: int, k: int, compute: DType) -> None:
        variance = request.of == "variance"
        self._axis = Axis.ROW if request.scope == "row" else Axis.TENSOR
        self._sweep = _cpu.OrderSweep(
            1 if variance else k,
            variance,
            [list(r) for r in request.ranks],
            -1.0 if request.fraction_of_nonzero is None else request.fraction_of_nonzero,
            request.all_ties,
            request.scope == "row",
            n,
            cols,
            compute is DType.F64,
        )

    def feed(self, chunk: Chunk, offset: int = 0) -> None:
        if chunk.n:
            self._sweep.feed(_operands(chunk), offset)

    def next_pass(self) -> bool:
        return self._sweep.next_pass()

    def result(self) -> list[Cut]:
        return [Cut(value, last, self._axis) for value, last in self._sweep.result()]


class _Moments(Sweep):
    def __init__(
        self, request: Moments, k: int, compute: DType, decided: _cpu.Decided | None
    ) -> None:
        self._keep = request.keep
        self._decided = decided
        self._sweep = _cpu.MomentSweep(MOMENTS[request.of], k, compute is DType.F64)

    def feed(self, chunk: Chunk, offset: int = 0) -> None:
        if chunk.n:
            keep, _owned = _keep(self._keep)
            self._sweep.feed(keep, _operands(chunk), self._decided)

    def next_pass(self) -> bool:
        return False

    def result(self) -> MomentResult:
        return MomentResult(*self._sweep.result().T)


class _Gram(Sweep):
    def __init__(self, request: Gram, n: int, cols: int, k: int, compute: DType) -> None:
        self._k, self._delta = k, request.delta
        self._sweep = _cpu.GramSweep(k, int(request.axis), n, cols, compute is DType.F64)

    def feed(self, chunk: Chunk, offset: int = 0) -> None:
        if chunk.n:
            self._sweep.feed(_operands(chunk, self._delta))

    def next_pass(self) -> bool:
        return False

    def result(self) -> F64:
        pairs = self._sweep.result()
        full = np.empty((self._k, self._k, pairs.shape[1]))
        for p, (j, k) in enumerate(itertools.combinations_with_replacement(range(self._k), 2)):
            full[j, k] = full[k, j] = pairs[p]
        return full


class _SignBalance(Sweep):
    def __init__(self, request: SignBalance) -> None:
        self._walk, self._owned = _lower(
            Walk(coefficient=request.coefficient, keep=request.keep, elect=request.elect)
        )
        self._balance = 0

    def feed(self, chunk: Chunk, offset: int = 0) -> None:
        if chunk.n:
            self._balance += _cpu.sign_balance(self._walk, _operands(chunk), _is_f64(chunk))

    def next_pass(self) -> bool:
        return False

    def result(self) -> int:
        return self._balance


class CpuKernels(Kernels):
    """`Kernels` in C++ for any CPU tensor; the instruction set is chosen at run time."""

    name = "cpu"

    def __init__(self) -> None:
        self._lowered: tuple[Walk, _cpu.Walk, Sequence[Any]] | None = None
        # The drop that a statistic last went by, and what it left: its walk need not draw and rank again.
        self._decided: tuple[Drop | RankedDrop, _cpu.Decided] | None = None

    def sweep(
        self, statistic: Statistic, n: int, cols: int, n_experts: int, compute: DType
    ) -> Sweep:
        if isinstance(statistic, OrderStatistic):
            return _Order(statistic, n, cols, n_experts, compute)
        if isinstance(statistic, Moments):
            return _Moments(
                statistic, n_experts, compute, self._decide(statistic.keep, n, n_experts)
            )
        if isinstance(statistic, Gram):
            return _Gram(statistic, n, cols, n_experts, compute)
        return _SignBalance(statistic)

    def _decide(self, keep: Keep, n: int, n_experts: int) -> _cpu.Decided | None:
        self._decided = None
        if keep.drop is None or n > MOST_DECIDED:
            return None
        self._decided = (keep.drop, _cpu.Decided(n_experts, n))
        return self._decided[1]

    def walk(self, walk: Walk, chunk: Chunk, out: Buffer | Coded) -> bool:
        if chunk.n == 0:
            return False
        plan, known = self._plan(walk)
        operands = _operands(chunk, walk.takes_base)
        if isinstance(out, Coded):
            native = lower_coded(_cpu, out)
            bad, *sums = _cpu.walk_coded(plan, operands, _is_f64(chunk), known, native)
            if out.residual is not None:
                out.residual.add(*sums)
            return bad
        return _cpu.walk(plan, operands, _is_f64(chunk), known, out.address, out.dtype.code)

    def peak(self, walk: Walk, chunk: Chunk, dtype: DType) -> tuple[bool, float]:
        plan, known = self._plan(walk)
        operands = _operands(chunk, walk.takes_base)
        return _cpu.walk_peak(plan, operands, _is_f64(chunk), known, dtype.code)

    def _plan(self, walk: Walk) -> tuple[_cpu.Walk, _cpu.Decided | None]:
        # A tensor comes in many chunks with one walk: lower it once.
        if self._lowered is None or self._lowered[0] is not walk:
            self._lowered = (walk, *_lower(walk))
        known = None
        if self._decided is not None and self._decided[0] is walk.keep.drop:
            known = self._decided[1]
        return self._lowered[1], known

    def keep_mask(self, keep: Keep, chunk: Chunk) -> NDArray[np.uint8]:
        plan, _owned = _keep(keep)
        return _cpu.keep_mask(plan, _operands(chunk), _is_f64(chunk))

    def keep_probability(self, drop: RankedDrop, chunk: Chunk) -> F64:
        plan, _owned = _keep(Keep(drop=drop))
        return _cpu.keep_probability(plan, _operands(chunk), _is_f64(chunk))
