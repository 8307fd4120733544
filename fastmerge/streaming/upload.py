"""Operands on their way to a device: from the reader's ring into a ring of device memory.

A thread of its own waits for reads and queues copies; the thread that merges gets an item when its copies are
queued, and lets the compute stream, not itself, wait for them. So the copying stream always has the next
blocks before it, however long a statistic keeps the host.
"""

from __future__ import annotations

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

from fastmerge.streaming.device import Device, Event, Memory, Stream
from fastmerge.streaming.ring import ALIGNMENT, Reader, Ring, Run
from fastmerge.streaming.sources import Sources

T = TypeVar("T")


def device_room(n: int) -> int:
    """Return the bytes of a device's ring that a run takes."""
    return -(-n // ALIGNMENT) * ALIGNMENT


@dataclass
class _Block(Generic[T]):
    """Part of an item: runs that are read and copied together, each with its offset in the item's region."""

    item: T
    size: int  # of the item's region
    offsets: list[int]
    lengths: list[int]
    item_offsets: list[int] | None = None  # of all of the item's runs, with its last block
    is_first: bool = False


class Stopped(Exception):
    """The merging thread wants no more."""


#: (item, address of each of its runs, when they are there) in order; an error; None at the end.
Filled: TypeAlias = "queue.SimpleQueue[tuple[T, list[int], Event] | BaseException | None]"


def placed(runs: Sequence[Run]) -> tuple[list[int], int]:
    """Return the offset of each run of an item in its region, and the region's size."""
    offsets, size = [], 0
    for _, _, n in runs:
        offsets.append(size)
        size += device_room(n)
    return offsets, size


class DeviceIntake(ABC):
    """Brings items into a ring of a device's memory, by a thread of its own; subclasses say how.

    memory: of the device, for the ring.
    """

    def __init__(self, sources: Sources, device: Device, memory: Memory) -> None:
        self.sources = sources
        self._device = device
        self.memory = memory
        self.waited = 0.0  # seconds that the merging thread had nothing queued for it
        self.ring = Ring(memory.n_bytes, ALIGNMENT)
        self._changed = threading.Condition()
        self._freed: deque[Event] = deque()  # of the oldest regions, given back when they have come
        self._stop = False
        self._thread: threading.Thread | None = None

    @property
    @abstractmethod
    def n_threads(self) -> int:
        """How many threads read."""

    @property
    @abstractmethod
    def busy_seconds(self) -> float:
        """Seconds that they spent reading, all added up."""

    def resize(self, capacity: int) -> None:  # noqa: B027 (all of them do nothing)
        """Keep the memory: what a device has is taken once."""

    def sweep(self, loads: Iterable[tuple[T, Sequence[Run]]]) -> Iterator[tuple[T, list[int]]]:
        """Yield (item, device address of each of its runs), in the order of the compute stream; see
        `Reader.sweep`. `loads` is consumed by another thread.
        """
        filled: Filled[T] = queue.SimpleQueue()
        self._stop = False
        self._thread = threading.Thread(target=self._run, args=(loads, filled), name="upload")
        self._thread.start()
        try:
            while True:
                start = time.perf_counter()
                got = filled.get()
                self.waited += time.perf_counter() - start
                if got is None:
                    break
                if isinstance(got, BaseException):
                    raise got
                item, addresses, event = got
                self._device.follow(Stream.COMPUTE, event)
                yield item, addresses
                freed = self._device.mark(Stream.COMPUTE)
                with self._changed:
                    self._freed.append(freed)
                    self._changed.notify()
        finally:
            self._halt()

    def _halt(self) -> None:
        """End the thread: the reads that are under way, and no more."""
        with self._changed:
            self._stop = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    # ---- in the thread that brings them -----------------------------------------------------------

    def _run(self, loads: Iterable[tuple[T, Sequence[Run]]], filled: Filled[T]) -> None:
        try:
            self._fill(loads, filled)
            filled.put(None)
        except Stopped:
            pass
        except BaseException as error:  # the merging thread raises it
            filled.put(error)

    @abstractmethod
    def _fill(self, loads: Iterable[tuple[T, Sequence[Run]]], filled: Filled[T]) -> None:
        """Bring all items and put them, in order."""

    def _take(self, size: int) -> int:
        """Return the offset of a region; what fills it waits for the kernels that still read it."""
        while (at := self.ring.take(size)) is None:
            with self._changed:
                while not self._freed and not self._stop:
                    self._changed.wait()
                if self._stop:
                    raise Stopped
                event = self._freed.popleft()
            self._reuse(event)
            self.ring.give_back()
        return at

    @abstractmethod
    def _reuse(self, event: Event) -> None:
        """Let nothing be written to a region before its event."""

    def close(self) -> None:
        self._halt()  # an error's traceback may hold the sweep open
        self._device.close()
        self._device.release(self.memory)


class Uploader(DeviceIntake):
    """By way of pinned host memory: reads, then copies over the link.

    reader: reads into pinned memory; its fence must be this device's copy-in stream.
    block:  bytes that are read and copied at a time, about.
    """

    def __init__(self, reader: Reader, device: Device, memory: Memory, block: int) -> None:
        super().__init__(reader.sources, device, memory)
        self._reader, self._block = reader, block

    @property
    def n_threads(self) -> int:
        return self._reader.n_threads

    @property
    def busy_seconds(self) -> float:
        return self._reader.busy_seconds

    def close(self) -> None:
        super().close()
        self._reader.close()

    def _fill(self, loads: Iterable[tuple[T, Sequence[Run]]], filled: Filled[T]) -> None:
        at = 0
        for block, sources in self._reader.sweep(self._blocks(loads)):
            if block.is_first:
                at = self.memory.address + self._take(block.size)
            for target, source, n in _joined(block, at, sources):
                self._device.copy(Stream.COPY_IN, target, source, n)
            if block.item_offsets is not None:
                addresses = [at + offset for offset in block.item_offsets]
                filled.put((block.item, addresses, self._device.mark(Stream.COPY_IN)))
            if self._stop:
                raise Stopped

    def _reuse(self, event: Event) -> None:
        self._device.follow(Stream.COPY_IN, event)  # the host goes on

    def _blocks(
        self, loads: Iterable[tuple[T, Sequence[Run]]]
    ) -> Iterator[tuple[_Block[T], list[Run]]]:
        """Cut items into blocks, large runs where a direct read may end."""
        for item, runs in loads:
            block: _Block[T] = _Block(item, 0, [], [], is_first=True)
            parts: list[Run] = []
            starts, size = placed(runs)
            block.size, held = size, 0
            for (file, first, n), start in zip(runs, starts, strict=True):
                for done, step in _steps(first, n, self._block):
                    if held + step > self._block:
                        yield block, parts
                        block, parts, held = _Block(item, 0, [], []), [], 0
                    parts.append((file, first + done, step))
                    block.offsets.append(start + done)
                    block.lengths.append(step)
                    held += step
            block.item_offsets = starts
            yield block, parts


def _steps(first: int, n: int, block: int) -> Iterator[tuple[int, int]]:
    """Cut n bytes at offset `first` of a file at multiples of `block`: (bytes before, bytes) of each part."""
    done = 0
    while True:
        step = min(n - done, block - (first + done) % block)
        yield done, step
        done += step
        if done >= n:
            return


def _joined(block: _Block[T], at: int, sources: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (target, source, bytes) of the copies of a block: neighbours on both sides take one copy."""
    target = source = n = 0
    for offset, address, length in zip(block.offsets, sources, block.lengths, strict=True):
        moved = at + offset - target
        if n and moved == address - source and 0 <= moved - n < ALIGNMENT:
            n = moved + length
            continue
        if n:
            yield target, source, n
        target, source, n = at + offset, address, length
    if n:
        yield target, source, n


__all__ = ["DeviceIntake", "Uploader", "device_room"]
