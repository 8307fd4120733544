"""Carry out a plan: read, statistics, fused walk, write, overlapped, in the memory the plan allows.

One tensor's way: its operands come into memory, the host's or a device's (`_sweep`), its recipe is run to a
walk (`_resolve_here`), the walk is run part by part (`_start`), and each part is written to its final offset
in its shard. Tensors too large for memory, and methods with statistics over the model, get their walk in
earlier sweeps over the same files.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import count
from typing import Any

from fastmerge import packed
from fastmerge.backends import CHUNK_ELEMENTS, Buffer, Chunk, Coded, Kernels, Residual
from fastmerge.backends.memory import copy_bytes, same_bytes
from fastmerge.budget import take_memory
from fastmerge.checkpoint import EMBEDDINGS, HEAD
from fastmerge.dtypes import DType
from fastmerge.errors import ConflictError, NonFiniteError
from fastmerge.evaluate import (
    JoinedRecipes,
    ModelTensor,
    Operands,
    Ranges,
    peak,
    refuse_unwritable,
    resolve,
    resolve_model,
    start_walks,
)
from fastmerge.jobs import (
    Action,
    Piece,
    TensorJob,
    WorkItem,
    results_of,
    split,
    together,
    work_items,
)
from fastmerge.planner import Plan
from fastmerge.registry import Scope
from fastmerge.results import Output, Results, is_done
from fastmerge.stages import Copy, Grain, Joined, Matrices, Statistic, Walk, grain
from fastmerge.streaming.device import Device, Memory
from fastmerge.streaming.ring import WRITING_THREADS, Run
from fastmerge.streaming.route import Disks, Route, Sizes, device_route, host_route
from fastmerge.streaming.sources import Io, Sources
from fastmerge.streaming.stopwatch import Stage, Stopwatch
from fastmerge.streaming.trace import Span, Trace, busy_seconds

#: Called with (tensor name, bytes done, bytes in all) as work proceeds; bytes are operands read.
Progress = Callable[[str, int, int], None]


@dataclass
class Report:
    """What a finished merge did. seconds is wall time of the engine; warnings are for the user.

    bytes_kept: of the output, found written by a killed run; resumed: whether there was such a run.
    io: how the inputs were read; stages: where the time went, see `stopwatch.table`; spans: what ran when, if
    that was to be recorded. residuals: what coding cost each tensor that this run coded all of. joined: what
    the tensors of a method that joins them told each other. flops: of decompositions, as planned.
    """

    n_tensors: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    bytes_kept: int = 0
    resumed: bool = False
    seconds: float = 0.0
    backend: str = ""
    io: str = ""
    stages: list[Stage] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    residuals: dict[str, Residual] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    joined: Mapping[str, Any] | None = None
    flops: float = 0.0


@dataclass(frozen=True)
class _Part:
    """What is run by one walk and written in one go."""

    piece: Piece
    walk: Walk | Copy
    operands: Operands


class Engine:
    """One run of one plan.

    only:   names of the tensors to merge; default: all. What the output's journal proves is left out.
    device: where the kernels run, planned for; default: the host.
    walks:  of tensors whose statistics are known.
    disks:  called with whether it writes, makes what moves bytes; default: threads of csrc/io.
    """

    def __init__(
        self,
        plan: Plan,
        kernels: Kernels,
        out: Output,
        *,
        only: Collection[str] | None = None,
        nan_policy: str = "error",
        strict: bool = False,
        io: Io = Io.AUTO,
        chunk_elements: int = CHUNK_ELEMENTS,
        progress: Progress | None = None,
        on_flops: Callable[[float], None] | None = None,
        device: Device | None = None,
        walks: Mapping[str, Walk | Copy] | None = None,
        disks: Disks | None = None,
        trace: Trace | None = None,
    ) -> None:
        self.plan, self.kernels, self.out = plan, kernels, out
        self.jobs = [j for j in plan.jobs if only is None or j.name in only]
        self.nan_policy, self.strict, self.io = nan_policy, strict, io
        self.chunk_elements = chunk_elements
        self.progress, self.on_flops = progress, on_flops
        self.report = Report(backend=kernels.name)
        self.trace = trace or Trace(recording=False)
        self.watch = Stopwatch(self.trace)
        self.walks: dict[str, Walk | Copy] = dict(walks or {})
        self.recipes: JoinedRecipes | None = None
        self.device, self._disks = device, disks
        self.peaks: dict[str, float] = {}  # largest magnitudes, of tensors that are coded by them
        self._passed = 0  # bytes that need no reading
        self._begun: set[str] = set()  # tensors parts of which were written before
        self.places = plan.layout.places() if plan.layout else {}

    def run(self) -> Report:
        """Merge everything into the output folder's files (not yet committed).

        Raises:
            BackendError: the kernels cannot write a format of the plan; nothing was read.
        """
        refuse_unwritable(self.kernels, {j.stored.coding: j for j in self.jobs if j.stored})
        with self._working():
            self._merge_all()
        for checkpoint in self.plan.checkpoints:
            checkpoint.check_unchanged()
        if self.plan.storage and self.plan.storage.hessians:
            self.plan.storage.hessians.identity.check_unchanged()
        for name in self._begun:  # what coding cost those parts is not known any more
            self.report.residuals.pop(name, None)
        self.report.n_tensors = len(self.jobs)
        return self.report

    def model_walks(self) -> dict[str, Walk | Copy]:
        """Return the walks of the tensors whose statistics are over the model, without merging any."""
        with self._working():
            self._resolve_model()
        return self.walks

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Hold memory and threads; report what was done with them."""
        self._started = time.perf_counter()
        route = self._open()
        self.reader, self.writer = route.reader, route.writer
        self.results = Results(self.out, self.places, self.writer, self.report.residuals)
        self.report.warnings += route.warnings
        try:
            with self.device.computing() if self.device else nullcontext():
                yield
        finally:
            route.close()
        self.report.seconds = time.perf_counter() - self._started
        self.report.bytes_written = self.results.n_written
        self.report.io = self.reader.sources.io.value
        self.report.stages = self._stages()
        self.report.spans = [*self.trace.spans, *self._device_spans()]

    def _open(self) -> Route:
        """Take the memory and start the threads that `plan` asks for."""
        plan, device, budget = self.plan, self.device, self.plan.device
        files = {o.info.file for j in plan.jobs for o in j.operands}
        sources = Sources(sorted(files), self.io, may_map=device is None)
        if device is None or budget is None:
            return host_route(
                sources, plan.operand_bytes, plan.result_bytes, disks=self._disks, trace=self.trace
            )
        sizes = Sizes(
            budget.pinned_in,
            budget.pinned_out,
            budget.block,
            partial(take_memory, self.plan, device, self.report.warnings),
        )
        return device_route(sources, device, sizes, io=self.io, disks=self._disks, trace=self.trace)

    def _device_spans(self) -> list[Span]:
        """Return what the device did in this run; it may have had others."""
        spans = self.device.spans() if self.device else []
        return [s for s in spans if s.start >= self._started]

    def _stages(self) -> list[Stage]:
        report, reader, writer = self.report, self.reader, self.writer
        seconds = {
            "waiting for input": reader.waited,
            "statistics": 0.0,
            "walk": 0.0,
            **self.watch.seconds,
            "waiting for output": writer.waited,
        }
        stages = [
            *(Stage(name, s) for name, s in seconds.items()),
            Stage("rest", report.seconds - sum(seconds.values())),
            Stage("reading", reader.busy_seconds, report.bytes_read, reader.n_threads),
            Stage("writing", writer.busy_seconds, report.bytes_written, WRITING_THREADS),
        ]
        spans = self._device_spans()
        for lane in dict.fromkeys(s.lane for s in spans):
            moved = sum(s.n_bytes for s in spans if s.lane == lane)
            stages.append(Stage(lane, busy_seconds(spans, lane), moved, 1))
        return stages

    def _merge_all(self) -> None:
        jobs = self.jobs
        over_model = [j for j in jobs if self._scope(j) is Scope.MODEL]
        if any(j.name not in self.walks and self._left(j) for j in over_model):
            self._resolve_model()
        if any(self.plan.joins(job) for job in jobs):
            self._join()
        self._find_peaks()
        self.results.write_constants(self.jobs)
        items = work_items(jobs, self.plan.streamed, self.plan.item_bytes)
        for item, operands in self._sweep(self._skipping(items)):
            self._merge(item, operands)
        if self.plan.streamed:
            self.reader.resize(self.plan.stream_bytes)
        for job in jobs:
            if job.name in self.plan.streamed and self._left(job):
                self._merge_streamed(job)
        self.writer.drain()

    @staticmethod
    def _scope(job: TensorJob) -> Scope | None:
        return job.scope if job.action is Action.MERGE else None

    # ---- what is left to do ------------------------------------------------------------------------

    def _left(self, job: TensorJob) -> bool:
        return not self._is_done(Piece(job, 0, job.n))

    def _is_done(self, piece: Piece) -> bool:
        return is_done(self.out, piece)

    def _skipping(self, items: Iterable[WorkItem]) -> list[WorkItem]:
        """Return what is left of the items; a list, for another thread may go through it."""
        left = []
        for item in items:
            pieces = tuple(p for p in item.pieces if not self._is_done(p))
            skipped = [p for p in item.pieces if self._is_done(p)]
            self.report.bytes_kept += sum(p.bytes_out for p in skipped)
            self._passed += sum(p.bytes_in for p in skipped)
            self._begun.update(p.job.name for p in skipped)
            if pieces:
                left.append(WorkItem(pieces))
        return left

    # ---- reading -----------------------------------------------------------------------------------

    def _sweep(self, items: Iterable[WorkItem]) -> Iterator[tuple[WorkItem, list[Operands]]]:
        """Yield the items, each with its pieces' operands in memory."""
        for item, addresses in self.reader.sweep((item, _runs(item)) for item in items):
            yield item, list(_operands(item, addresses, self.reader.memory))
            self.report.bytes_read += sum(p.bytes_in for p in item.pieces)
            if self.progress:
                name = item.pieces[-1].job.name
                self.progress(name, self.report.bytes_read + self._passed, self.plan.bytes_read)

    def _sweep_ranges(
        self, wanted: Iterable[tuple[TensorJob, Ranges]]
    ) -> Iterator[tuple[Piece, Operands]]:
        """Yield pieces of some jobs with their operands: of given ranges, or of all of a job."""
        items: list[WorkItem] = []
        within: deque[list[tuple[int, int]]] = deque()  # what was asked for of each piece
        for job, ranges in wanted:
            if ranges is None:
                pieces = list(split(job, self.plan.item_bytes))
                items += (WorkItem((p,)) for p in pieces)
                within += ([(p.start, p.start + p.n)] for p in pieces)
                continue
            pieces = []
            for a, b in ranges:
                for piece in split(job, self.plan.item_bytes, a, b):
                    if not pieces or pieces[-1].start != piece.start or pieces[-1].n != piece.n:
                        pieces.append(piece)
                        within.append([])
                    end = min(b, piece.start + piece.n)
                    within[-1].append((max(a, piece.start), end))
            items += together(pieces, self.plan.item_bytes)
        for item, operands in self._sweep(items):
            for piece, held in zip(item.pieces, operands, strict=True):
                for a, b in within.popleft():
                    part = Piece(piece.job, a, b - a)
                    yield part, held.slice(a - piece.start, b - piece.start)

    # ---- merging -----------------------------------------------------------------------------------

    def _merge(self, item: WorkItem, operands: Sequence[Operands]) -> None:
        """Merge what is in memory of some jobs: all of each, or the piece its walk is known for."""
        most = self.plan.item_bytes if self.device else 0  # the host gains nothing by batches
        batch: list[_Part] = []
        size = 0
        for piece, held in zip(item.pieces, operands, strict=True):
            job = piece.job
            walk, held = self._walk_of(job, held)
            if piece.n < job.n:
                self.walks[job.name] = walk
            if job.needs_peak and job.name not in self.peaks:  # alone, and all of it is here
                self._find_peak(job, walk, held)
            # A piece of a tensor is cut as its results are; only a whole one has several.
            whole = piece.n == job.n
            for part in results_of(job, self.plan.item_bytes) if whole else (piece,):
                if self._keeps(part):
                    continue
                if batch and size + part.bytes_in > most:
                    self._start(batch)
                    batch, size = [], 0
                first = part.start - piece.start
                batch.append(_Part(part, walk, held.slice(first, first + part.n)))
                size += part.bytes_in
        if batch:
            self._start(batch)

    def _walk_of(self, job: TensorJob, operands: Operands) -> tuple[Walk | Copy, Operands]:
        """Return a job's walk and what it is to be run over."""
        if job.action is Action.COPY_EQUAL:
            self._compare(job, operands)
        elif job.action is Action.MERGE:
            known = self.walks.get(job.name)
            return (known, operands) if known else self._resolve_here(job, operands)
        return Copy(0), operands

    def _keeps(self, part: Piece) -> bool:
        """Return whether a part of a tensor whose other parts are left is written already."""
        if part.n < part.job.n and not self.results.holds(part.job.name) and self._is_done(part):
            self.report.bytes_kept += part.bytes_out
            self._begun.add(part.job.name)
            return True
        return False

    def _start(self, batch: Sequence[_Part]) -> None:
        """Run the walks of some parts, in one go where a device does, and queue the results."""
        results, walks = [], []
        for part in batch:
            result = self.results.take(part.piece, self.peaks.get(part.piece.job.name, 0.0))
            results.append(result)
            if part.piece.job.action is not Action.COPY_EQUAL:
                # Now: the next part may be of the same tensor, and move its result on.
                walks.append((part.walk, part.operands, result.buffer))
        with self.watch.time("walk"):
            bad = _each(start_walks(self.kernels, walks, self.chunk_elements))
            for part, result in zip(batch, results, strict=True):
                if part.piece.job.action is Action.COPY_EQUAL:
                    copy_bytes(_plain(result.buffer), _plain(part.operands.experts[0]))
        self.reader.sources.check()
        for part, result in zip(batch, results, strict=True):
            check = None
            if part.piece.job.action is not Action.COPY_EQUAL and self.nan_policy == "error":
                check = partial(_refuse, part.piece, next(bad))
            self.results.merged(part.piece, result, check)

    def _join(self) -> None:
        """Run the recipes of all tensors to where they wait for each other."""
        spare = 0 if self.device else max(0, self.plan.max_memory - self.plan.peak_memory)
        recipes = JoinedRecipes(self.kernels, self.plan.spec, self.chunk_elements, spare)
        jobs = [j for j in self.plan.jobs if self.plan.joins(j)]
        for item, operands in self._sweep(work_items(jobs, frozenset(), self.plan.item_bytes)):
            for piece, held in zip(item.pieces, operands, strict=True):
                assert piece.n == piece.job.n and piece.job.params is not None
                context = piece.job.context(self.plan.seed, self.plan.n_model)
                with self.watch.time("matrices"):
                    recipes.begin(piece.job.params, context, held)
                self._count_flops(piece.job)
        recipes.join()
        self.recipes, self.report.joined = recipes, recipes.answer

    def _resolve_here(self, job: TensorJob, operands: Operands) -> tuple[Walk | Copy, Operands]:
        assert job.params is not None
        context = job.context(self.plan.seed, self.plan.n_model)
        with self.watch.time("matrices" if job.scope is Scope.MATRIX else "statistics"):
            if self.recipes and self.plan.joins(job):
                return self.recipes.end(job.params, context, operands)
            found = resolve(
                self.kernels, self.plan.spec, job.params, context, operands, self.chunk_elements
            )
        self._count_flops(job)
        return found

    def _count_flops(self, job: TensorJob) -> None:
        self.report.flops += self.plan.cost(job).flops
        if self.on_flops and job.scope is Scope.MATRIX:
            self.on_flops(self.report.flops)

    def _compare(self, job: TensorJob, operands: Operands) -> None:
        for operand, buffer in zip(job.experts[1:], operands.experts[1:], strict=True):
            if not same_bytes(_plain(operands.experts[0]), _plain(buffer)):
                text = (
                    f"{job.name!r} ({job.out_dtype.torch}) differs between {job.experts[0].model!r} and "
                    f"{operand.model!r}; {job.experts[0].model!r}'s is taken"
                )
                if self.strict:
                    raise ConflictError(text + ", which --strict refuses")
                if text not in self.report.warnings:
                    self.report.warnings.append(text)

    # ---- statistics that need sweeps of their own ----------------------------------------------------

    def _resolve_model(self) -> None:
        """Give every job of a model-scope method its walk, by sweeps over the whole model."""
        jobs = [j for j in self.plan.jobs if self._scope(j) is Scope.MODEL]
        jobs.sort(key=lambda j: j.name)
        widths = {len(j.experts) for j in jobs}
        if len(widths) > 1:
            raise ConflictError(
                f"{self.plan.spec.name} over the whole model needs every tensor in every input; "
                "choose scope: tensor or complete the inputs"
            )
        compute = DType.F64 if any(j.compute is DType.F64 for j in jobs) else DType.F32
        tensors = []
        for job in jobs:
            assert job.params is not None
            context = job.context(self.plan.seed, self.plan.n_model)
            tensors.append(ModelTensor(job.params, context, job.cols, compute))
        index = {job.name: t for t, job in enumerate(jobs)}

        def visit(
            feed: Callable[[int, Chunk], None], wanted: Mapping[int, Ranges], size: Grain
        ) -> None:
            for piece, operands in self._sweep_ranges((jobs[t], wanted[t]) for t in sorted(wanted)):
                for _, chunk in operands.chunks(size, self.chunk_elements):
                    with self.watch.time("statistics"):
                        feed(index[piece.job.name], chunk)

        walks = resolve_model(self.kernels, self.plan.spec, tensors, visit)
        self.walks.update({job.name: walk for job, walk in zip(jobs, walks, strict=True)})

    def _merge_streamed(self, job: TensorJob) -> None:
        """Merge a tensor too large for the ring: one sweep per statistic pass, then one for the walk."""
        if job.name not in self.walks:
            self._resolve_streamed(job)
        items = self._skipping(WorkItem((p,)) for p in split(job, self.plan.item_bytes))
        for item, operands in self._sweep(items):
            self._merge(item, operands)

    def _resolve_streamed(self, job: TensorJob) -> None:
        assert job.params is not None
        recipe = self.plan.spec.recipe(job.params, job.context(self.plan.seed, self.plan.n_model))
        answer = None
        while True:
            try:
                request = recipe.send(answer)
            except StopIteration as stop:
                self.walks[job.name] = stop.value
                break
            assert not isinstance(request, Matrices | Joined)  # such tensors are never streamed
            answer = self._stream_statistic(job, request)

    def _stream_statistic(self, job: TensorJob, request: Statistic) -> object:
        sweep = self.kernels.sweep(request, job.n, job.cols, len(job.experts), job.compute)
        while True:
            for _, operands in self._sweep_ranges([(job, sweep.wanted())]):
                delta = getattr(request, "delta", True)
                for _, chunk in operands.chunks(grain(request), self.chunk_elements, delta):
                    with self.watch.time("statistics"):
                        sweep.feed(chunk)
            if not sweep.next_pass():
                return sweep.result()

    # ---- formats that start from the whole tensor's largest magnitude ---------------------------------

    def _find_peaks(self) -> None:
        """Find, by a sweep of their own, the peaks of tensors that share a scale or are not held whole."""
        groups = {
            j.stored.scale_group: j.name
            for j in self.jobs
            if j.stored and j.needs_peak and j.stored.scale_group and self._left(j)
        }
        here = {j.name for j in self.jobs if j.needs_peak and self._left(j)}
        wanted = [
            j
            for j in self.plan.jobs
            if j.stored
            and self.plan.finds_peak_apart(j)
            and (j.stored.scale_group in groups or j.name in here)
        ]
        streamed = [j for j in wanted if j.name in self.plan.streamed]
        for item, operands in self._sweep(
            work_items(wanted, self.plan.streamed, self.plan.item_bytes)
        ):
            for piece, held in zip(item.pieces, operands, strict=True):
                walk, over = self._walk_of(piece.job, held)
                if piece.job.scope is not Scope.MATRIX:  # what was computed is not kept
                    self.walks[piece.job.name] = walk
                self._find_peak(piece.job, walk, over)
        for job in streamed:
            if job.name not in self.walks:
                self._resolve_streamed(job)
            for _, held in self._sweep_ranges([(job, None)]):
                self._find_peak(job, self.walks[job.name], held)
        shared: dict[str, float] = {}
        for job in wanted:
            group = job.stored.scale_group if job.stored else None
            if group:
                shared[group] = max(shared.get(group, 0.0), self.peaks[job.name])
        for job in wanted:
            group = job.stored.scale_group if job.stored else None
            if group:
                self.peaks[job.name] = shared[group]

    def _find_peak(self, job: TensorJob, walk: Walk | Copy, held: Operands) -> None:
        assert job.stored is not None
        with self.watch.time("statistics"):
            bad, high = peak(self.kernels, walk, held, job.stored.coding.dtype, self.chunk_elements)
        if bad:
            refuse_nonfinite(Piece(job, held.start, held.n))
        self.peaks[job.name] = max(self.peaks.get(job.name, 0.0), high)


def _runs(item: WorkItem) -> list[Run]:
    """Return the runs of bytes that hold an item's operands, piece by piece."""
    return [(s.info.file, s.info.offset + s.first, s.n) for p in item.pieces for s in p.spans]


def _operands(item: WorkItem, addresses: Sequence[int], memory: Memory) -> Iterator[Operands]:
    """Yield each piece's operands; addresses in the memory are in the order of `_runs`."""
    at = iter(addresses)
    for piece in item.pieces:
        job = piece.job
        buffers = [packed.operand_of(o, piece, memory, at) for o in job.operands]
        base = buffers.pop(0) if job.base else None
        yield Operands(base, buffers, job.cols, job.compute, piece.start)


def _plain(buffer: Buffer | Coded) -> Buffer:
    assert isinstance(buffer, Buffer)  # integers are never coded
    return buffer


def _each(found: Callable[[], list[bool]]) -> Iterator[Callable[[], bool]]:
    """Yield, for each walk of a batch, what tells whether it met NaN or infinity: the first asked waits."""
    known = cache(found)
    for i in count():
        yield partial(_at, known, i)


def _at(known: Callable[[], list[bool]], i: int) -> bool:
    return known()[i]


def _refuse(part: Piece, is_bad: Callable[[], bool]) -> None:
    if is_bad():
        refuse_nonfinite(part)


def refuse_nonfinite(part: Piece) -> None:
    """Raise NonFiniteError for the first NaN or infinity in a part's operands, read from their files again:
    by the time a device tells, its memory holds others."""
    for operand in part.job.operands:
        index = packed.first_nonfinite_of(operand, part)
        if index is not None:
            raise NonFiniteError(
                f"{part.job.name!r} of {operand.model!r} holds NaN or infinity at flat index "
                f"{index}; mend the checkpoint or give --nan-policy propagate"
            )
    if part.job.stored is not None:
        raise NonFiniteError(
            f"{part.job.name!r} as merged holds values that {part.job.stored.coding.dtype.torch} cannot; "
            "merge with smaller weights, or keep it dense with --keep"
        )


def head_differs(plan: Plan, out: Output) -> bool:
    """Return whether the written output head differs from the written embedding it may be tied to."""
    places = plan.layout.places() if plan.layout else {}
    embedding = next((e for e in EMBEDDINGS if e in places), None)
    if HEAD not in places or embedding is None:
        return False
    (a_shard, a), (b_shard, b) = places[HEAD], places[embedding]
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return True
    step = 8 << 20
    for at in range(0, a.n_bytes, step):
        n = min(step, a.n_bytes - at)
        if os.pread(out.fd(a_shard), n, a.offset + at) != os.pread(
            out.fd(b_shard), n, b.offset + at
        ):
            return True
    return False
