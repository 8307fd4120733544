"""The pipeline of a merge on a simulated device, under ThreadSanitizer: as it is, and with a wait left out.

python tests/pipeline_races.py PART ...     what tests/test_pipeline.py runs, by simulation.run_watched
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import families
import numpy as np
import torch
from simulation import SimulatedDevice, native

from fastmerge import budget
from fastmerge.api import plan as make_plan
from fastmerge.backends import Buffer, Chunk, Kernels, Sweep
from fastmerge.engine import Engine
from fastmerge.stages import Cut, Statistic, Walk
from fastmerge.streaming import download, upload
from fastmerge.streaming.device import Stream
from fastmerge.streaming.ring import Reader, Ring
from fastmerge.verify import Scratch

SHAPES = {f"layers.{i}.weight": (160 + i, 300) for i in range(12)}


class Touching(Kernels):
    """Kernels that read all of their operands and write all of their results, where sanitizers see it."""

    name = "touching"

    def start_walks(self, jobs: Sequence[tuple[Walk, Chunk, Buffer]]) -> Callable[[], list[bool]]:
        for _, chunk, out in jobs:
            self.touch(chunk)
            native().fill(out.address, 1, out.n * out.dtype.itemsize)
        return lambda: [False] * len(jobs)

    def touch(self, chunk: Chunk) -> None:
        for buffer in [*chunk.experts, *([chunk.base] if chunk.base else [])]:
            native().checksum(buffer.address, buffer.n * buffer.dtype.itemsize)

    def sweep(self, statistic: Statistic, n: int, cols: int, k: int, compute: Any) -> Any:
        return _Touched(self, k)


class _Touched(Sweep):
    def __init__(self, kernels: Touching, k: int) -> None:
        self._kernels, self._k = kernels, k

    def feed(self, chunk: Chunk, offset: int = 0) -> None:
        self._kernels.touch(chunk)

    def next_pass(self) -> bool:
        return False

    def result(self) -> Any:
        cut = Cut(np.zeros((self._k, 1)), np.zeros((self._k, 1), np.int64))
        return [cut]


def merge(seed: int = 0) -> None:
    """Merge a small family by way of a device whose streams are late, in rings that are soon full."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        families.write_family(folder, SHAPES, torch.bfloat16)
        (folder / "ties.yaml").write_text(families.recipe("ties"))
        device = SimulatedDevice(2e9, 2e9, 1 << 28, jitter_seconds=1e-3, seed=seed)
        with (
            patch.object(budget, "DEVICE_ITEM_BYTES", 1 << 17),
            patch.object(budget, "BLOCK_BYTES", 1 << 18),
            patch.object(budget, "BLOCKS_IN", 3),
            patch.object(budget, "ITEM_TENSORS", 4),
        ):
            plan = make_plan(folder / "ties.yaml", device=device)
        assert plan.layout is not None
        out = Scratch(len(plan.layout.shards))
        threads = {True: 2, False: 4}
        Engine(
            plan, Touching(), out, device=device,
            disks=lambda writing: native().Transfers(writing, threads[writing]),
        ).run()  # fmt: skip
        out.close()
        device.close()


def sound() -> None:
    for seed in range(3):
        merge(seed)


class _Done:
    def wait(self) -> None:
        pass

    def is_done(self) -> bool:
        return True


def read_over_a_copy() -> None:
    """A race: pinned memory is read into while it is being copied out of."""

    def init(self: Reader, *args: Any, **options: Any) -> None:
        original(self, *args, **{**options, "fence": _Done})

    original = Reader.__init__
    with patch.object(Reader, "__init__", init):
        merge()


def kernels_before_operands() -> None:
    """A race: kernels read what is still being copied in."""

    def follow(self: SimulatedDevice, stream: Stream, event: Any) -> None:
        if stream is not Stream.COMPUTE:
            original(self, stream, event)

    original = SimulatedDevice.follow
    with patch.object(SimulatedDevice, "follow", follow):
        merge()


def copy_over_operands() -> None:
    """A race: a region is copied into although the kernels that read it are not known to be done."""

    def take(self: upload.DeviceIntake, size: int) -> int:
        while (at := self.ring.take(size)) is None:
            self.ring.give_back()
        return at

    with patch.object(upload.DeviceIntake, "_take", take):
        merge()


def results_over_results() -> None:
    """A race: memory of results is written to before they are copied out of it."""

    def reserve(self: download.Downloader, place: Any) -> int:
        return self.memory.address

    class Unused(Ring):  # the downloader's alone: others need theirs back
        def give_back(self) -> None:
            pass

    with (
        patch.object(download.Downloader, "reserve", reserve),
        patch.object(download, "Ring", Unused),
    ):
        merge()


SOUND: dict[str, Callable[[], None]] = {"sound": sound}
RACES: dict[str, Callable[[], None]] = {
    f.__name__: f
    for f in (read_over_a_copy, kernels_before_operands, copy_over_operands, results_over_results)
}


if __name__ == "__main__":
    torch.set_num_threads(1)  # TSan does not see what orders OpenMP's
    for part in sys.argv[1:]:
        (SOUND | RACES)[part]()
        print(f"{part}: done")
