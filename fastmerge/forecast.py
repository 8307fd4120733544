"""How long a planned merge on a device takes: the bytes of each stage over the rate it moves them at.

All stages overlap, so the slowest one decides; what it waits for at the start is the first item's way.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastmerge.budget import device_passes
from fastmerge.cards import REACHED, Card
from fastmerge.jobs import MIB, work_items
from fastmerge.planner import Plan
from fastmerge.streaming.device import Device, Stream
from fastmerge.streaming.ring import FEEDING_THREADS, HostRing, Reader, Run
from fastmerge.streaming.sources import Io, Sources

#: What the host spends on a launch of a walk or a statistic, lowering included: taken to be, not measured.
LAUNCH_SECONDS = 250e-6

_MEASURED_BYTES = 512 * MIB


@dataclass(frozen=True)
class Rates:
    """Bytes per second. origin: where they are from, for whoever reads the forecast; one_disk: reads and
    writes share the rate of reading."""

    read: float
    write: float
    copy_in: float
    copy_out: float
    memory: float
    origin: dict[str, str]
    one_disk: bool = False

    def shared_by(self, n_devices: int) -> Rates:
        """Return the rates of several such devices, each with a link of its own, on the same disks."""
        if n_devices == 1:
            return self
        said = {k: f"{n_devices} times: {self.origin[k]}" for k in ("link", "memory")}
        copy_in, copy_out, memory = (
            n_devices * rate for rate in (self.copy_in, self.copy_out, self.memory)
        )
        return replace(
            self,
            copy_in=copy_in,
            copy_out=copy_out,
            memory=memory,
            origin={**self.origin, **said},
        )


@dataclass(frozen=True)
class StageTime:
    """One stage of the pipeline: bytes that pass it, at which rate, in how many seconds."""

    name: str
    n_bytes: int
    rate: float
    seconds: float
    origin: str


@dataclass(frozen=True)
class Forecast:
    """Seconds of a merge by stage; `limit` is the slowest one's name."""

    stages: list[StageTime]
    fill: float

    @property
    def limit(self) -> StageTime:
        return max(self.stages, key=lambda s: s.seconds)

    @property
    def seconds(self) -> float:
        return self.limit.seconds + self.fill

    def as_dict(self) -> dict[str, Any]:
        """Return the forecast as JSON-able data."""
        stages = [{**vars(s), "rate": round(s.rate)} for s in self.stages]
        return {"seconds": self.seconds, "limit": self.limit.name, "stages": stages}


def forecast(plan: Plan, rates: Rates) -> Forecast:
    """Return the time of each stage of a plan for a device."""
    assert plan.device is not None
    read, written = plan.bytes_read, plan.bytes_written
    touched = sum(device_passes(plan, job) * job.bytes_in + job.bytes_out for job in plan.jobs)
    items = list(work_items(plan.jobs, plan.streamed, plan.item_bytes))
    parts = sum(max(1, -(-i.device_memory // plan.item_bytes)) for i in items)
    launches = 2 * parts
    origin = rates.origin
    stages = [
        StageTime("read", read, rates.read, read / rates.read, origin["read"]),
        StageTime("copy in", read, rates.copy_in, read / rates.copy_in, origin["link"]),
        StageTime(
            "kernels",
            touched,
            rates.memory,
            touched / rates.memory + launches * LAUNCH_SECONDS,
            origin["memory"],
        ),
        StageTime("copy out", written, rates.copy_out, written / rates.copy_out, origin["link"]),
        StageTime("write", written, rates.write, written / rates.write, origin["write"]),
    ]
    if rates.one_disk:
        both = read + written
        shared = StageTime("disk", both, rates.read, both / rates.read, origin["read"])
        stages = [shared, *stages[1:-1]]
    first = min(items[0].device_memory if items else 0, read)
    return Forecast(stages, plan.device.block / rates.read + first / rates.copy_in)


def card_rates(card: Card, read: tuple[float, str], write: tuple[float, str]) -> Rates:
    """Return the rates of a known card; those of the disks are (bytes/s, origin)."""
    origin = {
        "read": read[1],
        "write": write[1],
        "link": f"{card.link_title}, pinned",
        "memory": f"{REACHED:.0%} of {card.title}'s {card.bandwidth / 1e12:.2f} TB/s",
    }
    return Rates(read[0], write[0], card.link, card.link, card.bandwidth * REACHED, origin)


def measured_rates(
    device: Device, read: tuple[float, str], write: tuple[float, str], n: int = 256 * MIB
) -> Rates:
    """Return the rates of a device at hand: its link's by copies of n bytes, its memory's by one within."""
    copy_in, copy_out, memory = copy_rates(device, n)
    here = f"measured on {device.name}"
    origin = {"read": read[1], "write": write[1], "link": f"{here}, pinned", "memory": here}
    return Rates(read[0], write[0], copy_in, copy_out, memory, origin)


def copy_rates(device: Device, n: int) -> tuple[float, float, float]:
    """Measure copies of n bytes: bytes/s to a device, from it, and moved within it (read and written)."""
    ring, memory = HostRing(n), device.allocate(2 * n)
    device.pin(ring.address, n)
    here, there, beside = ring.address, memory.address, memory.address + n

    def rate(stream: Stream, target: int, source: int) -> float:
        seconds = []
        for _ in range(4):  # the first one also touches pages
            start = time.perf_counter()
            device.copy(stream, target, source, n)
            device.mark(stream).wait()
            seconds.append(time.perf_counter() - start)
        return n / min(seconds[1:])

    try:
        return (
            rate(Stream.COPY_IN, there, here),
            rate(Stream.COPY_OUT, here, there),
            2 * rate(Stream.COMPUTE, beside, there),
        )
    finally:
        device.unpin(ring.address)


def read_rate(plan: Plan, io: Io = Io.AUTO) -> float:
    """Measure how fast the inputs are read into memory, over their first half a gigabyte: bytes/s."""
    files = sorted({o.info.file for j in plan.jobs for o in j.operands})
    if not files:
        return float("inf")
    reader = Reader(Sources(files, io, may_map=False), 96 * MIB, n_threads=FEEDING_THREADS)
    start, n_bytes = time.perf_counter(), 0
    try:
        for n, _ in reader.sweep(_samples(files)):
            n_bytes += n
    finally:
        reader.close()
    return n_bytes / (time.perf_counter() - start)


def _samples(files: list[Path]) -> Iterator[tuple[int, list[Run]]]:
    """Yield loads of 16 MiB, each file's first ones, half a gigabyte in all."""
    load, each = 16 * MIB, max(16 * MIB, _MEASURED_BYTES // len(files))
    left = _MEASURED_BYTES
    for file in files:
        size = min(each, os.path.getsize(file), left)
        left -= size
        for at in range(0, size, load):
            n = min(load, size - at)
            yield n, [(file, at, n)]


def decomposition_rate(side: int = 1024) -> float:
    """Time one decomposition here: operations per second, counted as methods count them."""
    import torch

    from fastmerge.linalg import spectrum

    matrix = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    spectrum(matrix[:64]).top()
    start = time.perf_counter()
    spectrum(matrix).top()
    return 14.0 * side**3 / (time.perf_counter() - start)
