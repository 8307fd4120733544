"""The simulated device keeps time, order and limits, moves bytes when it says, and breaks as asked.

Its moments are logical: nearly all are compared exactly, and few with a clock on the wall.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simulation
from simulation import SimulatedDevice, SimulatedKernels, takes

from fastmerge.errors import DeviceError, DeviceMemoryError
from fastmerge.streaming.device import Memory, Stream
from fastmerge.streaming.trace import Span

pytestmark = [
    pytest.mark.timed,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]

IN, COMPUTE, OUT = Stream.COPY_IN, Stream.COMPUTE, Stream.COPY_OUT
MB = 1_000_000


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    simulation.build()


class Bench:
    """A device with pinned host memory and memory of its own, n bytes each."""

    def __init__(self, n: int, **options: Any) -> None:
        self.device = SimulatedDevice(1e9, 2e9, **options)
        self.n = n
        self.host = np.zeros(n, np.uint8)
        self.address = self.host.ctypes.data
        assert self.device.pin(self.address, n)
        self.there: Memory = self.device.allocate(n)

    def copy(self, stream: Stream, n: int | None = None) -> None:
        ends = (self.there.address, self.address)
        self.device.copy(stream, *(ends if stream is IN else ends[::-1]), n or self.n)

    def on_device(self) -> Any:
        return np.ctypeslib.as_array((ctypes.c_uint8 * self.n).from_address(self.there.address))

    def finish(self) -> list[Span]:
        self.device.native.synchronize()
        return self.device.spans()


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(n: int = MB, **options: Any) -> Bench:
        made.append(Bench(n, **options))
        return made[-1]

    yield make
    for each in made:
        each.device.native.close()


# ---- time ------------------------------------------------------------------------------------------


def test_the_clock_is_perf_counter() -> None:
    before = time.perf_counter()
    now = simulation.native().now()
    assert before <= now <= time.perf_counter()


def test_streams_keep_their_bandwidths_and_overlap(bench: Callable[..., Bench]) -> None:
    b = bench(moves_data=False)
    native = b.device.native
    big = 40 * MB
    host, there = np.zeros(big, np.uint8), b.device.allocate(2 * big)
    assert b.device.pin(host.ctypes.data, big)

    def work() -> None:
        native.copy(IN, there.address, host.ctypes.data, big)
        native.compute(0.04)
        for _ in range(2):
            native.copy(OUT, host.ctypes.data, there.address, big)
        native.synchronize()

    takes(0.04, work)
    lengths = {(s.lane, round(s.end - s.start, 6)) for s in b.finish()}
    assert lengths == {("copy in", 0.04), ("compute", 0.04), ("copy out", 0.02)}


def test_waking_late_does_not_add_up(bench: Callable[..., Bench]) -> None:
    b = bench(moves_data=False)

    def work() -> None:
        for _ in range(1000):
            b.device.native.compute(50e-6)
        b.device.mark(COMPUTE).wait()

    takes(0.05, work)
    assert all(s.end - s.start == pytest.approx(50e-6, abs=1e-8) for s in b.finish())


def test_latencies_and_jitter(bench: Callable[..., Bench]) -> None:
    def lengths(**options: Any) -> list[float]:
        b = bench(copy_latency=1e-3, launch_latency=2e-3, moves_data=False, **options)
        for _ in range(3):
            b.copy(IN)
            b.copy(OUT)
            b.device.native.compute(1e-3)
        return [s.end - s.start for s in b.finish()]

    plain = lengths()
    assert plain == pytest.approx([2e-3] * 3 + [3e-3] * 3 + [1.5e-3] * 3)
    shaken = lengths(jitter_seconds=1e-3, seed=5)
    assert shaken == pytest.approx(lengths(jitter_seconds=1e-3, seed=5))
    assert len(set(np.round(shaken, 7))) == 9
    assert all(0 < a - b < 1e-3 for a, b in zip(shaken, plain, strict=True))


def test_copies_in_are_slower_beside_copies_out(bench: Callable[..., Bench]) -> None:
    b = bench(200 * MB, duplex=0.5, moves_data=False)
    b.copy(OUT, 100 * MB)  # 50 ms
    time.sleep(10e-3)
    b.copy(IN, 50 * MB)  # 40 ms at half speed, then 30 ms
    inward, outward = b.finish()
    assert outward.end - outward.start == pytest.approx(50e-3)
    overlap = outward.end - inward.start
    assert inward.end - inward.start == pytest.approx(50e-3 + overlap / 2)
    # One that begins while the other is under way slows what is left.
    b.copy(IN, 100 * MB)
    time.sleep(25e-3)
    b.copy(OUT, 50 * MB)  # 25 ms
    inward = next(s for s in b.finish()[::-1] if s.lane == "copy in")
    assert inward.end - inward.start == pytest.approx(100e-3 + 25e-3 / 2)


# ---- order -----------------------------------------------------------------------------------------


def test_a_stream_is_in_order(bench: Callable[..., Bench]) -> None:
    b = bench(moves_data=False)
    b.device.native.compute(100.0)
    slow = b.device.mark(COMPUTE)
    events = []
    for n in (MB, 1, 5000, MB):
        b.copy(IN, n)
        events.append(b.device.mark(IN))
    b.device.copy(IN, 0, 0, 0)
    b.device.follow(IN, slow)
    b.copy(IN, 7)
    behind = b.device.mark(IN)
    events[2].wait()
    assert [e.is_done() for e in events[:3]] == [True] * 3
    events[3].wait()
    assert not behind.is_done() and not slow.is_done()
    spans = b.device.spans()
    assert [s.n_bytes for s in spans[:4]] == [MB, 1, 5000, MB] and len(spans) <= 5
    assert all(a.end <= b.start for a, b in pairwise(spans))


def test_streams_follow_each_other(bench: Callable[..., Bench]) -> None:
    """In, compute, out with two slots: each moment as the recurrence says."""
    b = bench(10 * MB, moves_data=False)
    native, n_items = b.device.native, 6
    gone: list[Any] = []
    native.compute(5e-3)  # the first follows something under way
    b.device.follow(IN, b.device.mark(COMPUTE))
    for i in range(n_items):
        if i >= 2:
            b.device.follow(IN, gone[i - 2])
        b.copy(IN)  # 10 ms
        b.device.follow(COMPUTE, b.device.mark(IN))
        native.compute(4e-3)
        b.device.follow(OUT, b.device.mark(COMPUTE))
        b.copy(OUT, 8 * MB)  # 4 ms
        gone.append(b.device.mark(OUT))
    spans = b.finish()
    lanes = {
        lane: [s for s in spans if s.lane == lane] for lane in ("copy in", "compute", "copy out")
    }
    first = lanes["compute"][0]
    at_in = at_compute = at_out = first.end
    ends_out: list[float] = []
    for i in range(n_items):
        at_in = max(at_in, ends_out[i - 2] if i >= 2 else 0) + 10e-3
        at_compute = max(at_compute, at_in) + 4e-3
        at_out = max(at_out, at_compute) + 4e-3
        ends_out.append(at_out)
        assert lanes["copy in"][i].end == pytest.approx(at_in, abs=1e-7)
        assert lanes["compute"][i + 1].end == pytest.approx(at_compute, abs=1e-7)
        assert lanes["copy out"][i].end == pytest.approx(at_out, abs=1e-7)


def test_following_what_is_over_costs_nothing(bench: Callable[..., Bench]) -> None:
    b = bench(moves_data=False)
    b.copy(IN)
    event = b.device.mark(IN)
    event.wait()
    time.sleep(2e-3)
    b.device.follow(OUT, event)
    b.device.follow(IN, b.device.mark(OUT))  # crosswise
    queued = time.perf_counter()
    b.copy(IN)
    returned = time.perf_counter()
    assert queued <= b.finish()[1].start <= returned


def test_compute_of_host_kernels_waits_in_the_thread(bench: Callable[..., Bench]) -> None:
    b = bench(copy_latency=0.1)
    b.copy(IN)
    event = b.device.mark(IN)
    assert not event.is_done()
    b.device.follow(COMPUTE, event)
    assert event.is_done()


# ---- data ------------------------------------------------------------------------------------------


def test_a_copy_moves_its_bytes_when_it_ends(bench: Callable[..., Bench]) -> None:
    b = bench(copy_latency=0.1)
    b.host[:] = 1
    b.copy(IN)
    time.sleep(5e-3)
    there = b.on_device()
    assert not there.any()
    b.host[:] = 2  # too early: what arrives is wrong
    b.device.mark(IN).wait()
    assert (there == 2).all()
    there[:] = 3
    b.copy(OUT)
    b.device.mark(OUT).wait()
    assert (b.host == 3).all()


def test_without_data_memory_is_only_addresses() -> None:
    device = SimulatedDevice(1e15, 1e15, 1 << 40, moves_data=False)
    there = device.allocate(200 << 30)
    host = 1 << 20  # nothing is there
    assert device.pin(host, 100 << 30)
    device.copy(IN, there.address + (50 << 30), host, 100 << 30)
    device.mark(IN).wait()
    device.close()


# ---- memory ----------------------------------------------------------------------------------------


def test_device_memory_has_a_limit() -> None:
    device = SimulatedDevice(memory_bytes=10 * 512)
    first, second = device.allocate(1), device.allocate(4 * 512)
    assert first.address % 512 == second.address % 512 == 0
    assert device.free_bytes() == 5 * 512
    with pytest.raises(DeviceMemoryError, match="0 MiB free"):
        device.allocate(5 * 512 + 1)
    del second
    assert device.free_bytes() == 9 * 512
    device.allocate(5 * 512)
    assert device.native.peak_bytes == 6 * 512
    device.native.fail_allocation(5)
    device.allocate(1)
    with pytest.raises(DeviceMemoryError, match="made to fail"):
        device.allocate(1)
    device.allocate(1)
    device.close()
    del first  # given back after all


def test_pinned_memory_has_a_limit() -> None:
    device = SimulatedDevice(pin_limit=1000)
    assert device.pin(4096, 600)
    assert not device.pin(8192, 401)
    assert not device.pin(4000, 97)  # overlaps
    assert not device.pin(4695, 1)
    assert device.pin(4696, 400) and device.native.pinned_bytes == 1000
    device.unpin(4096)
    device.native.fail_pin(5)
    assert not device.pin(8192, 1)
    assert device.pin(8192, 600)
    device.close()


def test_copies_are_between_pinned_and_allocated_memory(bench: Callable[..., Bench]) -> None:
    b = bench(1000)
    loose = np.zeros(1000, np.uint8)
    refused = [
        (IN, b.there.address, loose.ctypes.data, 1000, "not pinned"),
        (IN, b.there.address, b.address + 1, 1000, "not pinned"),
        (IN, loose.ctypes.data, b.address, 1000, "not allocated"),
        (IN, b.address, b.there.address, 1000, "not allocated"),
        (OUT, b.address, b.there.address + 512, 513, "not allocated"),
    ]
    for stream, target, source, n, why in refused:
        with pytest.raises(DeviceError, match=why):
            b.device.copy(stream, target, source, n)
    with pytest.raises(ValueError):
        b.copy(COMPUTE)
    b.copy(IN)
    assert len(b.finish()) == 1


def test_pageable_memory_is_slow_and_keeps_the_host(bench: Callable[..., Bench]) -> None:
    b = bench(MB, pageable_bandwidth=50e6)
    loose = np.ones(MB, np.uint8)
    start = time.perf_counter()
    b.device.copy(IN, b.there.address, loose.ctypes.data, MB)
    assert time.perf_counter() - start > 0.02
    b.copy(OUT)
    b.finish()
    assert b.host.all()


def test_memory_is_not_taken_back_under_a_copy(bench: Callable[..., Bench]) -> None:
    for what in ("release", "unpin"):
        b = bench(50 * MB)
        b.copy(IN)
        if what == "release":
            b.there = Memory(0, 0)
        else:
            b.device.unpin(b.address)
        with pytest.raises(DeviceError, match="while a copy of it was queued"):
            b.device.mark(IN)


# ---- faults ----------------------------------------------------------------------------------------


def test_a_fault_stays(bench: Callable[..., Bench]) -> None:
    b = bench(10 * MB)
    b.host[:] = 1
    b.device.native.fail(IN, 1, "an illegal address")
    b.copy(IN)
    first = b.device.mark(IN)
    other = b.device.mark(OUT)
    first.wait()
    b.host[:] = 2
    b.copy(IN)
    failing = b.device.mark(IN)
    b.device.follow(OUT, failing)
    behind = b.device.mark(OUT)
    calls: list[Callable[[], object]] = [
        failing.wait, behind.wait, first.wait, first.is_done, other.wait,
        lambda: b.device.mark(COMPUTE),
        lambda: b.device.follow(COMPUTE, first),
        lambda: b.copy(OUT),
        lambda: b.device.allocate(1),
        lambda: SimulatedKernels(b.device).launch(1),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(DeviceError, match=r"^the simulated device: an illegal address$"):
            call()
    assert not b.device.pin(1 << 40, 1)
    assert (b.on_device() == 1).all()
    assert len(b.device.spans()) == 1
    b.device.close()
    with pytest.raises(DeviceError, match="an illegal address"):
        b.device.mark(IN)


def waiting(events: list[Any]) -> tuple[list[threading.Thread], list[str]]:
    told: list[str] = []

    def wait(event: Any) -> None:
        try:
            event.wait()
        except DeviceError as error:
            told.append(str(error))

    threads = [threading.Thread(target=wait, args=(e,)) for e in events]
    for thread in threads:
        thread.start()
    return threads, told


@pytest.mark.parametrize("closes", [False, True])
def test_what_waits_is_woken(bench: Callable[..., Bench], closes: bool) -> None:
    b = bench(moves_data=False)
    b.device.native.compute(100.0)
    slow = b.device.mark(COMPUTE)
    b.device.follow(IN, slow)
    b.copy(IN)
    threads, told = waiting([slow, slow, b.device.mark(IN)])
    start = time.perf_counter()
    if closes:
        b.device.native.close()
    else:
        b.device.native.fail(OUT, 0, "lost")
        b.copy(OUT)
    for thread in threads:
        thread.join()
    why = "the device is closed" if closes else "lost"
    assert told == [f"the simulated device: {why}"] * 3
    assert time.perf_counter() - start < 1
    b.device.native.close()


def test_closing_waits_for_what_is_queued(bench: Callable[..., Bench]) -> None:
    b = bench(20 * MB)
    b.host[:] = 7
    b.copy(IN)
    b.device.close()
    assert len(b.device.spans()) == 1
    with pytest.raises(DeviceError, match="closed"):
        b.copy(IN)
    b.device.close()


# ---- under ThreadSanitizer -------------------------------------------------------------------------

RACES = Path(__file__).parent / "races.py"


@pytest.fixture(scope="module")
def watched() -> None:
    found = subprocess.run(["g++", "-print-file-name=libtsan.so"], capture_output=True)
    if b"/" not in found.stdout:
        pytest.skip("needs libtsan")


@pytest.mark.usefixtures("watched")
def test_no_thread_races_with_another() -> None:
    import races

    done = simulation.run_watched(RACES, *races.SOUND)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[:4000]
    assert done.stdout == "".join(f"{part}: done\n" for part in races.SOUND)


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("part", ["source_used_again", "wrong_event", "nothing_followed"])
def test_a_planted_race_is_caught(part: str) -> None:
    done = simulation.run_watched(RACES, part)
    assert done.returncode == 66, done.stdout[-500:] + done.stderr[:4000]
    assert "data race" in done.stderr and "Device::perform" in done.stderr
