"""The machine under a GPU benchmark: memory, streams, clocks, the launches of a backend, what it is called.

`Host` stands in for `Gpu` where there is none, so that everything but the numbers can be rehearsed.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fastmerge import ops
from fastmerge.backends import Kernels

ROOT = Path(__file__).resolve().parent.parent
#: Bytes written between repetitions, at the least: several times any card's L2.
FLUSHED = 1 << 28
#: What a launch is queued behind, in cycles: some 40 us, in which the host queues launch and events.
HOLD_CYCLES = 80_000


class Host:
    """Host memory and its clock."""

    name = "rehearsal on the host"
    where = torch.device("cpu")

    def synchronise(self) -> None:
        """Wait for all that is queued."""

    def alive(self) -> bool:
        """Return whether the device still answers: after a wild access nothing of this process does."""
        return True

    def stamp(self) -> Any:
        """Return a point in the stream's time."""
        return time.perf_counter()

    def seconds(self, first: Any, last: Any) -> float:
        return float(last - first)

    def hold(self) -> None:
        """Keep the stream busy while the host queues what is timed: the host's own time stays out."""

    def flush(self) -> None:
        """Put what the caches hold out of them."""

    def another_stream(self) -> Any:
        """Return a context in which work goes to a stream that is not the default one."""
        return nullcontext()

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.where).manual_seed(seed)

    def facts(self) -> dict[str, Any]:
        return {"card": self.name}


class Gpu(Host):
    """The first NVIDIA GPU."""

    def __init__(self) -> None:
        self.where = torch.device("cuda", 0)
        self._properties = torch.cuda.get_device_properties(0)
        self.name = self._properties.name
        l2 = getattr(self._properties, "L2_cache_size", 0)
        self._flushed = torch.empty(max(FLUSHED, 4 * l2), dtype=torch.uint8, device=self.where)
        self._turn = 0

    def synchronise(self) -> None:
        torch.cuda.synchronize()

    def alive(self) -> bool:
        try:
            torch.zeros(1, device=self.where).item()
        except RuntimeError:
            return False
        return True

    def stamp(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: Any, last: Any) -> float:
        return float(first.elapsed_time(last)) / 1e3

    def hold(self) -> None:
        torch.cuda._sleep(HOLD_CYCLES)

    def flush(self) -> None:
        self._turn = (self._turn + 1) % 251
        self._flushed.fill_(self._turn)
        # Read it as well: what was written would go to memory in the time of the kernel that comes next.
        self._flushed.view(torch.int32).max()

    @contextmanager
    def another_stream(self) -> Iterator[None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)

    def facts(self) -> dict[str, Any]:
        p = self._properties
        asked = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
        answer = _output("nvidia-smi", "-i", "0", f"--query-gpu={asked}", "--format=csv,noheader")
        values = [v.strip() for v in answer.split(",")]
        told = dict(zip(asked.split(","), values, strict=False)) if answer else {}
        return {
            "card": self.name,
            "compute_capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_bytes": p.total_memory,
            "l2_bytes": getattr(p, "L2_cache_size", None),
            "driver": told.pop("driver_version", None),
            "clocks": told,
        }


def _output(*command: str) -> str:
    """Return the first line that a command prints, or an empty text."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.SubprocessError):
        return ""
    lines = done.stdout.strip().splitlines() if done.returncode == 0 else []
    return lines[0] if lines else ""


def _version(package: str) -> str | None:
    try:
        return str(importlib.import_module(package).__version__)
    except ImportError:
        return None


def environment(device: Host) -> dict[str, Any]:
    """Return what a result must carry of the machine, its software and the sources."""
    commit = _output("git", "rev-parse", "HEAD")
    changed = bool(commit) and bool(_output("git", "status", "--porcelain", "--untracked-files=no"))
    return {
        **device.facts(),
        "machine": f"{device.name}, {platform.system()}, Python {platform.python_version()}",
        "cuda": torch.version.cuda,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": {
            name: version
            for name in ("fastmerge", "torch", "triton", "numpy")
            if (version := _version(name))
        },
        "commit": commit + ("-changed" if changed else "") if commit else None,
    }


# ---- launches --------------------------------------------------------------------------------------


@dataclass
class Meter:
    """Notes when each launch of a backend began and ended on the stream, while it is on."""

    device: Host
    on: bool = False
    launches: list[tuple[str, Any, Any]] = field(default_factory=list)

    def start(self) -> None:
        self.launches, self.on = [], True

    def stop(self) -> None:
        self.on = False

    def by_name(self) -> dict[str, float]:
        """Return seconds by name of what was launched; the device has been waited for."""
        total: dict[str, float] = {}
        for name, first, last in self.launches:
            total[name] = total.get(name, 0.0) + self.device.seconds(first, last)
        return total


class MeteredModule:
    """A compiled module of kernels whose every function that takes a queue is a launch to note."""

    def __init__(self, native: Any, meter: Meter) -> None:
        self._native, self._meter = native, meter

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._native, name)
        if isinstance(found, type) or not callable(found):
            return found

        def launch(*arguments: Any) -> Any:
            meter = self._meter
            if not meter.on or not arguments or not isinstance(arguments[0], self._native.Queue):
                return found(*arguments)
            meter.device.hold()
            first = meter.device.stamp()
            result = found(*arguments)
            meter.launches.append((name, first, meter.device.stamp()))
            return result

        return launch


def meter_triton(meter: Meter) -> bool:
    """Note Triton's launches by its hooks; false where this version has none."""
    try:
        from triton import knobs

        chains = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        add = [chain.add for chain in chains]
    except (ImportError, AttributeError):
        return False
    begun: list[tuple[str, Any]] = []

    def enter(metadata: Any) -> None:
        if meter.on:
            try:
                name = str(metadata.get()["name"])
            except Exception:  # what it carries differs between versions; a name is a comfort only
                name = "kernel"
            meter.device.hold()
            begun.append((name, meter.device.stamp()))

    def leave(metadata: Any) -> None:
        if begun:
            name, first = begun.pop()
            meter.launches.append((name, first, meter.device.stamp()))

    for hook, function in zip(add, (enter, leave), strict=True):
        hook(function)
    return True


# ---- kernels under test ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A backend to verify and time: its kernels, where its operands lie, the meter of its launches."""

    kernels: Kernels
    device: Host
    meter: Meter
    label: str

    @contextmanager
    def served(self) -> Iterator[str]:
        """Yield a name under which `backend=` finds these very kernels."""
        name = f"bench-{self.label}"
        entry = ops.Entry(
            name, (self.device.where.type,), "under test", lambda: None, lambda _: self.kernels
        )
        before = ops.BACKENDS
        ops.BACKENDS = (*before, entry)  # type: ignore[misc,assignment]
        try:
            yield name
        finally:
            ops.BACKENDS = before  # type: ignore[misc]


def load_emulated(path: Path) -> ModuleType:
    """Return the CUDA module that was built for the host, see csrc/emulate."""
    loader = importlib.machinery.ExtensionFileLoader("_cuda_emulated", str(path))
    spec = importlib.util.spec_from_loader("_cuda_emulated", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def subject_of(name: str, device: Host, emulated: Path | None = None) -> Subject | str:
    """Return the backend `cuda` or `triton` on `device`, or why it cannot run there."""
    meter = Meter(device)
    if name == "cuda":
        from fastmerge.backends.cuda import CudaKernels, why_not

        if isinstance(device, Gpu):
            if reason := why_not():
                return reason
            from fastmerge import _cuda  # type: ignore[attr-defined]

            native: Any = _cuda
        elif emulated:
            native = load_emulated(emulated)
        else:
            return "a rehearsal needs --emulated PATH for it"
        kernels: Kernels = CudaKernels(str(device.where), MeteredModule(native, meter))
    else:
        from fastmerge.backends import triton

        interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
        if not interpreted and not isinstance(device, Gpu):
            return "a rehearsal needs TRITON_INTERPRET=1 for it"
        if reason := triton.why_not():
            return reason
        kernels = triton.TritonKernels(str(device.where))  # type: ignore[abstract]
        if isinstance(device, Gpu):
            meter_triton(meter)
    return Subject(kernels, device, meter, name)
