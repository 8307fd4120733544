"""The way of a merge's bytes, from files to kernels and back, by way of a device or not.

Where the rings, threads and streams of this package come together; `Engine` sees a reader and a writer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fastmerge.streaming.device import Device, Event, Memory, Stream
from fastmerge.streaming.download import Downloader
from fastmerge.streaming.gpudirect import GpuDirectIntake
from fastmerge.streaming.gpudirect import why_not as why_not_gds
from fastmerge.streaming.ring import FEEDING_THREADS, HostRing, Reader, Transfers, Writer
from fastmerge.streaming.sources import Io, Sources, is_warm
from fastmerge.streaming.trace import Trace
from fastmerge.streaming.upload import DeviceIntake, Uploader

#: Called with whether it writes; makes what moves bytes between files and memory.
Disks = Callable[[bool], Transfers]


@dataclass
class Route:
    """Both ends of the way, and what must be undone when they are closed."""

    reader: Reader | DeviceIntake
    writer: Writer | Downloader
    device: Device | None = None
    pinned: list[int] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def close(self) -> None:
        self.writer.close()
        self.reader.close()
        _unpin(self.device, self.pinned)


def host_route(
    sources: Sources, operands: int, results: int, *, disks: Disks | None, trace: Trace
) -> Route:
    """Open the way to kernels on the host. operands, results: bytes of the rings."""
    reads, writes = (disks(w) for w in (False, True)) if disks else (None, None)
    return Route(
        Reader(sources, operands, transfers=reads, trace=trace),
        Writer(results, transfers=writes, trace=trace),
    )


@dataclass(frozen=True)
class Sizes:
    """Bytes of the rings of a device's route. take: takes the device's memory, for operands and results."""

    pinned_in: int
    pinned_out: int
    block: int
    take: Callable[[], tuple[Memory, Memory]]


def device_route(
    sources: Sources,
    device: Device,
    sizes: Sizes,
    *,
    io: Io,
    disks: Disks | None,
    trace: Trace,
) -> Route:
    """Open the way to kernels on a device.

    Raises:
        DeviceError, DeviceMemoryError: the device cannot be used, or has not enough memory.
        BackendError: `io` is gds, which does not work here.
    """
    reads, writes = (disks(w) for w in (False, True)) if disks else (None, None)
    writer = Writer(sizes.pinned_out, transfers=writes, trace=trace)
    reader = None
    if not _reads_straight(sources, device, io):
        reader = _feeding(sources, device, sizes.pinned_in, reads, trace)
    pinned: list[int] = []
    warnings: list[str] = []
    try:
        for ring in [*([reader.ring] if reader else []), writer.ring]:
            _pin(device, ring, pinned, warnings)
        operands, results = sizes.take()
        intake: DeviceIntake
        if reader is None:
            intake = GpuDirectIntake(sources, device, operands)
        else:
            intake = Uploader(reader, device, operands, sizes.block)
    except BaseException:
        writer.close()
        if reader:
            reader.close()
        _unpin(device, pinned)
        raise
    return Route(intake, Downloader(writer, device, results, sizes.block), device, pinned, warnings)


def _reads_straight(sources: Sources, device: Device, io: Io) -> bool:
    """Return whether operands go past the host's memory: if that is asked for, or works and pays."""
    if io is Io.GDS:
        return True
    if io is not Io.AUTO or why_not_gds(device) is not None:
        return False
    return not any(map(is_warm, sources.files))  # a page cache is faster than a drive


def _feeding(
    sources: Sources, device: Device, capacity: int, reads: Transfers | None, trace: Trace
) -> Reader:
    """Return what reads into pinned memory, which is used again when it is copied out of."""

    def copied() -> Event:
        return device.mark(Stream.COPY_IN)

    return Reader(
        sources, capacity, n_threads=FEEDING_THREADS, transfers=reads, fence=copied, trace=trace
    )


def _pin(device: Device, ring: HostRing, pinned: list[int], warnings: list[str]) -> None:
    if device.pin(ring.address, ring.capacity):
        pinned.append(ring.address)
        return
    warnings.append(
        f"{ring.capacity >> 20} MiB of host memory could not be locked; copies to {device.name} are "
        "slower (raise the limit: ulimit -l, or lower --max-pinned)"
    )


def _unpin(device: Device | None, pinned: list[int]) -> None:
    for address in pinned:
        assert device is not None
        device.unpin(address)
