"""Results on their way back from a device: out of a ring of its memory into the writer's ring.

A thread of its own queues the copies, waits for them and hands them to the writer, so that a disk that is
slow holds up nothing until the rings are full.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, replace

from fastmerge.streaming.device import Device, Event, Memory, Stream
from fastmerge.streaming.ring import ALIGNMENT, Check, Place, Ring, Writer, Written

#: Copies in flight: while one ends and is handed on, the next one runs.
COPIES = 2


@dataclass
class _Result:
    address: int
    place: Place
    written: Written | None
    check: Check | None
    computed: Event


@dataclass
class _Copying:
    address: int  # in the writer's ring
    place: Place
    written: Written | None
    check: Check | None
    copied: Event
    is_last: bool


class _Stopped(Exception):
    """The merging thread gave up."""


class Downloader:
    """As `Writer`, for results in a device's memory.

    memory: of the device, for the ring. block: most bytes of one copy.
    """

    def __init__(self, writer: Writer, device: Device, memory: Memory, block: int) -> None:
        self._writer, self._device, self._block = writer, device, block
        self.memory = memory
        self.waited = 0.0  # seconds that the merging thread waited for room
        self.ring = Ring(memory.n_bytes, ALIGNMENT)
        self._changed = threading.Condition()
        self._queue: queue.SimpleQueue[_Result | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._stop = False
        self._thread = threading.Thread(target=self._run, name="download")
        self._thread.start()

    @property
    def busy_seconds(self) -> float:
        return self._writer.busy_seconds

    def reserve(self, place: Place) -> int:
        """Return the device address to put a result at; waits for earlier ones to leave if need be."""
        start = time.perf_counter()
        with self._changed:
            while True:
                self._raise()
                at = self.ring.take(place.n)
                if at is not None:
                    break
                self._changed.wait()
        self.waited += time.perf_counter() - start
        return self.memory.address + at

    def write(
        self, address: int, place: Place, written: Written | None, check: Check | None = None
    ) -> None:
        """Queue a result whose kernels are queued; see `Writer.write`. check: called when they have run."""
        computed = self._device.mark(Stream.COMPUTE)
        self._queue.put(_Result(address, place, written, check, computed))

    def drain(self) -> None:
        """Wait until everything queued is written."""
        start = time.perf_counter()
        self._queue.put(None)
        self._thread.join()
        self.waited += time.perf_counter() - start
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self._stop = True
        self._queue.put(None)
        self._thread.join()
        self._device.close()
        self._device.release(self.memory)
        self._writer.close()

    # ---- in the downloading thread ---------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._download()
            self._writer.drain()
        except _Stopped:
            pass
        except BaseException as error:  # the merging thread raises it
            with self._changed:
                self._error = error
                self._changed.notify()

    def _download(self) -> None:
        copying: deque[_Copying] = deque()
        while (result := self._next(copying)) is not None:
            self._device.follow(Stream.COPY_OUT, result.computed)
            for start in range(0, result.place.n, self._block) or (0,):
                n = min(self._block, result.place.n - start)
                place = _part(result.place, start, n)
                while len(copying) >= COPIES:
                    self._hand_on(copying.popleft())
                address = self._writer.reserve(place)
                self._device.copy(Stream.COPY_OUT, address, result.address + start, n)
                copied = self._device.mark(Stream.COPY_OUT)
                is_last = start + n == result.place.n
                copying.append(
                    _Copying(address, place, result.written, result.check, copied, is_last)
                )
        while copying:
            self._hand_on(copying.popleft())

    def _next(self, copying: deque[_Copying]) -> _Result | None:
        """Return the next result, None at the end; meanwhile, hand on what is copied."""
        while copying and self._queue.empty():
            self._hand_on(copying.popleft())
        result = self._queue.get()
        if self._stop:
            raise _Stopped
        return result

    def _hand_on(self, done: _Copying) -> None:
        done.copied.wait()
        self._writer.write(done.address, done.place, done.written, done.check)
        if done.is_last:
            with self._changed:
                self.ring.give_back()
                self._changed.notify()


def _part(place: Place, start: int, n: int) -> Place:
    return replace(place, offset=place.offset + start, n=n, start=place.start + start)


__all__ = ["Downloader"]
