"""Bounded memory between the disk and the kernels: reads ahead, writes behind, in one ring of bytes.

Regions are handed out and taken back in order. While one is merged, threads of csrc/io fill the
next ones and empty the
last ones; when the ring is full, reading waits for writing. Nothing else holds tensor bytes.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from fastmerge import _cpu
from fastmerge.errors import CheckpointError, ReadError

T = TypeVar("T")

#: (file descriptor, offset in the file, bytes, address)
Segment = tuple[int, int, int, int]

#: Called with the checksum of each segment when all of a region's segments are written.
Written = Callable[[list[int]], None]

#: Reads that wait in memory at most, beside the one in work: more only spends memory.
READ_AHEAD = 4

ALIGNMENT = 64


@dataclass
class Region:
    """A run of ring memory that one work item owns from its read to its last written byte."""

    address: int
    size: int
    offset: int
    reading: int = 0
    writing: int | None = None
    written: Written | None = None
    consumed: bool = False


class Ring:
    """The ring, its threads, and the files it reads."""

    def __init__(self, n_bytes: int, n_readers: int = 2, n_writers: int = 1) -> None:
        self._arena = _cpu.Arena(n_bytes)
        self._capacity = n_bytes
        self._reads = _cpu.Transfers(False, n_readers)
        self._writes = _cpu.Transfers(True, n_writers)
        self._regions: deque[Region] = deque()
        self._head = 0
        self._files: dict[Path, int] = {}

    def __enter__(self) -> Ring:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._reads.close()
        self._writes.close()
        for fd in self._files.values():
            os.close(fd)

    def file(self, path: Path) -> int:
        """Return a descriptor of an input file, opened once for the whole merge."""
        if path not in self._files:
            try:
                self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as e:
                raise CheckpointError(f"{path}: cannot be opened: {e.strerror}") from e
        return self._files[path]

    def sweep(
        self, loads: Iterable[tuple[T, int, Sequence[Segment]]]
    ) -> Iterator[tuple[T, Region]]:
        """Yield (item, region) in order, each with its bytes read; addresses of segments are relative.

        Each load is (item, bytes of memory, segments to read). While the caller works on a region, later
        ones are read. A region is taken back when the caller asks for the next one and its write is done.
        """
        upcoming = iter(loads)
        waiting: deque[tuple[T, Region]] = deque()
        following = next(upcoming, None)
        while following is not None or waiting:
            while following is not None and len(waiting) <= READ_AHEAD:
                item, size, segments = following
                region = self._allocate(size, block=not waiting)
                if region is None:
                    break
                at = region.address
                region.reading = self._reads.submit(
                    [(fd, offset, n, at + local) for fd, offset, n, local in segments]
                )
                waiting.append((item, region))
                following = next(upcoming, None)
            item, region = waiting.popleft()
            self._check(self._reads.wait(region.reading)[0], "reading")
            yield item, region
            region.consumed = True
        self.drain()

    def write(
        self,
        region: Region,
        segments: Sequence[Segment],
        words: Sequence[tuple[int, int]] = (),
        written: Written | None = None,
    ) -> None:
        """Queue a region's result; segments hold absolute addresses inside it.

        words: per segment the bytes of its checksum's words, and its first byte in its tensor.
        """
        region.writing = self._writes.submit(segments, words)
        region.written = written

    def drain(self) -> None:
        """Wait until everything queued is written."""
        while self._regions:
            self._release(self._regions[0])

    def _allocate(self, size: int, block: bool) -> Region | None:
        """Take `size` bytes behind the newest region, freeing the oldest finished ones; None if
        there is no room.

        With `block` the oldest regions' writes are waited for.
        """
        size = -(-max(size, 1) // ALIGNMENT) * ALIGNMENT
        if size > self._capacity:
            raise MemoryError(
                f"a work item of {size} bytes does not fit a ring of {self._capacity}"
            )
        while True:
            offset = self._room(size)
            if offset is not None:
                region = Region(self._arena.address + offset, size, offset)
                self._regions.append(region)
                self._head = offset + size
                return region
            oldest = self._regions[0]
            if not (block or oldest.consumed):
                return None
            self._release(oldest)

    def _room(self, size: int) -> int | None:
        if not self._regions:
            return 0
        tail, head = self._regions[0].offset, self._head
        if head > tail:  # free: behind the newest, or before the oldest
            if head + size <= self._capacity:
                return head
            return 0 if size <= tail else None
        return head if head + size <= tail else None

    def _release(self, region: Region) -> None:
        if region.writing is not None:
            error, sums = self._writes.wait(region.writing)
            self._check(error, "writing")
            if region.written:
                region.written(sums)
        self._regions.popleft()

    def _check(self, error: tuple[int, int, int] | None, doing: str) -> None:
        if error is None:
            return
        code, fd, offset = error
        path = next((p for p, f in self._files.items() if f == fd), None)
        name = str(path) if path else "the output"
        if code == 0:
            raise CheckpointError(
                f"{name}: ends at byte {offset}, before its tensors do; it was truncated while being read"
            )
        if doing == "reading":
            raise ReadError(f"{name}: reading at byte {offset} failed: {os.strerror(code)}")
        if code in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(code, os.strerror(code))  # the output folder says how much is missing
        raise CheckpointError(f"{name}: writing at byte {offset} failed: {os.strerror(code)}")
