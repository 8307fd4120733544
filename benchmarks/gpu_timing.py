"""Time what runs on a GPU: caches flushed, sets of operands in turn, medians, host planning left out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gpu_device import Host, Meter

WARM_UP = 3
LEAST_RUNS, MOST_RUNS = 10, 40
#: Seconds that the repetitions of one row may take before they are no more than LEAST_RUNS.
ROW_SECONDS = 0.4

#: Does one repetition on the set of operands of this number.
Run = Callable[[int], Any]


@dataclass(frozen=True)
class Spread:
    """Seconds of the repetitions of one thing."""

    median: float
    p20: float
    p80: float
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return cls(
            statistics.median(ordered),
            ordered[round(0.2 * last)],
            ordered[round(0.8 * last)],
            len(ordered),
        )

    def as_dict(self, name: str) -> dict[str, Any]:
        """Return the fields of a row: `name`_s and its percentiles."""
        return {
            f"{name}_s": self.median,
            f"{name}_p20_s": self.p20,
            f"{name}_p80_s": self.p80,
            "runs": self.runs,
        }


@dataclass(frozen=True)
class Timed:
    """Time on the stream: in the launches alone where the meter sees them. launches: medians by name."""

    kernel: Spread
    launches: dict[str, float]


class Timer:
    """Times repetitions on one device."""

    def __init__(self, device: Host, n_sets: int, quick: bool = False) -> None:
        self.device, self.n_sets = device, n_sets
        self._most = LEAST_RUNS if quick else MOST_RUNS

    def time(self, run: Run, meter: Meter | None = None, row_seconds: float = ROW_SECONDS) -> Timed:
        """Time `run` on the stream. Where no meter sees launches, it is the whole call, queued behind a busy
        stream so that the host's own time mostly stays out."""
        device = self.device
        for i in range(WARM_UP):
            if meter:
                meter.start()
            run(i % self.n_sets)
        device.synchronise()
        sees = bool(meter and meter.launches)
        seconds: list[float] = []
        parts: dict[str, list[float]] = {}
        while self._wants_more(seconds, row_seconds):
            device.flush()
            device.synchronise()
            if meter:
                meter.start()
            if not sees:
                device.hold()
            first = device.stamp()
            run(len(seconds) % self.n_sets)
            last = device.stamp()
            device.synchronise()
            launches = meter.by_name() if meter else {}
            for name, each in launches.items():
                parts.setdefault(name, []).append(each)
            seconds.append(sum(launches.values()) if sees else device.seconds(first, last))
        if meter:
            meter.stop()
        return Timed(Spread.of(seconds), {name: statistics.median(s) for name, s in parts.items()})

    def _wants_more(self, seconds: Sequence[float], row_seconds: float) -> bool:
        few = len(seconds) < LEAST_RUNS
        return few or (len(seconds) < self._most and sum(seconds) < row_seconds)

    def wall(self, run: Run, row_seconds: float = ROW_SECONDS) -> Spread:
        """Time from the call until the device is done, nothing metered or held: what a user waits."""
        device = self.device
        for i in range(WARM_UP):
            run(i % self.n_sets)
        seconds: list[float] = []
        while self._wants_more(seconds, row_seconds):
            device.flush()
            device.synchronise()
            started = time.perf_counter()
            run(len(seconds) % self.n_sets)
            device.synchronise()
            seconds.append(time.perf_counter() - started)
        return Spread.of(seconds)


def copy_bandwidth(timer: Timer, n_bytes: int) -> tuple[float, Spread]:
    """Return bytes per second, read and written, of torch's copy of large buffers, and its seconds."""
    where = timer.device.where
    sources = [torch.empty(n_bytes, dtype=torch.uint8, device=where) for _ in range(timer.n_sets)]
    for i, source in enumerate(sources):
        source.random_(generator=timer.device.generator(i))
    target = torch.empty_like(sources[0])
    spread = timer.time(lambda i: target.copy_(sources[i])).kernel
    return 2 * n_bytes / spread.median, spread
