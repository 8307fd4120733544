"""The operands and the kernels and methods that `bench` times, as cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmerge.backends import Buffer, Kernels
from fastmerge.dtypes import DType
from fastmerge.evaluate import Operands, resolve, run_walk, sweep_statistic
from fastmerge.recipe import keyword_params
from fastmerge.registry import REQUIRED, MethodSpec, TensorContext, methods
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
    Statistic,
    Trim,
    Walk,
)

COLS = 4096
MOST_EXPERTS = 8

#: Returns what a case computes, to be compared.
Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """Something to time: `prepare(kernels, operands)` does what is not timed and returns the rest."""

    name: str
    n_experts: int
    prepare: Callable[[Kernels, Operands], Run]
    with_base: bool = True

    def operands(self, n: int) -> Operands:
        """Return a base, if the case has one, and experts of n elements each."""
        base, experts = family(n)
        origin = base if self.with_base else None
        return Operands(origin, experts[: self.n_experts], COLS, DType.F32)


# ---- operands --------------------------------------------------------------------------------------


def bf16(x: NDArray[np.float32]) -> Buffer:
    """Round to bfloat16, to nearest even; x is finite."""
    bits = x.view(np.uint32)
    held = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return Buffer(held.ctypes.data, DType.BF16, held.size, held)


@lru_cache(maxsize=2)
def family(n: int) -> tuple[Buffer, list[Buffer]]:
    """Return a base and MOST_EXPERTS experts of n elements; as in benchmarks/families.py."""
    rng = np.random.default_rng(0)
    changes = rng.standard_t(3, (1 << 20) + 7).astype(np.float32) * np.float32(0.0005)
    changes[rng.random(changes.size) < 0.2] = 0
    base = rng.standard_normal(n, np.float32) * np.float32(0.03)
    experts = []
    for _ in range(MOST_EXPERTS):  # a pool of changes from another place each: draws are slow
        start = int(rng.integers(changes.size))
        experts.append(bf16(base + np.resize(np.roll(changes, -start), n)))
    return bf16(base), experts


# ---- cases -----------------------------------------------------------------------------------------


def _walk(
    name: str, k: int, walk: Callable[[Kernels, Operands], Walk], with_base: bool = True
) -> Case:
    def prepare(kernels: Kernels, operands: Operands) -> Run:
        built = walk(kernels, operands)
        held, out = result(operands.n)

        def run() -> Any:
            run_walk(kernels, built, operands, out)
            return held

        return run

    return Case(f"{name} walk K={k}", k, prepare, with_base)


def _statistic(name: str, k: int, request: Callable[[int, int], Statistic]) -> Case:
    def prepare(kernels: Kernels, operands: Operands) -> Run:
        wanted = request(operands.n, k)
        return lambda: sweep_statistic(kernels, wanted, operands)

    return Case(f"{name} K={k}", k, prepare)


#: What methods are timed with, where they have a parameter of that name; the rest keep their defaults.
SETTINGS = {
    "weight": 0.5, "density": 0.5, "gamma": 0.05, "epsilon": 0.2, "select_topk": 0.5, "t": 0.3, "scale": 0.5,
}  # fmt: skip


def _method(spec: MethodSpec) -> Case:
    """Return a method from end to end: its statistics and its walk, as `evaluate` runs them."""
    least, most = spec.n_inputs
    k = min(max(4, least), most or MOST_EXPERTS)
    has_base = spec.base != "ignored"
    with_base = has_base and not spec.base_is_operand
    chosen = {name: value for name, value in SETTINGS.items() if spec.param(name)}
    params = keyword_params(spec, k, has_base, chosen)

    def prepare(kernels: Kernels, operands: Operands) -> Run:
        n = operands.n
        context = TensorContext("tensor", (n // COLS, COLS), k, with_base, n_model=n)
        held, out = result(n)

        def run() -> Any:
            walk, over = resolve(kernels, spec, params, context, operands)
            run_walk(kernels, walk, over, out)
            return held

        return run

    return Case(f"method {spec.name} K={k}", k, prepare, with_base)


def result(n: int) -> tuple[NDArray[np.uint16], Buffer]:
    held = np.empty(n, np.uint16)
    return held, Buffer(held.ctypes.data, DType.BF16, n, held)


def ties(kernels: Kernels, operands: Operands) -> Walk:
    k = len(operands.experts)
    cuts = sweep_statistic(kernels, OrderStatistic(_ranks(operands.n, k)), operands)
    return Walk(
        np.full((k, 1), 0.5),
        keep=Keep(trim=Trim(cuts[0])),
        elect=Elect("mass"),
        combine=Combine(divide_by="weight", divisor_weight=[0.5] * k),
    )


def _ranks(n: int, k: int) -> list[list[int]]:
    return [[n * 3 // 10]] * k


def average(kernels: Kernels, operands: Operands) -> Walk:
    k = len(operands.experts)
    return Walk(np.full((k, 1), 1 / k), add_base=operands.base is not None)


def dense_cases() -> list[Case]:
    """Return every kernel in its main shapes, then every method of the registry."""
    drop = Keep(drop=Drop([0.5] * 4, [1, 2, 3, 4], rescale=True))
    ranked = Keep(drop=RankedDrop([0.3] * 4, [0.7] * 4, [1, 2, 3, 4], Axis.ROW))
    half = np.full((4, 1), 0.5)
    found = [_walk("ties", k, ties) for k in (2, 4, 8)]
    found += [_walk("linear", k, average, with_base=False) for k in (2, 4, 8)]
    found += [
        _walk("sum of deltas", 4, average),
        _walk("dare", 4, lambda *_: Walk(half, keep=drop)),
        _walk("dare ties", 4, lambda *_: Walk(half, keep=drop, elect=Elect("mass"))),
        _walk("della", 4, lambda *_: Walk(half, keep=ranked)),
    ]
    found += [
        _statistic("order statistic", k, lambda n, k: OrderStatistic(_ranks(n, k)))
        for k in (2, 4, 8)
    ]
    found += [
        _statistic("two ranks", 4, lambda n, k: OrderStatistic([[n // 100, n * 9 // 10]] * k)),
        _statistic(
            "variance cut", 4, lambda *_: OrderStatistic(of="variance", fraction_of_nonzero=0.3)
        ),
        _statistic("row order", 4, lambda _, k: OrderStatistic([[1000]] * k, scope="row")),
        _statistic("moments", 4, lambda *_: Moments("abs")),
        _statistic("moments of dare", 4, lambda *_: Moments("abs", drop)),
        _statistic("gram", 4, lambda *_: Gram()),
        _statistic("row gram", 4, lambda *_: Gram(axis=Axis.ROW)),
        _statistic("sign balance", 4, lambda *_: SignBalance(Keep(), half, Elect("mass"))),
    ]
    return found + [_method(spec) for spec in methods().values() if _is_settled(spec)]


def _is_settled(spec: MethodSpec) -> bool:
    """Return whether it is swept, and every required parameter has a value here."""
    settled = all(p.name in SETTINGS for p in spec.params if p.default is REQUIRED)
    return (
        settled and spec.cost is None
    )  # decompositions are no sweeps: bytes are not what they take
