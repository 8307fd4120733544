"""Simulated drives move bytes as csrc/io does, in the time they are given; simulated kernels take theirs."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simulation
import torch
from simulation import SimulatedDevice, SimulatedKernels, takes

import fastmerge
from fastmerge import _cpu, ops
from fastmerge.backends import Buffer, Chunk
from fastmerge.backends.streamed_order import sampled_ranges
from fastmerge.dtypes import DType
from fastmerge.evaluate import Operands, run_walks, sweep_statistic
from fastmerge.stages import Gram, Moments, OrderStatistic, Walk
from fastmerge.streaming.ring import Place, Reader, Writer
from fastmerge.streaming.sources import Io, Sources
from fastmerge.streaming.trace import busy_seconds

pytestmark = [
    pytest.mark.timed,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]

MB = 1_000_000


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    simulation.build()


# ---- drives ----------------------------------------------------------------------------------------


def disk(writing: bool, bandwidth: float, **options: Any) -> Any:
    return simulation.native().Disk(writing, bandwidth, **options)


def test_a_drive_keeps_its_bandwidth() -> None:
    d = disk(False, 1e9, moves_data=False)

    def work() -> None:
        for ticket in [d.submit([(0, -1, 0, 10 * MB, 0), (0, -1, 0, 5 * MB, 0)]) for _ in range(3)]:
            assert d.wait(ticket) == (None, [0, 0])

    takes(0.045, work)
    assert d.busy_seconds == pytest.approx(1e-9 * sum(n for _, _, n in d.spans()))
    d.close()


def test_reads_and_writes_share_a_drive() -> None:
    reads = disk(False, 2e9, moves_data=False, piece_bytes=MB)
    writes = disk(True, 1e9, moves_data=False, piece_bytes=MB, depth=2, shares=reads)

    def work() -> None:
        first = reads.submit([(0, -1, 0, 40 * MB, 0)])
        second = writes.submit([(0, -1, 0, 6 * MB, 0)])
        writes.wait(second)
        reads.wait(first)

    takes(0.026, work)
    # 8 requests of one and 2 of the other take turns: the writes, queued last, end at 18 ms.
    assert writes.spans()[-1][1] < reads.spans()[-1][1] - 0.004
    spans = sorted([*reads.spans(), *writes.spans()])
    assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(spans))
    reads.close()
    writes.close()


@pytest.mark.parametrize(("depth", "seconds"), [(1, 0.06), (8, 0.015)])
def test_requests_in_flight_hide_latency(depth: int, seconds: float) -> None:
    d = disk(False, 1e9, latency_seconds=5e-3, depth=depth, piece_bytes=MB, moves_data=False)
    takes(seconds, lambda: d.wait(d.submit([(0, -1, 0, 10 * MB, 0)])))
    d.close()


def test_a_drive_reads_and_writes_as_csrc_io_does(tmp_path: Path) -> None:
    content = np.random.default_rng(3).integers(0, 256, 3 * MB, np.uint8)
    runs = [(0, 1000), (1000, 2_000_000), (2_001_000, 999_000)]
    words = [(2, 8), (8, 1008), (4, 2_001_000)]
    answers = []
    for by in (_cpu.Transfers(True, 2), disk(True, 1e9, jitter_seconds=2e-3, piece_bytes=300_000)):
        with open(tmp_path / "file", "w+b") as file:
            fd = file.fileno()
            segments = [(fd, -1, at, n, content.ctypes.data + at) for at, n in runs]
            answers.append(by.wait(by.submit(segments, words)))
            assert os.pread(fd, 4 * MB, 0) == content.tobytes()
        by.close()
    assert answers[0] == answers[1]
    got = np.zeros_like(content)
    reading = disk(False, 1e9, latency_seconds=0.1, jitter_seconds=2e-3, piece_bytes=300_000)
    with open(tmp_path / "file", "rb") as file:
        ticket = reading.submit(
            [(file.fileno(), -1, at, n, got.ctypes.data + at) for at, n in runs]
        )
        assert not got.any()
        assert reading.wait(ticket) == (None, [0] * 3)
    assert (got == content).all()
    reading.close()


def test_a_drive_fails_as_asked(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(1, 101)) * 1000)
    got = np.zeros(100_000, np.uint8)
    d = disk(False, 1e9, piece_bytes=8000)
    d.fail(1, errno.EIO)
    d.fail(2, 0, done=20_004)
    with open(tmp_path / "file", "rb") as file:
        fd = file.fileno()
        each = [
            (fd, -1, 0, 50_000, got.ctypes.data),
            (fd, -1, 50_000, 10_000, got.ctypes.data + 50_000),
        ]
        assert d.wait(d.submit(each))[0] == (errno.EIO, fd, 50_000)
        assert got[:50_000].all() and not got[50_000:].any()
        got[:] = 0
        assert d.wait(d.submit(each[:1]))[0] == (0, fd, 20_004)
        assert got[:20_004].all() and not got[20_004:].any()
        assert d.wait(d.submit(each))[0] is None
        past = (fd, -1, 99_990, 20, got.ctypes.data)
        assert d.wait(d.submit([past]))[0] == (0, fd, 100_000)
    d.close()


def test_a_drive_closes_with_requests_queued() -> None:
    d = disk(False, 1e6, moves_data=False)
    ticket = d.submit([(5, -1, 0, 1 << 40, 0)])
    threading.Timer(0.05, d.close).start()
    start = time.perf_counter()
    assert d.wait(ticket)[0][0] == errno.ECANCELED
    assert time.perf_counter() - start < 1
    assert d.wait(d.submit([(5, -1, 0, 1, 0)]))[0][0] == errno.ECANCELED
    d.close()


def test_reader_and_writer_run_on_drives(tmp_path: Path) -> None:
    content = np.random.default_rng(4).integers(0, 256, MB, np.uint8)
    (tmp_path / "in").write_bytes(content.tobytes())
    reader = Reader(Sources([tmp_path / "in"], Io.BUFFERED), 400_000)
    writer = Writer(200_000)
    for transfers in (reader._transfers, writer._transfers):
        transfers.close()
    reading = reader._transfers = disk(False, 100e6)
    writer._transfers = disk(True, 100e6, shares=reading)
    sums: list[int] = []
    n = 100_000
    with open(tmp_path / "out", "w+b") as file:
        loads = [(i, [(tmp_path / "in", i * n, n)]) for i in range(10)]
        start = time.perf_counter()
        for i, (address,) in reader.sweep(loads):
            place = Place(file.fileno(), -1, i * n, n, 1, i * n)
            target = writer.reserve(place)
            ctypes.memmove(target, address, n)
            writer.write(target, place, lambda start, n, checksum: sums.append(checksum))
        writer.drain()
        assert time.perf_counter() - start >= 0.02
        assert os.pread(file.fileno(), 2 * MB, 0) == content.tobytes()
    assert sum(sums) % 2**64 == _cpu.checksum(content.data, 1, 0)
    reader.close()
    writer.close()


# ---- kernels ---------------------------------------------------------------------------------------


def test_every_method_runs_on_kernels_that_only_take_time(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimulatedDevice(moves_data=False, launch_latency=1e-6)
    kernels = SimulatedKernels(device)
    entry = ops.Entry("cpu", ("cpu",), "simulated", lambda: None, lambda device: kernels)
    monkeypatch.setattr(ops, "BACKENDS", (entry,))
    state = {"a": torch.ones(24, 40), "b": torch.ones(40), "c": torch.ones(())}
    for name, spec in fastmerge.list_methods().items():
        if spec.cost is not None:
            continue  # nothing is computed here that could be decomposed
        origin = state if spec.base != "ignored" else None
        experts = [state] if spec.base_is_operand else [state, state]
        given = {p.name: 0.3 for p in spec.params if p.name in ("t", "weight", "density")}
        before = len(device.spans())
        fastmerge.merge_state_dicts(origin, experts, method=name, backend="cpu", **given)
        assert len(device.spans()) > before
    device.close()


def test_kernels_take_the_time_of_their_bytes() -> None:
    device = SimulatedDevice(moves_data=False)
    kernels = SimulatedKernels(device, hbm_bandwidth=1e12)
    n = 1 << 30
    buffers = [Buffer(0, DType.BF16, n) for _ in range(3)]
    operands = Operands(buffers[0], buffers[1:], 1 << 10, DType.F32)
    walk = Walk(np.ones((2, 1)))
    seconds = 2 * n / 1e12

    def taken() -> float:
        return busy_seconds(device.spans(), "compute") / seconds

    assert run_walks(kernels, [(walk, operands, buffers[0])], kernels.chunk_elements) == [False]
    assert taken() == pytest.approx(4)
    (cut,) = sweep_statistic(kernels, OrderStatistic([[1], [1]]), operands, 1 << 40)
    assert taken() == pytest.approx(4 + 4 * 3) and cut.value.shape == (2, 1)
    sweep_statistic(kernels, OrderStatistic([[1], [1]]), operands, 1 << 28)
    sampled = sum(b - a for a, b in sampled_ranges(n)) / n
    assert 0.001 < sampled < 0.01
    before = 16 + 3 * (sampled + 1 + 1 / 4)  # a sample, everything, one piece of four
    assert taken() == pytest.approx(before)
    assert sweep_statistic(kernels, Moments("abs"), operands, 1 << 40).all.tolist() == [1, 1]
    assert sweep_statistic(kernels, Gram(delta=False), operands, 1 << 40).shape == (2, 2, 1)
    assert taken() == pytest.approx(before + 3 + 2)
    start = time.perf_counter()
    chunk = Chunk(buffers[0], buffers[1:], 0, n, n, DType.F32)
    finish = kernels.start_walks([(walk, chunk, buffers[0])] * 4)
    assert time.perf_counter() - start < 16 * seconds
    assert finish() == [False] * 4
    assert time.perf_counter() - start >= 16 * seconds
    device.close()
