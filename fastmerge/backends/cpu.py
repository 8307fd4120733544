"""The compiled CPU backend: lowers stages to the structs of csrc/core/plan.hpp and calls csrc/cpu."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmerge.backends import MOST_DECIDED, Buffer, Chunk, Sweep
from fastmerge.dtypes import DType
from fastmerge.errors import BackendError
from fastmerge.stages import (
    F64,
    Axis,
    Cut,
    Drop,
    GivenMask,
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

_MOMENTS = {"abs": 0, "square": 1, "max": 2}
_VOTES = {"mass": 1, "delta": 2, "count": 3, "normmass": 4, "normfrac": 5}
_ON_ZERO = {"plus": 0, "minus": 1, "none": 2}
_DIVIDE = {"none": 0, "constant": 1, "weight": 2}


def _operands(chunk: Chunk, with_base: bool = True) -> _cpu.Operands:
    base = chunk.base if with_base else None
    return _cpu.Operands(
        base.address if base else 0,
        base.dtype.code if base else 1,
        [x.address for x in chunk.experts],
        [x.dtype.code for x in chunk.experts],
        chunk.start,
        chunk.n,
        chunk.cols,
    )


def _is_f64(chunk: Chunk) -> bool:
    return chunk.compute is DType.F64


def _mask_arrays(given: GivenMask) -> list[NDArray[np.uint8]]:
    return [np.ascontiguousarray(np.asarray(m), dtype=np.uint8).reshape(-1) for m in given.masks]


def _keep(keep: Keep) -> tuple[_cpu.Keep, Sequence[Any]]:
    """Lower the keep stages; the second value holds memory that the first one points to."""
    plan = _cpu.Keep()
    if keep.trim:
        _add_cut(plan, "trim", keep.trim.keep)
        if keep.trim.remove:
            _add_cut(plan, "remove", keep.trim.remove)
    if keep.select:
        _add_cut(plan, "select", keep.select.cut)
    drop = keep.drop
    if isinstance(drop, Drop):
        p = list(drop.keep_probability)
        plan.drop(1, p, p, list(drop.key), int(Axis.TENSOR), False, drop.rescale)
    elif isinstance(drop, RankedDrop):
        plan.drop(
            2,
            list(drop.low),
            list(drop.high),
            list(drop.key),
            int(drop.axis),
            drop.by == "value",
            drop.rescale,
        )
    owned: list[Any] = []
    if keep.given:
        owned = list(_mask_arrays(keep.given))
        plan.masks([m.ctypes.data for m in owned])
    return plan, owned


def _add_cut(plan: _cpu.Keep, which: str, cut: Cut) -> None:
    plan.cut(which, cut.value, cut.last_tie, int(cut.axis))


def _lower(walk: Walk) -> tuple[_cpu.Walk, Sequence[Any]]:
    keep, owned = _keep(walk.keep)
    elect, combine = walk.elect, walk.combine
    return (
        _cpu.Walk(
            keep,
            walk.coefficient,
            int(walk.axis),
            _VOTES[elect.by] if elect else 0,
            _ON_ZERO[elect.on_zero] if elect else 0,
            list(elect.vote_scale or ()) if elect else [],
            combine.by == "max",
            _DIVIDE[combine.divide_by],
            combine.divisor,
            list(combine.divisor_weight or ()),
            combine.floor,
            combine.lambda_,
            walk.add_base,
        ),
        owned,
    )


class _Order:
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


class _Moments:
    def __init__(
        self, request: Moments, k: int, compute: DType, decided: _cpu.Decided | None
    ) -> None:
        self._keep = request.keep
        self._decided = decided
        self._sweep = _cpu.MomentSweep(_MOMENTS[request.of], k, compute is DType.F64)

    def feed(self, chunk: Chunk, offset: int = 0) -> None:
        if chunk.n:
            keep, _owned = _keep(self._keep)
            self._sweep.feed(keep, _operands(chunk), self._decided)

    def next_pass(self) -> bool:
        return False

    def result(self) -> MomentResult:
        return MomentResult(*self._sweep.result().T)


class _Gram:
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


class _SignBalance:
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


class CpuKernels:
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

    def walk(self, walk: Walk, chunk: Chunk, out: Buffer) -> bool:
        if chunk.n == 0:
            return False
        # A tensor comes in many chunks with one walk: lower it once.
        if self._lowered is None or self._lowered[0] is not walk:
            self._lowered = (walk, *_lower(walk))
        known = None
        if self._decided is not None and self._decided[0] is walk.keep.drop:
            known = self._decided[1]
        return _cpu.walk(
            self._lowered[1],
            _operands(chunk, walk.add_base),
            _is_f64(chunk),
            known,
            out.address,
            out.dtype.code,
        )

    def keep_mask(self, keep: Keep, chunk: Chunk) -> NDArray[np.uint8]:
        plan, _owned = _keep(keep)
        return _cpu.keep_mask(plan, _operands(chunk), _is_f64(chunk))

    def keep_probability(self, drop: RankedDrop, chunk: Chunk) -> F64:
        plan, _owned = _keep(Keep(drop=drop))
        return _cpu.keep_probability(plan, _operands(chunk), _is_f64(chunk))
