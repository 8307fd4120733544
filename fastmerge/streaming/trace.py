"""What ran when: spans of threads and streams, as a Chrome trace (chrome://tracing, ui.perfetto.dev)."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Span:
    """Something that ran in a lane (a thread, a stream) from start to end, in seconds of `perf_counter`."""

    lane: str
    name: str
    start: float
    end: float
    n_bytes: int = 0


class Trace:
    """Spans of a run; recording one costs a microsecond. Threads may share it."""

    def __init__(self, recording: bool = True) -> None:
        self.recording = recording
        self.spans: list[Span] = []
        self._lock = threading.Lock()

    def add(self, span: Span) -> None:
        if self.recording:
            with self._lock:
                self.spans.append(span)


class Lane:
    """Requests served in order, several at a time: each one's span begins where the last one's ended."""

    def __init__(self, trace: Trace | None, name: str) -> None:
        self._trace, self._name = trace, name
        self._end = float("-inf")

    def moved(self, started: float, n_bytes: int) -> None:
        """Record that a request made at `started` is done, as far as anyone has noticed."""
        now = time.perf_counter()
        if self._trace is not None:
            self._trace.add(Span(self._name, self._name, max(started, self._end), now, n_bytes))
        self._end = now


def busy_seconds(spans: Iterable[Span], lane: str) -> float:
    """Return how long a lane had something to do: overlapping spans count once."""
    total, end = 0.0, float("-inf")
    for span in sorted((s for s in spans if s.lane == lane), key=lambda s: s.start):
        total += max(0.0, span.end - max(span.start, end))
        end = max(end, span.end)
    return total


def write_chrome_trace(path: Path, spans: Iterable[Span]) -> None:
    """Write spans in the Trace Event Format: complete events, microseconds, a thread per lane."""
    spans = sorted(spans, key=lambda s: s.start)
    origin = spans[0].start if spans else 0.0
    lanes = {lane: i for i, lane in enumerate(dict.fromkeys(s.lane for s in spans))}
    events: list[dict[str, object]] = [
        {"ph": "M", "pid": 0, "tid": i, "name": "thread_name", "args": {"name": lane}}
        for lane, i in lanes.items()
    ]
    for span in spans:
        event: dict[str, object] = {
            "ph": "X",
            "pid": 0,
            "tid": lanes[span.lane],
            "name": span.name,
            "ts": round((span.start - origin) * 1e6, 3),
            "dur": round((span.end - span.start) * 1e6, 3),
        }
        if span.n_bytes:
            event["args"] = {"bytes": span.n_bytes}
        events.append(event)
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
