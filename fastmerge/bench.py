"""Time every kernel and every method in memory, beside a plain copy in the same run.

Operands are bf16: a base and experts that differ from it as fine-tunes do (heavy tails, a fifth exactly
equal). Every case is first verified against the reference backend on shorter operands. Times are the least
of several runs, so that other work on the machine shows as little as it can. Bytes are counted, not
declared: each sweep reads its operands once, a walk also writes its result, so that a method with one
statistic is measured against two sweeps.

Nothing here imports torch but the verification, which runs the reference backend.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmerge import _cpu, ops
from fastmerge.backends import Buffer, Chunk, Coded, Kernels, Sweep
from fastmerge.bench_cases import COLS, Case, Run, dense_cases
from fastmerge.bench_coded import coded_cases
from fastmerge.errors import RecipeError
from fastmerge.stages import Walk

ELEMENTS = 1 << 23  # of each operand: those of a case together outgrow the usual last-level cache
VERIFIED = 36 * COLS  # rank cuts take the path of long operands above 2^17
RUNS = 7
COPIED = 1 << 28  # bytes that the copy reads; several times the usual last-level cache


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


def cases() -> list[Case]:
    """Return every kernel in its main shapes, every method of the registry, and merges of coded tensors."""
    return dense_cases() + coded_cases()


def matching(only: str) -> list[Case]:
    """Return the cases that have one of the comma-separated parts in their name; empty: all.

    Raises:
        RecipeError: there is none.
    """
    found = [c for c in cases() if any(part.strip() in c.name for part in only.split(","))]
    if not found:
        raise RecipeError(f"nothing to time has {only!r} in its name; see `fastmerge bench`")
    return found


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
    if isinstance(result, list) and all(isinstance(r, np.ndarray) for r in result):
        return result
    if isinstance(result, list):
        return [array for cut in result for array in (cut.value, cut.last_tie)]
    if hasattr(result, "__dataclass_fields__"):
        return [getattr(result, name) for name in result.__dataclass_fields__]
    return [np.asarray(result)]


def _n_bytes(x: Buffer | Coded) -> int:
    if isinstance(x, Buffer):
        return x.n * x.dtype.itemsize
    return sum(_n_bytes(part) for part in x.slots.values()) * x.n // (x.rows * x.cols)


class _Metered:
    """Kernels that add up the bytes they are handed: each sweep's first pass, each walk and its result.

    Coded operands count as the bfloat16 that they stand for.
    """

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
            self.n_bytes += _n_bytes(out)
        return self._kernels.start_walks(jobs)

    def count(self, chunk: Chunk) -> None:
        operands = [*chunk.experts, *([chunk.base] if chunk.base else [])]
        self.n_bytes += sum(2 * b.n if isinstance(b, Coded) else _n_bytes(b) for b in operands)

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
        "versions": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return str(importlib.import_module(package).__version__)
