"""A device beside the host: its memory and its three streams, in which copies and kernels overlap.

`Device` is what the pipeline asks of one; `TorchDevice` is a GPU that torch drives (NVIDIA's or AMD's),
`HostDevice` stands in for one whose kernels run on host memory (an interpreter, an emulator): what it is
asked for is done before the call returns. csrc/simulate has one that keeps time without a GPU.
"""

from __future__ import annotations

import ctypes
import enum
import importlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from fastmerge.backends import Buffer
from fastmerge.dtypes import DType
from fastmerge.errors import DeviceError, DeviceMemoryError
from fastmerge.streaming.trace import Span

if TYPE_CHECKING:
    import torch


class Stream(enum.IntEnum):
    """What runs in order of submission; different streams overlap."""

    COPY_IN = 0
    COMPUTE = 1
    COPY_OUT = 2


LANES = {Stream.COPY_IN: "copy in", Stream.COMPUTE: "compute", Stream.COPY_OUT: "copy out"}


class Event(Protocol):
    """A place in a stream."""

    def wait(self) -> None:
        """Block this thread until everything before it has run. Raises DeviceError if something failed."""
        ...

    def is_done(self) -> bool:
        """Whether `wait` would return at once."""
        ...


@dataclass(frozen=True)
class Memory:
    """A run of bytes on a device (or, device "cpu", the host). owner keeps it alive; see `Buffer`."""

    address: int
    n_bytes: int
    device: str = "cpu"
    owner: Any = field(default=None, repr=False, compare=False)

    def buffer(self, address: int, dtype: DType, n: int) -> Buffer:
        """Return n elements at an address in this memory."""
        return Buffer(address, dtype, n, self.owner, self.device)


class Device(Protocol):
    """One device. Addresses are integers; several threads may call it at once."""

    #: As `ops.choose` takes it.
    name: str

    def free_bytes(self) -> int:
        """Return the device memory that can be had now."""
        ...

    def allocate(self, n_bytes: int) -> Memory:
        """Take device memory, aligned to 512 bytes. Raises DeviceMemoryError if there is not enough."""
        ...

    def release(self, memory: Memory) -> None:
        """Give back what `allocate` took; nothing queued may use it."""
        ...

    def pin(self, address: int, n_bytes: int) -> bool:
        """Lock pages of host memory, so that copies need no host; False: it cannot be done."""
        ...

    def unpin(self, address: int) -> None: ...

    def copy(self, stream: Stream, target: int, source: int, n: int) -> None:
        """Queue a copy of n bytes, in or out by the stream. Raises DeviceError."""
        ...

    def mark(self, stream: Stream) -> Event:
        """Return the place behind what is queued now."""
        ...

    def follow(self, stream: Stream, event: Event) -> None:
        """What is queued in `stream` from now on waits for `event`; the host does not."""
        ...

    def computing(self) -> AbstractContextManager[None]:
        """Kernels that this thread launches inside go to the compute stream."""
        ...

    def spans(self) -> list[Span]:
        """Return what the streams did and when, where that is recorded."""
        ...

    def close(self) -> None:
        """Wait for what is queued, whatever became of it."""
        ...


class _Done:
    def wait(self) -> None:
        pass

    def is_done(self) -> bool:
        return True


class HostDevice:
    """A device whose memory is the host's and whose kernels run in the thread that asks for them."""

    name = "cpu"

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._lock = threading.Lock()

    def free_bytes(self) -> int:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4

    def allocate(self, n_bytes: int) -> Memory:
        from fastmerge import _cpu

        arena = _cpu.Arena(n_bytes)
        return Memory(arena.address, n_bytes, owner=arena)

    def release(self, memory: Memory) -> None:
        pass

    def pin(self, address: int, n_bytes: int) -> bool:
        return True

    def unpin(self, address: int) -> None:
        pass

    def copy(self, stream: Stream, target: int, source: int, n: int) -> None:
        start = time.perf_counter()
        ctypes.memmove(target, source, n)
        with self._lock:
            self._spans.append(Span(LANES[stream], "copy", start, time.perf_counter(), n))

    def mark(self, stream: Stream) -> Event:
        return _Done()

    def follow(self, stream: Stream, event: Event) -> None:
        event.wait()

    def computing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def spans(self) -> list[Span]:
        return self._spans

    def close(self) -> None:
        pass


class _TorchEvent:
    def __init__(self, device: TorchDevice, event: Any) -> None:
        self._device, self.event = device, event

    def wait(self) -> None:
        with self._device.reporting("waiting for the device"):
            self.event.synchronize()

    def is_done(self) -> bool:
        with self._device.reporting("asking the device"):
            return bool(self.event.query())


class TorchDevice:
    """A GPU through torch: "cuda:0" and the like, which is torch's word for AMD's as well.

    timed: record when each copy ran, for `spans`.
    """

    def __init__(self, name: str, timed: bool = False) -> None:
        torch: Any = importlib.import_module("torch")  # its device functions are not typed
        self._torch = torch
        n = torch.cuda.device_count()
        if not n:
            raise DeviceError(f"{name} cannot be used: torch finds no GPU; merge with --device cpu")
        index = torch.device(name).index or 0
        if index >= n:
            known = "cuda:0 only" if n == 1 else f"cuda:0 to cuda:{n - 1}"
            raise DeviceError(f"{name} does not exist; this machine has {known}")
        self._device = torch.device("cuda", index)
        self.name = f"cuda:{index}"
        with torch.cuda.device(self._device):
            self._streams = [torch.cuda.Stream(self._device) for _ in Stream]
            self._timed = timed
            self._pairs: list[tuple[Stream, Any, Any, int]] = []
            if timed:
                self._origin = torch.cuda.Event(enable_timing=True)
                self._origin.record(self._streams[Stream.COPY_IN])
                self._origin.synchronize()
                self._origin_seconds = time.perf_counter()
        self._host: dict[int, torch.Tensor] = {}  # pinned runs, by address
        self._held: dict[int, torch.Tensor] = {}  # allocated ones

    @contextmanager
    def reporting(self, what: str) -> Iterator[None]:
        """Turn what torch raises for the device into errors that say where it was."""
        try:
            yield
        except self._torch.cuda.OutOfMemoryError:
            raise DeviceMemoryError(
                f"{what}: {self.name} ran out of memory; give a smaller --max-vram"
            ) from None
        except RuntimeError as error:
            if not any(word in str(error) for word in ("CUDA", "HIP", "cuda", "hip")):
                raise
            raise DeviceError(f"{what} failed on {self.name}: {_line(error)}") from None

    def free_bytes(self) -> int:
        return int(self._torch.cuda.mem_get_info(self._device)[0])

    def allocate(self, n_bytes: int) -> Memory:
        torch = self._torch
        with self.reporting(f"taking {n_bytes >> 20} MiB"):
            held = torch.empty(max(n_bytes, 1), dtype=torch.uint8, device=self._device)
        self._held[held.data_ptr()] = held
        return Memory(held.data_ptr(), n_bytes, self.name, held)

    def release(self, memory: Memory) -> None:
        self._held.pop(memory.address, None)

    def pin(self, address: int, n_bytes: int) -> bool:
        memory = (ctypes.c_uint8 * n_bytes).from_address(address)
        tensor = self._torch.frombuffer(memory, dtype=self._torch.uint8)
        self._host[address] = tensor
        with self._torch.cuda.device(self._device):
            status = self._torch.cuda.cudart().cudaHostRegister(address, n_bytes, 0)
        return int(status) == 0

    def unpin(self, address: int) -> None:
        self._host.pop(address, None)
        self._torch.cuda.cudart().cudaHostUnregister(address)

    def copy(self, stream: Stream, target: int, source: int, n: int) -> None:
        with self.reporting(f"the {LANES[stream].replace(' ', '-')} stream"):
            queue = self._streams[stream]
            begin = self._time(queue) if self._timed else None
            with self._torch.cuda.stream(queue):
                self._at(target, n).copy_(self._at(source, n), non_blocking=True)
            if begin is not None:
                self._pairs.append((stream, begin, self._time(queue), n))

    def _at(self, address: int, n: int) -> torch.Tensor:
        """Return n bytes at an address as a tensor: of a run that was allocated or pinned."""
        for runs in (self._held, self._host):
            for first, run in runs.items():
                if first <= address and address + n <= first + run.numel():
                    part: torch.Tensor = run[address - first : address - first + n]
                    return part
        raise DeviceError(f"address {address:#x} is neither pinned nor on {self.name}")

    def _time(self, queue: Any) -> Any:
        event = self._torch.cuda.Event(enable_timing=True)
        event.record(queue)
        return event

    def mark(self, stream: Stream) -> Event:
        # Blocking: a thread that waits leaves the processor to those that read and write.
        event = self._torch.cuda.Event(blocking=True)
        with self.reporting("recording an event"):
            event.record(self._streams[stream])
        return _TorchEvent(self, event)

    def follow(self, stream: Stream, event: Event) -> None:
        assert isinstance(event, _TorchEvent)
        with self.reporting("ordering streams"):
            self._streams[stream].wait_event(event.event)

    @contextmanager
    def computing(self) -> Iterator[None]:
        queue = self._streams[Stream.COMPUTE]
        with self.reporting("a kernel"), self._torch.cuda.device(self._device):
            begin = self._time(queue) if self._timed else None
            with self._torch.cuda.stream(queue):
                yield
            if begin is not None:
                self._pairs.append((Stream.COMPUTE, begin, self._time(queue), 0))

    def spans(self) -> list[Span]:
        spans = []
        for stream, begin, end, n in self._pairs:
            start = self._origin_seconds + self._origin.elapsed_time(begin) / 1e3
            spans.append(
                Span(LANES[stream], LANES[stream], start, start + begin.elapsed_time(end) / 1e3, n)
            )
        return spans

    def close(self) -> None:
        for queue in self._streams:
            try:
                queue.synchronize()
            except RuntimeError:  # reported where it was met
                return


def _line(error: BaseException) -> str:
    """Return the first line of a message: CUDA's go on with advice for its developers."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


__all__ = ["Device", "Event", "HostDevice", "Memory", "Stream", "TorchDevice"]
