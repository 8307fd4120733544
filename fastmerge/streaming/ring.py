"""Bounded memory between the disk and the kernels: reads ahead of them, writes behind them.

Two rings of bytes, one for operands and one for results, hand out regions and take them back in order.
Threads of csrc/io fill the next operands and write the last results while the kernels work; a full ring makes
one side wait for the other. Nothing else in the host's memory holds tensor bytes.
"""

from __future__ import annotations

import errno
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from fastmerge import _cpu
from fastmerge.errors import CheckpointError, ReadError
from fastmerge.streaming.device import Event, Memory
from fastmerge.streaming.sources import Source, Sources, truncated
from fastmerge.streaming.trace import Lane, Trace

T = TypeVar("T")

#: (descriptor, descriptor past the page cache or -1, offset in the file, bytes, address)
Segment = tuple[int, int, int, int, int]

#: A run of bytes of an input file: (file, offset, bytes).
Run = tuple[Path, int, int]

#: Called with the checksum of a result, or of part of one, when it is written, and which part: (first byte in
#: the tensor, bytes, checksum).
Written = Callable[[int, int, int], None]

#: Raises what speaks against writing a result.
Check = Callable[[], None]

#: Reads that wait in memory at most, beside the one in work: more only spends memory.
READ_AHEAD = 4

#: Requests in flight. Pages of mapped files cost the processor, requests to the disk need company.
MAPPING_THREADS, READING_THREADS, WRITING_THREADS = 1, 8, 2

#: Requests in flight to feed a device: a thread copies some 5 GB/s out of the page cache, a link takes 50.
FEEDING_THREADS = max(READING_THREADS, min(32, os.cpu_count() or 1))

ALIGNMENT = 512  # of operands: what a warp loads at once; alike in host and device memory
BLOCK = 4096  # of the disk: what bypasses the page cache agrees with its place modulo this
DIRECT_LEAST = 64 << 10  # bytes; smaller runs go through the page cache: csrc/io/transfer.hpp
_MAPPED = -1  # csrc/io/transfer.hpp


def room(n: int) -> int:
    """Return the ring bytes that a run may take: a large one is moved to agree with its place in the file."""
    return n + ALIGNMENT + (BLOCK if n >= DIRECT_LEAST else 0)


class Ring:
    """Places in `capacity` bytes: regions are taken behind the newest and given back from the oldest."""

    def __init__(self, capacity: int, unit: int = BLOCK) -> None:
        self.capacity, self._unit = capacity, unit
        self._held: deque[tuple[int, int]] = deque()  # offset, size
        self._head = 0

    def take(self, size: int) -> int | None:
        """Return the offset of `size` bytes, a multiple of `unit`; None while there is no room."""
        size = self._rounded(size)
        if size > self.capacity:
            raise MemoryError(f"{size} bytes do not fit a ring of {self.capacity}")
        at = self._place(size)
        if at is not None:
            self._held.append((at, size))
            self._head = at + size
        return at

    def has_room(self, size: int) -> bool:
        """Return whether `take` would find room."""
        return self._place(self._rounded(size)) is not None

    def _rounded(self, size: int) -> int:
        return -(-max(size, 1) // self._unit) * self._unit

    def give_back(self) -> None:
        """Give the oldest region back."""
        self._held.popleft()

    def _place(self, size: int) -> int | None:
        if not self._held:
            return 0
        tail, head = self._held[0][0], self._head
        if head > tail:  # free: behind the newest, or before the oldest
            if head + size <= self.capacity:
                return head
            return 0 if size <= tail else None
        return head if head + size <= tail else None


class HostRing(Ring):
    """A ring with host memory behind it."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._arena = _cpu.Arena(capacity)
        self.address: int = self._arena.address


@dataclass
class Region:
    """The operands of one work item: the address of each of its runs."""

    addresses: list[int]
    runs: list[tuple[Source, int, int]]
    ticket: int
    started: float


class Transfers(Protocol):
    """Threads that move segments between files and memory: `_cpu.Transfers`, or a simulated disk."""

    def submit(
        self, segments: Sequence[Segment], words: Sequence[tuple[int, int]] = ...
    ) -> int: ...
    def wait(self, ticket: int) -> tuple[tuple[int, int, int] | None, list[int]]: ...
    def is_done(self, ticket: int) -> bool: ...
    @property
    def busy_seconds(self) -> float: ...
    def close(self) -> None: ...


class Reader:
    """Reads work items ahead of the one that is being merged.

    fence: called when the caller is done with an item, as far as it goes: the item's memory is read into anew
    when the event that it returns has come. Default: at once.
    """

    def __init__(
        self,
        sources: Sources,
        capacity: int,
        *,
        n_threads: int | None = None,
        transfers: Transfers | None = None,
        fence: Callable[[], Event] | None = None,
        trace: Trace | None = None,
    ) -> None:
        self.sources = sources
        self.memory = Memory(0, 0)  # operands lie all over the host's memory
        self.waited = 0.0  # seconds
        self.ring = HostRing(capacity)
        self.n_threads = n_threads or (MAPPING_THREADS if sources.mapped else READING_THREADS)
        self._fence = fence
        self._lane = Lane(trace, "read")
        self._used: deque[Event] = (
            deque()
        )  # of the oldest regions, whose bytes are still being copied
        self._transfers = transfers or _cpu.Transfers(False, self.n_threads)

    def resize(self, capacity: int) -> None:
        """Give the memory back and take `capacity` bytes anew; between sweeps."""
        self.ring = HostRing(capacity)

    def sweep(self, loads: Iterable[tuple[T, Sequence[Run]]]) -> Iterator[tuple[T, list[int]]]:
        """Yield (item, address of each of its runs) in order, the bytes in memory.

        While the caller works on an item, later ones are read. Its memory is taken back when the caller asks
        for the next one.
        """
        upcoming = iter(loads)
        waiting: deque[tuple[T, Region]] = deque()
        following = next(upcoming, None)
        while following is not None or waiting:
            while following is not None and len(waiting) <= READ_AHEAD:
                region = self._begin(following[1], patient=not waiting)
                if region is None:
                    break
                waiting.append((following[0], region))
                following = next(upcoming, None)
            item, region = waiting.popleft()
            start = time.perf_counter()
            error = self._transfers.wait(region.ticket)[0]
            self.waited += time.perf_counter() - start
            self._lane.moved(region.started, sum(n for _, _, n in region.runs))
            if error is not None:
                raise self._error(error, region)
            yield item, region.addresses
            self.sources.check()
            for (source, offset, n), address in zip(region.runs, region.addresses, strict=True):
                self.sources.release(source, offset, n, address)
            if self._fence is None:
                self.ring.give_back()
            else:
                self._used.append(self._fence())

    def _room(self, size: int, patient: bool) -> int | None:
        """Return the address of `size` bytes of the ring. patient: wait for copies out of it to end."""
        while self._used and self._used[0].is_done():
            self._used.popleft()
            self.ring.give_back()
        while (at := self.ring.take(size)) is None:
            if not (self._used and patient):
                return None
            self._used.popleft().wait()
            self.ring.give_back()
        return self.ring.address + at

    def _begin(self, runs: Sequence[Run], patient: bool) -> Region | None:
        """Start reading an item's runs; None while there is no memory for them.

        Mapped runs take room, too: their pages are this process's memory.
        """
        opened = [(self.sources.source(path), offset, n) for path, offset, n in runs]
        at = self._room(sum(room(n) for _, _, n in opened), patient)
        if at is None:
            return None
        addresses: list[int] = []
        segments: list[Segment] = []
        for source, offset, n in opened:
            if offset + n > source.size:
                raise truncated(source, source.size)
            if source.mapping is not None:
                address = source.mapping.address + offset
                segments.append((_MAPPED, -1, offset, n, address))
            else:
                address = at + ((offset - at) % BLOCK if n >= DIRECT_LEAST else 0)
                at = -(-(address + n) // ALIGNMENT) * ALIGNMENT
                segments.append((source.fd, source.direct_fd, offset, n, address))
            addresses.append(address)
        ticket = self._transfers.submit(segments)
        return Region(addresses, opened, ticket, time.perf_counter())

    def _error(self, error: tuple[int, int, int], region: Region) -> Exception:
        code, fd, offset = error
        for source, _, _ in region.runs:
            if fd == _MAPPED and code == errno.EFAULT:
                self.sources.check_size(source)
            elif fd == source.fd:
                if code == 0:
                    return truncated(source, offset)
                reason = os.strerror(code)
                return ReadError(f"{source.path}: reading at byte {offset} failed: {reason}")
        return ReadError(f"an input could not be read: {os.strerror(errno.EIO)}")

    @property
    def busy_seconds(self) -> float:
        return self._transfers.busy_seconds

    def close(self) -> None:
        self._transfers.close()
        self.sources.close()


@dataclass
class _Pending:
    ticket: int
    place: Place
    written: Written | None
    started: float


@dataclass
class Place:
    """Where a result goes: descriptors, offset in the file, bytes; checksum in words of `word` bytes, which
    begin `start` bytes into the tensor."""

    fd: int
    direct_fd: int
    offset: int
    n: int
    word: int
    start: int


class Writer:
    """Writes results behind the kernels."""

    def __init__(
        self, capacity: int, *, transfers: Transfers | None = None, trace: Trace | None = None
    ) -> None:
        self.memory = Memory(0, 0)
        self.waited = 0.0  # seconds
        self.ring = HostRing(capacity)
        self._transfers = transfers or _cpu.Transfers(True, WRITING_THREADS)
        self._pending: deque[_Pending] = deque()
        self._lane = Lane(trace, "write")

    def reserve(self, place: Place) -> int:
        """Return the address to put a result at; waits for earlier ones to be written if need be."""
        while self._pending and self._transfers.is_done(self._pending[0].ticket):
            self._finish_oldest()
        while (at := self.ring.take(place.n + BLOCK)) is None:
            self._finish_oldest()
        return self.ring.address + at + place.offset % BLOCK

    def write(
        self, address: int, place: Place, written: Written | None, check: Check | None = None
    ) -> None:
        """Queue a result; results are queued in the order in which they were reserved.

        check: called before a byte of it is written; what it raises stops that.
        """
        if check:
            check()
        segment = (place.fd, place.direct_fd, place.offset, place.n, address)
        ticket = self._transfers.submit([segment], [(place.word, place.start)])
        self._pending.append(_Pending(ticket, place, written, time.perf_counter()))

    def drain(self) -> None:
        """Wait until everything queued is written."""
        while self._pending:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        pending = self._pending[0]
        start = time.perf_counter()
        error, sums = self._transfers.wait(pending.ticket)
        self.waited += time.perf_counter() - start
        self._lane.moved(pending.started, pending.place.n)
        if error is not None:
            raise _write_error(*error)
        self._pending.popleft()
        self.ring.give_back()
        if pending.written:
            pending.written(pending.place.start, pending.place.n, sums[0])

    @property
    def busy_seconds(self) -> float:
        return self._transfers.busy_seconds

    def close(self) -> None:
        self._transfers.close()


def _write_error(code: int, fd: int, offset: int) -> Exception:
    if code in (errno.ENOSPC, errno.EDQUOT):
        return OSError(code, os.strerror(code))  # the output folder says how much is missing
    return CheckpointError(f"the output: writing at byte {offset} failed: {os.strerror(code)}")
