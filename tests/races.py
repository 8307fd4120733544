"""What threads do to a simulated device, under ThreadSanitizer: nothing wrong, and planted races.

python tests/races.py PART ...      what tests/test_simulated.py runs, by simulation.run_watched
"""

from __future__ import annotations

import errno
import queue
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from simulation import SimulatedDevice, SimulatedEvent, native

from fastmerge.errors import DeviceError
from fastmerge.streaming.device import Stream


def _together(*works: Callable[[], None]) -> None:
    """Run each in a thread of its own; raises what any of them raised."""
    with ThreadPoolExecutor(len(works)) as pool:
        for done in [pool.submit(work) for work in works]:
            done.result()


def _pinned(device: SimulatedDevice, n: int) -> tuple[Any, int]:
    """Return n bytes of pinned host memory and their address, which is a multiple of the disk's block."""
    block = 4096
    memory = np.zeros(n + block, np.uint8)
    address = -(-memory.ctypes.data // block) * block
    assert device.pin(address, n)
    return memory, address


SLOTS = 3


def _stream(
    seed: int, n_items: int, n: int, read: Callable[[int, int], None], write: Callable[[int, int], None]
) -> None:  # fmt: skip
    """Move items of n bytes through a device: one thread reads and uploads, one downloads and writes."""
    device = SimulatedDevice(2e9, 2e9, jitter_seconds=5e-4, seed=seed)
    owner_in, staged_in = _pinned(device, SLOTS * n)
    owner_out, staged_out = _pinned(device, SLOTS * n)
    there = device.allocate(SLOTS * n)
    uploaded: queue.Queue[SimulatedEvent] = queue.Queue()
    downloaded: queue.Queue[SimulatedEvent] = queue.Queue()

    def upload() -> None:
        events: list[SimulatedEvent] = []
        for i in range(n_items):
            at = i % SLOTS * n
            if i >= SLOTS:
                events[i - SLOTS].wait()  # the host's memory can be used again
                device.follow(Stream.COPY_IN, downloaded.get())  # and the device's
            read(i, staged_in + at)
            device.copy(Stream.COPY_IN, there.address + at, staged_in + at, n)
            events.append(device.mark(Stream.COPY_IN))
            uploaded.put(events[-1])

    def download() -> None:
        for i in range(n_items):
            at = i % SLOTS * n
            device.follow(Stream.COPY_OUT, uploaded.get())
            device.copy(Stream.COPY_OUT, staged_out + at, there.address + at, n)
            event = device.mark(Stream.COPY_OUT)
            downloaded.put(event)
            event.wait()
            write(i, staged_out + at)

    _together(upload, download)
    device.close()
    del owner_in, owner_out


def streams() -> None:
    """Items come through whole, in any order of what may be in any order."""
    n = 300_000

    def check(i: int, address: int) -> None:
        assert native().checksum(address, n) == sums[i]

    sums = []
    for i in range(30):
        content = np.full(n, i, np.uint8)
        sums.append(native().checksum(content.ctypes.data, n))
    for seed in range(3):
        _stream(seed, 30, n, lambda i, address: native().fill(address, i, n), check)


def drives() -> None:
    """From file to file, through simulated drives that share a medium and through csrc/io's threads."""
    n, n_items = 1 << 20, 24
    reading = native().Disk(False, 2e9, jitter_seconds=1e-3, latency_seconds=1e-4)
    writing = native().Disk(True, 2e9, depth=2, shares=reading)
    content = np.random.default_rng(1).integers(0, 256, n * n_items, np.uint8).tobytes()
    for source, sink in [
        (reading, writing),
        (native().Transfers(False, 4), native().Transfers(True, 2)),
    ]:
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as got:
            given.write(content)
            given.flush()

            def move(by: Any, fd: int, i: int, address: int, words: list[tuple[int, int]]) -> None:
                error, _ = by.wait(by.submit([(fd, -1, i * n, n, address)], words))
                assert error is None

            read, write = given.fileno(), got.fileno()
            _stream(
                7, n_items, n,
                lambda i, at, by=source, fd=read: move(by, fd, i, at, []),  # type: ignore[misc]
                lambda i, at, by=sink, fd=write: move(by, fd, i, at, [(2, 0)]),  # type: ignore[misc]
            )  # fmt: skip
            got.seek(0)
            assert got.read() == content
        source.close()
        sink.close()


def faults() -> None:
    """Threads that wait, queue and ask while an operation fails, or while all is closed."""
    for closes in (False, True):
        device = SimulatedDevice(1e9, 1e9)
        if not closes:
            device.native.fail(Stream.COPY_IN, 3, "planted")
        raised = _while_it_ends(device, closes)
        why = "the device is closed" if closes else "planted"
        assert raised == [f"the simulated device: {why}"] * 2, raised
        device.close()


def _while_it_ends(device: SimulatedDevice, closes: bool) -> list[str]:
    """Return what two threads that use a device were told in the end."""
    n = 10_000_000
    owner, host = _pinned(device, n)
    there = device.allocate(n)
    disk = native().Disk(False, 1e9, moves_data=False)
    ticket = disk.submit([(0, -1, 0, 1 << 33, host)])
    raised: list[str] = []

    def use() -> None:
        try:
            while True:
                device.copy(Stream.COPY_IN, there.address, host, n)
                event = device.mark(Stream.COPY_IN)
                device.follow(Stream.COPY_OUT, event)
                event.is_done()
                event.wait()
        except DeviceError as error:
            raised.append(str(error))

    def stop() -> None:
        time.sleep(0.05)
        if closes:
            device.native.close()
        disk.close()

    def read() -> None:
        error, _ = disk.wait(ticket)
        assert error is not None and error[0] == errno.ECANCELED

    _together(use, use, stop, read)
    del owner
    return raised


def _overwrite(wait: Callable[[SimulatedDevice, SimulatedEvent], None]) -> None:
    """Use the host's memory again once `wait` has waited for whatever it waits for."""
    device = SimulatedDevice(1e9, 1e9)
    n = 1_000_000
    owner, host = _pinned(device, 2 * n)
    there = device.allocate(n)
    device.copy(Stream.COPY_IN, there.address, host, n)
    event = device.mark(Stream.COPY_IN)
    wait(device, event)
    native().fill(host, 1, n)
    event.wait()
    device.close()
    del owner


def source_used_again() -> None:
    """A race: the source of a copy is overwritten while the copy is under way."""
    _overwrite(lambda device, event: None)


def wrong_event() -> None:
    """A race, though the copy has long been done: what was waited for does not say so."""

    def wait(device: SimulatedDevice, event: SimulatedEvent) -> None:
        device.native.compute(0.05)
        device.mark(Stream.COMPUTE).wait()

    _overwrite(wait)


def right_event() -> None:
    _overwrite(lambda device, event: event.wait())


def nothing_followed() -> None:
    """A race: what one stream writes, another reads without following it."""
    device = SimulatedDevice(1e9, 1e9)
    n = 1_000_000
    owner, host = _pinned(device, 2 * n)
    there = device.allocate(n)
    device.copy(Stream.COPY_IN, there.address, host, n)
    device.copy(Stream.COPY_OUT, host + n, there.address, n)
    device.close()
    del owner


SOUND: dict[str, Callable[[], None]] = {
    f.__name__: f for f in (streams, drives, faults, right_event)
}
RACES: dict[str, Callable[[], None]] = {
    f.__name__: f for f in (source_used_again, wrong_event, nothing_followed)
}


if __name__ == "__main__":
    for part in sys.argv[1:]:
        (SOUND | RACES)[part]()
        print(f"{part}: done")
