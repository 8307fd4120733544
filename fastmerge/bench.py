"""Time every kernel and every method in memory, beside a plain copy in the same run.

Operands are bf16: a base and experts that differ from it as fine-tunes do (heavy tails, a fifth exactly
equal). Every case is first verified against the reference backend on shorter operands. Times are the least
of several runs, so that other work on the machine shows as little as it can. Bytes are counted, not
declared: each sweep reads its operands once, a walk also writes its result, so that a method with one
statistic is measured against two sweeps.

Nothing here imports torch but the verification, which runs the reference backend.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmerge import _cpu, ops
from fastmerge.backends import Buffer, Chunk, Coded, Kernels, Sweep
from fastmerge.dtypes import DType
from fastmerge.errors import RecipeError
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
ELEMENTS = 1 << 23  # of each operand: those of a case together outgrow the usual last-level cache
VERIFIED = 36 * COLS  # rank cuts take the path of long operands above 2^17
RUNS = 7
COPIED = 1 << 28  # bytes that the copy reads; several times the usual last-level cache
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


@dataclass(frozen=True)
class Timing:
    """One row of the table. share_of_copy: of the bandwidth of a copy on as many threads."""

    name: str
    n_experts: int
    bytes_per_element: float
    ns_per_element: float
    gb_per_s: float
    share_of_copy: float

    @classmethod
    def of(
        cls, case: Case, n: int, bytes_per_element: float, seconds: float, copied: float
    ) -> Timing:
        """Rate `seconds` for n elements against `copied` bytes per second."""
        rate = bytes_per_element * n / seconds
        return cls(
            case.name,
            case.n_experts,
            bytes_per_element,
            seconds / n * 1e9,
            rate / 1e9,
            rate / copied,
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        return (
            f"{self.name:<32}{self.bytes_per_element:>15.0f}{self.ns_per_element:>13.3f}"
            f"{self.gb_per_s:>9.1f}{self.share_of_copy:>10.0%}"
        )


HEADINGS = (
    f"{'operation, K experts':<32}{'bytes/element':>15}{'ns/element':>13}{'GB/s':>9}{'of copy':>10}"
)


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
        held, out = _result(operands.n)

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
        held, out = _result(n)

        def run() -> Any:
            walk = resolve(kernels, spec, params, context, operands)
            run_walk(kernels, walk, operands, out)
            return held

        return run

    return Case(f"method {spec.name} K={k}", k, prepare, with_base)


def _result(n: int) -> tuple[NDArray[np.uint16], Buffer]:
    held = np.empty(n, np.uint16)
    return held, Buffer(held.ctypes.data, DType.BF16, n, held)


def _ties(kernels: Kernels, operands: Operands) -> Walk:
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


def _average(kernels: Kernels, operands: Operands) -> Walk:
    k = len(operands.experts)
    return Walk(np.full((k, 1), 1 / k), add_base=operands.base is not None)


def cases() -> list[Case]:
    """Return every kernel in its main shapes, then every method of the registry."""
    drop = Keep(drop=Drop([0.5] * 4, [1, 2, 3, 4], rescale=True))
    ranked = Keep(drop=RankedDrop([0.3] * 4, [0.7] * 4, [1, 2, 3, 4], Axis.ROW))
    half = np.full((4, 1), 0.5)
    found = [_walk("ties", k, _ties) for k in (2, 4, 8)]
    found += [_walk("linear", k, _average, with_base=False) for k in (2, 4, 8)]
    found += [
        _walk("sum of deltas", 4, _average),
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


def matching(only: str) -> list[Case]:
    """Return the cases that have one of the comma-separated parts in their name; empty: all.

    Raises:
        RecipeError: there is none.
    """
    found = [c for c in cases() if any(part.strip() in c.name for part in only.split(","))]
    if not found:
        raise RecipeError(f"nothing to time has {only!r} in its name; see `fastmerge bench`")
    return found


def _is_settled(spec: MethodSpec) -> bool:
    """Return whether every required parameter has a value here; those of other packages may not."""
    return all(p.name in SETTINGS for p in spec.params if p.default is REQUIRED)


# ---- verifying and counting ------------------------------------------------------------------------


def verify(case: Case) -> None:
    """Raise AssertionError unless the CPU kernels give the reference's bits."""
    operands = case.operands(VERIFIED)
    kernels = [ops.choose("cpu", name) for name in ("cpu", "reference")]
    found, expected = (_arrays(case.prepare(k, operands)()) for k in kernels)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=case.name)


def _arrays(result: Any) -> list[NDArray[Any]]:
    """Take any result apart into arrays that compare bit by bit."""
    if isinstance(result, list):
        return [array for cut in result for array in (cut.value, cut.last_tie)]
    if hasattr(result, "__dataclass_fields__"):
        return [getattr(result, name) for name in result.__dataclass_fields__]
    return [np.asarray(result)]


class _Metered:
    """Kernels that add up the bytes they are handed: each sweep's first pass, each walk and its result."""

    name = "metered"

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self.n_bytes = 0

    def sweep(self, *request: Any) -> Sweep:
        return _MeteredSweep(self, self._kernels.sweep(*request))

    def start_walks(
        self, jobs: Sequence[tuple[Walk, Chunk, Buffer | Coded]]
    ) -> Callable[[], list[bool]]:
        for _, chunk, out in jobs:
            self.count(chunk)
            self.n_bytes += out.n * out.dtype.itemsize
        return self._kernels.start_walks(jobs)

    def count(self, chunk: Chunk) -> None:
        operands = [*chunk.experts, *([chunk.base] if chunk.base else [])]
        self.n_bytes += sum(b.n * b.dtype.itemsize for b in operands)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)


class _MeteredSweep(Sweep):
    def __init__(self, meter: _Metered, sweep: Sweep) -> None:
        self._meter, self._sweep = meter, sweep
        self._first = True

    def feed(self, chunk: Chunk, offset: int = 0) -> None:
        if self._first:
            self._meter.count(chunk)
        self._sweep.feed(chunk, offset)

    def next_pass(self) -> bool:
        self._first = False
        return self._sweep.next_pass()

    def wanted(self) -> Sequence[tuple[int, int]] | None:
        return self._sweep.wanted()

    def result(self) -> Any:
        return self._sweep.result()


def bytes_per_element(case: Case) -> float:
    """Return the bytes that a case moves at least, per element of one operand."""
    operands = case.operands(VERIFIED)
    meter = _Metered(ops.choose("cpu", "cpu"))
    run = case.prepare(meter, operands)
    meter.n_bytes = 0  # what `prepare` needed is not timed
    run()
    return meter.n_bytes / operands.n


# ---- timing ----------------------------------------------------------------------------------------


def least_seconds(run: Run, runs: int = RUNS) -> float:
    best = float("inf")
    for _ in range(runs):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def copy_bandwidth(threads: int) -> float:
    """Return the bytes per second, read and written, of a copy on `threads` threads."""
    source, target = np.ones(COPIED, np.uint8), np.ones(COPIED, np.uint8)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:  # numpy lets go of the interpreter's lock
        seconds = least_seconds(lambda: list(pool.map(lambda part: np.copyto(*part), parts)))
    return 2 * COPIED / seconds


class Bench:
    """One run of the table. threads: 0 takes what the process may use; the copy takes as many."""

    def __init__(self, elements: int = ELEMENTS, threads: int = 0) -> None:
        self.n = max(COLS, elements // COLS * COLS)
        self.threads = _cpu.set_threads(threads)
        self.kernels = ops.choose("cpu", "cpu")
        self.copied = copy_bandwidth(self.threads)

    def prepare(self, case: Case) -> Run:
        """Verify a case and return what to time."""
        verify(case)
        return case.prepare(self.kernels, case.operands(self.n))

    def timing(self, case: Case, seconds: float) -> Timing:
        return Timing.of(case, self.n, bytes_per_element(case), seconds, self.copied)

    def timings(self, wanted: Sequence[Case]) -> Iterator[Timing]:
        """Yield the rows as they are measured."""
        for case in wanted:
            yield self.timing(case, least_seconds(self.prepare(case)))

    def headline(self) -> str:
        return (
            f"{processor()}, {_cpu.isa()}, {self.threads} thread{'s' * (self.threads > 1)}; "
            f"{self.n} bf16 elements; copy {self.copied / 1e9:.1f} GB/s"
        )

    def as_dict(self, timings: list[Timing]) -> dict[str, Any]:
        return {
            **environment("fastmerge", "numpy"),
            "isa": _cpu.isa(),
            "threads": self.threads,
            "elements": self.n,
            "copy_gb_per_s": self.copied / 1e9,
            "rows": [t.as_dict() for t in timings],
        }


# ---- where it was measured -------------------------------------------------------------------------


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def environment(*packages: str) -> dict[str, Any]:
    """Return what a result must carry: machine, date and the versions of `packages`."""
    return {
        "machine": f"{processor()}, {os.cpu_count()} cores, {platform.system()}, "
        f"Python {platform.python_version()}",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
