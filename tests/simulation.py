"""A device and drives that keep time at set bandwidths, for tests of the pipeline without a GPU.

Builds csrc/simulate, wraps it as `fastmerge.streaming.device` asks, and has kernels that only take time.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fastmerge.backends import Buffer, Chunk, Kernels, Sweep
from fastmerge.backends.streamed_order import StreamedOrder, sampled_ranges
from fastmerge.dtypes import DType
from fastmerge.errors import DeviceError, DeviceMemoryError
from fastmerge.stages import (
    Axis,
    Cut,
    Gram,
    MomentResult,
    Moments,
    OrderStatistic,
    Statistic,
    Walk,
)
from fastmerge.streaming.device import LANES, Event, Memory, Stream
from fastmerge.streaming.trace import Span

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
NAME = "_simulated"
FLAGS = [
    "-std=c++17",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-pthread",
    "-Wall",
    "-Wextra",
    "-Werror",
]
FLAVOURS = {"plain": ["-O2"], "thread": ["-O1", "-fsanitize=thread", "-fno-omit-frame-pointer"]}


def _sources() -> list[Path]:
    return sorted([*(CSRC / "simulate").glob("*.cpp"), *(CSRC / "io").glob("*.cpp")])


def build(flavour: str = "plain") -> Path:
    """Return the module's path; built once for a state of csrc. flavour: plain, or thread: under TSan."""
    import pybind11

    flags = [*FLAGS, *FLAVOURS[flavour]]
    headers = [h for part in ("simulate", "io", "bindings") for h in (CSRC / part).glob("*.hpp")]
    text = b"".join(p.read_bytes() for p in [*_sources(), *sorted(headers)])
    state = hashlib.blake2b(text + repr((flags, sys.version)).encode(), digest_size=8).hexdigest()
    folder = ROOT / "build" / "simulated" / state
    module = folder / f"{NAME}.so"
    if module.exists():
        return module
    folder.mkdir(parents=True, exist_ok=True)

    def run(command: Sequence[str], target: Path) -> Path:
        partial = target.with_suffix(f".{os.getpid()}")  # others may be building it, too
        done = subprocess.run(["g++", *command, "-o", str(partial)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        partial.rename(target)
        return target

    def object_of(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        include = [f"-I{CSRC}", f"-I{sysconfig.get_paths()['include']}"]
        system = ["-isystem", pybind11.get_include()]
        return run([*flags, *include, *system, "-c", str(source)], target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(object_of, _sources()))
    return run(["-shared", *flags, *map(str, objects)], module)


@lru_cache(None)
def native() -> Any:
    """Return the module: what SIMULATED_MODULE names, else the plain one."""
    path = os.environ.get("SIMULATED_MODULE") or str(build())
    loader = importlib.machinery.ExtensionFileLoader(NAME, path)
    spec = importlib.util.spec_from_loader(NAME, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def run_watched(script: str | Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script, with this module as its `native`, in a process that ThreadSanitizer watches.

    TSan's library must be loaded before anything else. It sees the GIL and Python's locks through pthread;
    streams, drives and csrc/io's threads as they were compiled; but not what the interpreter, numpy or
    fastmerge._cpu do to memory: hence `fill` and `checksum`. A race ends the process with status 66.
    """
    found = subprocess.run(["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": found.stdout.strip(),
        "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
        "SIMULATED_MODULE": str(build("thread")),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    scattered = Path("/proc/sys/vm/mmap_rnd_bits")
    command = [sys.executable, str(script), *arguments]
    if scattered.exists() and int(scattered.read_text()) > 28:  # more than libtsan puts up with
        command = ["setarch", "-R", *command]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def takes(seconds: float, work: Callable[[], object]) -> None:
    """Assert that one run of ten takes so long, within 5 %, and none less: other work may hold any up."""
    taken: list[float] = []
    while len(taken) < 10 and not (taken and taken[-1] < 1.05 * seconds):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    assert seconds <= min(taken) < 1.05 * seconds, taken


# ---- the device ------------------------------------------------------------------------------------


@contextmanager
def _reporting() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise DeviceError(f"the simulated device: {error}") from None


class SimulatedEvent:
    def __init__(self, device: SimulatedDevice, number: int) -> None:
        self._native, self.number = device.native, number

    def wait(self) -> None:
        with _reporting():
            self._native.wait(self.number)

    def is_done(self) -> bool:
        with _reporting():
            return bool(self._native.is_done(self.number))


class _Owner:
    """Gives device memory back once, at the latest when nothing refers to it any more."""

    def __init__(self, device: Any, address: int) -> None:
        self._device, self._address = device, address

    def release(self) -> None:
        address, self._address = self._address, 0
        if address:
            self._device.release(address)

    __del__ = release


class SimulatedDevice:
    """A `Device` at set bandwidths. Options are those of csrc/simulate/device.hpp: Settings.

    Its name and memory are the host's, so that the host's kernels run on it. With `moves_data`
    (the default) they run in the thread that launches them, which therefore waits where the compute stream
    would; without, nothing waits and nothing is touched: the kernels are `SimulatedKernels`.
    """

    name = "cpu"

    def __init__(
        self,
        copy_in_bandwidth: float = 10e9,
        copy_out_bandwidth: float = 10e9,
        memory_bytes: int = 1 << 30,
        *,
        moves_data: bool = True,
        **options: Any,
    ) -> None:
        self.native = native().Device(
            copy_in_bandwidth, copy_out_bandwidth, memory_bytes, moves_data=moves_data, **options
        )
        self.moves_data = moves_data

    def free_bytes(self) -> int:
        return int(self.native.total_bytes - self.native.used_bytes)

    def allocate(self, n_bytes: int) -> Memory:
        try:
            with _reporting():
                address = self.native.allocate(n_bytes)
        except MemoryError as error:
            raise DeviceMemoryError(f"the simulated device: {error}") from None
        return Memory(address, n_bytes, self.name, _Owner(self.native, address))

    def release(self, memory: Memory) -> None:
        memory.owner.release()

    def pin(self, address: int, n_bytes: int) -> bool:
        return bool(self.native.pin(address, n_bytes))

    def unpin(self, address: int) -> None:
        self.native.unpin(address)

    def copy(self, stream: Stream, target: int, source: int, n: int) -> None:
        with _reporting():
            self.native.copy(stream, target, source, n)

    def mark(self, stream: Stream) -> SimulatedEvent:
        with _reporting():
            return SimulatedEvent(self, self.native.mark(stream))

    def follow(self, stream: Stream, event: Event) -> None:
        assert isinstance(event, SimulatedEvent)
        if stream is Stream.COMPUTE and self.moves_data:
            event.wait()
        with _reporting():
            self.native.follow(stream, event.number)

    def computing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def spans(self) -> list[Span]:
        return [
            Span(LANES[Stream(stream)], kind, start, end, n_bytes)
            for stream, start, end, n_bytes, kind in self.native.spans()
        ]

    def close(self) -> None:
        with suppress(RuntimeError):  # reported where it was met
            self.native.synchronize()
        self.native.close()


# ---- kernels that only take time -------------------------------------------------------------------


def _bytes(buffers: Sequence[Buffer | None]) -> int:
    return sum(b.n * b.dtype.itemsize for b in buffers if b is not None)


class SimulatedKernels(Kernels):
    """Kernels for merges of headers alone: they read and write at a bandwidth, and touch nothing."""

    name = "simulated"
    chunk_elements = 1 << 40

    def __init__(self, device: SimulatedDevice, hbm_bandwidth: float = 2e12) -> None:
        self.device, self.hbm_bandwidth = device, hbm_bandwidth

    def launch(self, n_bytes: int) -> None:
        with _reporting():
            self.device.native.compute(n_bytes / self.hbm_bandwidth, n_bytes)

    def sweep(
        self, statistic: Statistic, n: int, cols: int, n_experts: int, compute: DType
    ) -> Sweep:
        return _SimulatedSweep(self, statistic, n, cols, n_experts)

    def walk(self, walk: Walk, chunk: Chunk, out: Buffer) -> bool:
        return self.walks([(walk, chunk, out)])[0]

    def walks(self, jobs: Sequence[tuple[Walk, Chunk, Buffer]]) -> list[bool]:
        return self.start_walks(jobs)()

    def start_walks(self, jobs: Sequence[tuple[Walk, Chunk, Buffer]]) -> Callable[[], list[bool]]:
        self.launch(sum(_bytes([chunk.base, *chunk.experts, out]) for _, chunk, out in jobs))
        behind = self.device.mark(Stream.COMPUTE)

        def bad() -> list[bool]:
            behind.wait()
            return [False] * len(jobs)

        return bad

    def keep_mask(self, keep: Any, chunk: Chunk) -> Any:
        raise NotImplementedError("these kernels keep nothing")

    def keep_probability(self, drop: Any, chunk: Chunk) -> Any:
        raise NotImplementedError("these kernels keep nothing")


#: Readings of a tensor that its rank cuts take: csrc/cuda/select.cu counts digit by digit.
READINGS = 4


class _SimulatedSweep(Sweep):
    """As the CUDA backend: a rank cut of what comes whole takes all readings at once; of what comes in pieces
    a sample, a reading, and that of one piece (fastmerge/backends/streamed_order.py)."""

    def __init__(
        self, kernels: SimulatedKernels, request: Statistic, n: int, cols: int, n_experts: int
    ) -> None:
        self._kernels, self._request = kernels, request
        self._n, self._cols, self._n_experts = n, cols, n_experts
        self._cuts = isinstance(request, OrderStatistic) and request.scope != "row"
        self._pass, self._whole = 0, False
        self._count = 1 if StreamedOrder.pays(n) else 0  # the pass that everything is read in
        self._last = (0, 0)

    def wanted(self) -> Sequence[tuple[int, int]] | None:
        if not self._cuts or self._pass == self._count:
            return None
        return sampled_ranges(self._n) if self._pass < self._count else [self._last]

    def feed(self, chunk: Chunk, offset: int = 0) -> None:
        self._whole = self._cuts and chunk.n == self._n
        self._last = (offset + chunk.start, offset + chunk.start + chunk.n)
        for _ in range(READINGS if self._whole else 1):
            self._kernels.launch(_bytes([chunk.base, *chunk.experts]))

    def next_pass(self) -> bool:
        self._pass += 1
        if not self._cuts or self._whole:
            return False
        return self._pass <= self._count + 1

    def result(self) -> Any:
        self._kernels.device.mark(Stream.COMPUTE).wait()  # for the numbers
        request, k = self._request, self._n_experts
        rows = self._n // self._cols if self._cols else 0
        if isinstance(request, OrderStatistic):
            by_row = request.scope == "row"
            shape = (1 if request.of == "variance" else k, rows if by_row else 1)
            n_cuts = len(request.ranks[0]) if request.ranks else 1
            axis = Axis.ROW if by_row else Axis.TENSOR
            return [Cut(np.zeros(shape), np.zeros(shape, np.int64), axis) for _ in range(n_cuts)]
        if isinstance(request, Moments):
            return MomentResult(np.ones(k), np.ones(k))
        if isinstance(request, Gram):
            units = {Axis.TENSOR: 1, Axis.ROW: rows, Axis.COLUMN: self._cols}[request.axis]
            return np.repeat(np.eye(k)[:, :, None], units, axis=2)
        return 0
