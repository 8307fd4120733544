"""Operands straight from the drive into a GPU's memory, past the host's: GPUDirect Storage, through kvikio.

Optional (the extra `gds`). kvikio reads in threads of its own, not in a stream: what a region held must be
done with before a read into it is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fastmerge.errors import BackendError, ReadError
from fastmerge.streaming.device import Device, Event, Memory, Stream
from fastmerge.streaming.ring import READ_AHEAD, Run
from fastmerge.streaming.sources import Sources, truncated
from fastmerge.streaming.upload import DeviceIntake, Filled, Stopped, placed

T = TypeVar("T")

#: Requests in flight, of kvikio's 4 MiB each; its default of one is a tenth of what a drive gives.
THREADS = 16


def why_not(device: Device) -> str | None:
    """Return why operands cannot be read straight into a device's memory, or None."""
    if not device.name.startswith("cuda"):
        return f"{device.name} is not an NVIDIA GPU"
    if importlib.util.find_spec("kvikio") is None:
        return "kvikio is not installed: pip install 'fastmerge[gds]'"
    try:
        driver = importlib.import_module("kvikio.cufile_driver")
        available = bool(driver.get("is_gds_available"))
    except Exception as error:  # a library of the system's that is missing, or another version
        return f"kvikio does not load ({error})"
    return (
        None
        if available
        else "no GPUDirect Storage here (the nvidia-fs module, a file system it knows)"
    )


class GpuDirectIntake(DeviceIntake):
    """Items by kvikio's reads. Raises BackendError where `why_not` says why."""

    def __init__(self, sources: Sources, device: Device, memory: Memory) -> None:
        super().__init__(sources, device, memory)
        reason = why_not(device)
        if reason is not None:
            raise BackendError(f"io gds cannot be used: {reason}; choose auto, direct or buffered")
        self._kvikio: Any = importlib.import_module("kvikio")
        importlib.import_module("kvikio.defaults").set("num_threads", THREADS)
        self._files: dict[Path, Any] = {}

    @property
    def n_threads(self) -> int:
        return THREADS

    @property
    def busy_seconds(self) -> float:
        return 0.0  # kvikio keeps no account of it

    def _fill(self, loads: Iterable[tuple[T, Sequence[Run]]], filled: Filled[T]) -> None:
        reading: deque[tuple[T, Sequence[Run], list[int], list[Any]]] = deque()

        def deliver() -> None:
            item, runs, addresses, futures = reading.popleft()
            for run, future in zip(runs, futures, strict=True):
                self._finish(run, future)
            filled.put((item, addresses, self._device.mark(Stream.COPY_IN)))

        for item, runs in loads:
            offsets, size = placed(runs)
            # What is read must get to the kernels before room is waited for: they make it.
            while reading and (len(reading) > READ_AHEAD or not self.ring.has_room(size)):
                deliver()
            if self._stop:
                raise Stopped
            at = self._take(size)
            futures = [self._read(run, at + o) for run, o in zip(runs, offsets, strict=True)]
            addresses = [self.memory.address + at + offset for offset in offsets]
            reading.append((item, runs, addresses, futures))
        while reading:
            deliver()

    def _read(self, run: Run, offset: int) -> Any:
        """Ask for a run; returns what waits for it and gives the bytes read."""
        path, first, n = run
        source = self.sources.source(path)
        if first + n > source.size:
            raise truncated(source, source.size)
        if path not in self._files:
            self._files[path] = self._kvikio.CuFile(str(path), "r")
        if not n:
            return None
        return self._files[path].pread(self.memory.owner[offset : offset + n], n, first)

    def _finish(self, run: Run, future: Any) -> None:
        path, first, n = run
        if future is None:
            return
        try:
            got = future.get()
        except RuntimeError as error:
            line = str(error).strip().splitlines()[0]
            raise ReadError(f"{path}: reading at byte {first} failed: {line}") from None
        if got < n:
            raise truncated(self.sources.source(path), first + got)

    def _reuse(self, event: Event) -> None:
        event.wait()

    def close(self) -> None:
        super().close()
        for file in self._files.values():
            file.close()
        self.sources.close()
