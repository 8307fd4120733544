"""Where a merge's time goes: seconds by stage, of the thread that merges and of those that move bytes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fastmerge.streaming.trace import Span, Trace


@dataclass
class Stage:
    """Seconds spent in one part of a merge; n_bytes that it moved.

    threads: how many worked on it beside the merging thread, their seconds added up; 0: that thread itself,
    whose stages add up to the merge's time.
    """

    name: str
    seconds: float = 0.0
    n_bytes: int = 0
    threads: int = 0


class Stopwatch:
    """Seconds by name. Stages do not nest: an inner one's seconds would count twice."""

    def __init__(self, trace: Trace | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._trace = trace or Trace(recording=False)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            self.add(name, end - start)
            self._trace.add(Span("merging", name, start, end))

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def table(stages: list[Stage]) -> str:
    """Return the stages as text: one a line, those of other threads below a rule."""
    own = [s for s in stages if not s.threads]
    total = sum(s.seconds for s in own)
    lines = [f"{'stage':<26}{'seconds':>9}{'share':>7}{'GB':>9}{'GB/s':>8}"]
    for stage in own:
        share = stage.seconds / total if total else 0.0
        lines.append(f"{stage.name:<26}{stage.seconds:>9.3f}{share:>7.0%}{_moved(stage)}".rstrip())
    lines.append(f"{'all':<26}{total:>9.3f}")
    lines.append("at the same time")
    for stage in stages:
        if stage.threads:
            name = f"{stage.name}, {stage.threads} thread{'s' if stage.threads > 1 else ''}"
            lines.append(f"{name:<26}{stage.seconds:>9.3f}{'':>7}{_moved(stage)}".rstrip())
    return "\n".join(lines)


def _moved(stage: Stage) -> str:
    if not stage.n_bytes:
        return ""
    seconds = stage.seconds / max(
        1, stage.threads
    )  # of wall time, if all its threads were busy at once
    rate = f"{stage.n_bytes / seconds / 1e9:>8.1f}" if seconds else ""
    return f"{stage.n_bytes / 1e9:>9.3f}{rate}"
