"""A merge shared among processes: what one of them is given, what it does with it, who puts it together.

The coordinator owns the output folder, its journal and its commit. A worker is told everything in an
`Assignment`, plans again from the headers, writes its tensors into the shards that the coordinator created
and reports what is written. Where workers run is another module's: `processes`, `integrations.ray`.
"""

from __future__ import annotations

import heapq
import os
import socket
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from fastmerge import ops
from fastmerge.backends import Kernels
from fastmerge.budget import Target, target_of
from fastmerge.checkpoint import (
    OutputFolder,
    Part,
    PartialShards,
    RemoteJournal,
    difference,
)
from fastmerge.engine import Engine, Progress, Report
from fastmerge.errors import CheckpointError
from fastmerge.jobs import Action, Piece, TensorJob, stored_names
from fastmerge.planner import Plan, make_plan
from fastmerge.provenance import binding
from fastmerge.quant.quantize import Quantize
from fastmerge.recipe import Recipe
from fastmerge.registry import Scope
from fastmerge.stages import Copy, Walk
from fastmerge.streaming import gpus
from fastmerge.streaming.device import Device
from fastmerge.streaming.numa import bind, near_cpus
from fastmerge.streaming.sources import Io
from fastmerge.streaming.stopwatch import Stage
from fastmerge.streaming.trace import Span, Trace


@dataclass(frozen=True)
class Assignment:
    """All that a worker must know, in a form that travels.

    recipe:  with the folders in which the coordinator found the inputs and their adapters.
    bound:   what the coordinator's journal is bound to, and so must be what this worker merges.
    out:     the output folder, absolute. The `max_` ones: bytes that one worker may take.
    label:   the worker, in messages.
    names:   of the tensors to merge.
    walks:   of those whose statistics are known; proven: parts that are written already.
    statistics: find the walks of a method with statistics over the model, and merge nothing.
    flush:   wait until what is written is where other machines find it.
    origin:  what the coordinator's clock of spans reads at time 0 of the wall clock; None: no spans.
    driver:  of the devices, see `gpus.DRIVER`.
    """

    recipe: Recipe
    bound: Mapping[str, Any]
    out: Path
    max_memory: int
    label: str = ""
    names: tuple[str, ...] = ()
    device: str = "cpu"
    backend: str | None = None
    max_vram: int | None = None
    max_pinned: int | None = None
    strict: bool = False
    threads: int = 0
    io: Io = Io.AUTO
    chunk_elements: int | None = None
    walks: Mapping[str, Walk | Copy] = field(default_factory=dict)
    proven: Mapping[str, Sequence[Part]] = field(default_factory=dict)
    statistics: bool = False
    flush: bool = False
    origin: float | None = None
    driver: str = ""

    @property
    def options(self) -> Mapping[str, Any]:
        """The options that decide the output's bytes."""
        options: Mapping[str, Any] = self.bound["options"]
        return options


@dataclass(frozen=True)
class Wrote:
    """Parts (tensor, first byte, bytes, checksum) that are in their shards."""

    parts: list[tuple[str, int, int, int]]


@dataclass(frozen=True)
class Passed:
    """How many bytes of operands a worker is done with, the last ones of a tensor."""

    name: str
    n_bytes: int


@dataclass(frozen=True)
class Finished:
    """An assignment is done. walks: those that were asked for."""

    report: Report
    walks: Mapping[str, Walk | Copy] = field(default_factory=dict)


Event = Wrote | Passed | Finished


class Workers(AbstractContextManager[Any], Protocol):
    """Where assignments are carried out; entered before the first and left after the last.

    planned: what the merge is planned for; n_here: workers that share this machine's memory.
    """

    planned: str | Target
    n_here: int

    def adapt(self, assignment: Assignment) -> Assignment:
        """Return what all assignments have in common as these workers need it; its device is the first."""
        ...

    def deal(self, plan: Plan, left: Sequence[TensorJob]) -> list[tuple[str, str, list[str]]]:
        """Share tensors out: (label, device, names of tensors) of each assignment."""
        ...

    def run(
        self, assignments: Sequence[Assignment], memory: int
    ) -> Generator[tuple[int, Event], None, None]:
        """Carry assignments out and yield (which one, what happened); the last of each is `Finished`.

        memory: bytes that each takes on its host. Closing the iterator ends all that still run: none writes
        any more when that returns.
        Raises:
            MergeError, OSError: as the worker did. WorkerError: a worker is gone.
        """
        ...


# ---- in a worker -----------------------------------------------------------------------------------


def merge_assigned(assignment: Assignment, report: Callable[[Event], None]) -> Finished:
    """Carry out an assignment in this process; `report` is called as it goes on, from several threads."""
    from fastmerge import _cpu

    _check_visible(assignment)
    device = _open_device(assignment)
    kernels = ops.choose(device.name if device else "cpu", assignment.backend)
    _cpu.set_threads(assignment.threads)
    plan = _plan_again(assignment, kernels, device)
    assert plan.layout is not None
    places, names = plan.layout.places(), frozenset(assignment.names)
    with PartialShards(
        assignment.out,
        plan.layout,
        {places[s][0] for j in plan.jobs if j.name in names for s in stored_names(j)},
        RemoteJournal(assignment.proven, lambda parts: report(Wrote(parts))),
        direct=assignment.io is not Io.BUFFERED,
        flush=assignment.flush,
    ) as shards:
        engine = Engine(
            plan,
            kernels,
            shards,
            only=names,
            nan_policy=assignment.options["nan_policy"],
            strict=assignment.strict,
            io=assignment.io,
            chunk_elements=assignment.chunk_elements or kernels.chunk_elements,
            progress=lambda name, done, total: report(Passed(name, done)),
            device=device,
            walks=assignment.walks,
            trace=Trace(recording=assignment.origin is not None),
        )
        if assignment.statistics:
            walks = engine.model_walks()
            return Finished(engine.report, walks)
        done = engine.run()
    done.spans = _shifted(done.spans, assignment)
    return Finished(done)


def _check_visible(assignment: Assignment) -> None:
    """Raise CheckpointError if this machine does not have the folders that the coordinator has."""
    for what, folder in (
        *(("input", f) for f in assignment.recipe.found),
        *(("adapter", f) for f in assignment.recipe.adapters if f is not None),
        ("output", assignment.out),
    ):
        if not os.path.exists(folder):  # a GGUF file is an input, too
            raise CheckpointError(
                f"{what} {folder} is not there on {socket.gethostname()}; all workers must see the inputs "
                "and the output under the same paths"
            )


def _open_device(assignment: Assignment) -> Device | None:
    """Open the assignment's device, if it has one, with this process on the processors beside it."""
    if assignment.device == "cpu":
        return None
    driver = gpus.driver(assignment.driver)
    if driver.count() > gpus.index_of(assignment.device):  # else opening it says so
        address = driver.pci_address(gpus.index_of(assignment.device))
        if address:
            bind(near_cpus(address))
    return driver.open(assignment.device, assignment.origin is not None)


def _plan_again(assignment: Assignment, kernels: Kernels, device: Device | None) -> Plan:
    options = assignment.options
    plan = make_plan(
        assignment.recipe,
        out_shard_size=options["out_shard_size"],
        max_memory=assignment.max_memory,
        allow_missing=options["allow_missing"],
        strict=assignment.strict,
        seed=options["seed"],
        device=None if device is None else target_of(device, assignment.max_vram, kernels.name),
        max_pinned=assignment.max_pinned,
        quantize=Quantize.from_dict(options["quantize"]),
    )
    plan.raise_conflicts()
    here = binding(plan, options["nan_policy"], options["out_shard_size"])
    changed = difference(assignment.bound, here)
    if changed is not None:
        raise CheckpointError(
            f"on {socket.gethostname()} the merge {changed}; all workers must have the same fastmerge and "
            "see the same files"
        )
    return plan


def clock_origin() -> float:
    """Return what the clock of spans would read at time 0 of the wall clock: what machines have in common."""
    return time.perf_counter() - time.time()


def _shifted(spans: Sequence[Span], assignment: Assignment) -> list[Span]:
    """Return spans in the coordinator's time, in lanes of their own."""
    ahead = (assignment.origin or 0.0) - clock_origin()
    return [
        replace(s, lane=f"{assignment.label} {s.lane}", start=s.start + ahead, end=s.end + ahead)
        for s in spans
    ]


# ---- in the coordinator ----------------------------------------------------------------------------


def merge_shared(
    workers: Workers,
    plan: Plan,
    folder: OutputFolder,
    whole: Assignment,
    progress: Progress | None = None,
) -> Report:
    """Merge a plan into an output folder held here; `whole` is what all assignments have in common."""
    return _Shared(workers, plan, folder, whole, progress).run()


class _Shared:
    """One merge that is shared out: what is left, what is known, and what workers reported."""

    def __init__(
        self,
        workers: Workers,
        plan: Plan,
        folder: OutputFolder,
        whole: Assignment,
        progress: Progress | None,
    ) -> None:
        self.workers, self.plan, self.folder = workers, plan, folder
        self.whole = workers.adapt(whole)
        self.progress = progress
        self.jobs = {j.name: j for j in plan.jobs}
        self.passed = 0  # bytes of operands that nobody must read, or that finished runs have read
        self.reports: list[Report] = []
        self.walks: dict[str, Walk | Copy] = {}

    def run(self) -> Report:
        start = time.perf_counter()
        left = [j for j in self.plan.jobs if not self._is_done(j)]
        kept = sum(j.bytes_out for j in self.plan.jobs) - sum(j.bytes_out for j in left)
        self.passed = sum(j.bytes_in for j in self.plan.jobs) - sum(j.bytes_in for j in left)
        if any(j.action is Action.MERGE and j.scope is Scope.MODEL for j in left):
            self._run([replace(self.whole, label="statistics", statistics=True)])
        self._run([self._assignment(*share) for share in self.workers.deal(self.plan, left)])
        for checkpoint in self.plan.checkpoints:
            checkpoint.check_unchanged()
        return self._report(time.perf_counter() - start, kept)

    def _is_done(self, job: TensorJob) -> bool:
        journal = self.folder.journal
        # As in the engine: integers are compared again.
        if journal is None or job.action is Action.COPY_EQUAL or not job.n:
            return False
        needed = Piece(job, 0, job.n).needed
        return all(journal.covers(name, first, end - first) for name, first, end in needed)

    def _assignment(self, label: str, device: str, names: Sequence[str]) -> Assignment:
        journal = self.folder.journal
        stored = [name for n in names for name in stored_names(self.jobs[n])]
        proven = {n: journal.proven(n) for n in stored} if journal else {}
        return replace(
            self.whole,
            label=label,
            device=device,
            names=tuple(names),
            walks={n: self.walks[n] for n in names if n in self.walks},
            proven={n: parts for n, parts in proven.items() if parts},
        )

    def _run(self, assignments: list[Assignment]) -> None:
        done = [0] * len(assignments)
        with closing(self.workers.run(assignments, self.plan.peak_memory)) as events:
            for which, event in events:
                if isinstance(event, Wrote):
                    if self.whole.flush:
                        self._check_arrived(event.parts)
                    if self.folder.journal is not None:
                        self.folder.journal.add(event.parts)
                elif isinstance(event, Passed):
                    done[which] = event.n_bytes
                    if self.progress:
                        self.progress(event.name, self.passed + sum(done), self.plan.bytes_read)
                else:
                    self.reports.append(event.report)
                    self.walks.update(event.walks)
        self.passed += sum(done)

    def _check_arrived(self, parts: Sequence[tuple[str, int, int, int]]) -> None:
        """Raise CheckpointError if what a worker wrote is not here: it has another folder of that name."""
        part = min((p for p in parts if p[2]), key=lambda p: p[2], default=None)
        if part is not None and not self.folder.holds(*part):
            raise CheckpointError(
                f"what a worker wrote of {part[0]!r} is not in {self.folder.path} as seen from here; "
                "the output must be on storage that all machines share"
            )

    def _report(self, seconds: float, kept: int) -> Report:
        reports = self.reports
        found = [s for r in reports for s in r.stages]
        stages = [Stage("workers", seconds)]
        for name in dict.fromkeys(s.name for s in found):
            same = [s for s in found if s.name == name]
            stages.append(
                Stage(
                    name,
                    sum(s.seconds for s in same),
                    sum(s.n_bytes for s in same),
                    sum(max(1, s.threads) for s in same),
                )
            )
        return Report(
            n_tensors=len(self.plan.jobs),
            bytes_read=sum(r.bytes_read for r in reports),
            bytes_written=sum(r.bytes_written for r in reports),
            bytes_kept=kept + sum(r.bytes_kept for r in reports),
            seconds=seconds,
            backend=_listed(r.backend for r in reports),
            io=_listed(r.io for r in reports),
            stages=stages,
            spans=[s for r in reports for s in r.spans],
            residuals={name: of for r in reports for name, of in r.residuals.items()},
            warnings=list(dict.fromkeys(w for r in reports for w in r.warnings)),
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(filter(None, names)))


def deal_by_bytes(jobs: Sequence[TensorJob], n: int) -> list[list[str]]:
    """Share tensors out to n workers, the largest first and each to who has least, by bytes moved.

    No two shares differ by more than the largest tensor. Within a share the order is that of the jobs, so
    that files are read from front to back.
    """
    loads = [(0, i) for i in range(n)]
    owner: dict[str, int] = {}
    for job in sorted(jobs, key=lambda j: (-(j.bytes_in + j.bytes_out), j.name)):
        load, i = heapq.heappop(loads)
        owner[job.name] = i
        heapq.heappush(loads, (load + job.bytes_in + job.bytes_out, i))
    return [[j.name for j in jobs if owner[j.name] == i] for i in range(n)]


def deal_by_shard(plan: Plan, jobs: Sequence[TensorJob]) -> list[tuple[str, list[str]]]:
    """Share tensors out by the file they go to: (file name, names of tensors) of each that has any."""
    assert plan.layout is not None
    owner = {stored_names(job)[0]: job.name for job in jobs}
    shares = [
        (s.file_name, [owner[n] for n in s.tensors if n in owner]) for s in plan.layout.shards
    ]
    return [(file, names) for file, names in shares if names]


__all__ = [
    "Assignment",
    "Event",
    "Finished",
    "Passed",
    "Workers",
    "Wrote",
    "clock_origin",
    "deal_by_bytes",
    "deal_by_shard",
    "merge_assigned",
    "merge_shared",
]
