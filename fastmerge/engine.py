"""Carry out a plan: read, statistics, fused walk, write, overlapped, in the memory the plan allows.

One tensor's way: its operands come into memory (`_sweep`), its recipe is run to a walk (`_resolve_here`),
the walk is run part by part (`_merge_part`), and each part is written to its final offset in its shard.
Tensors too large for memory, and methods with statistics over the model, get their walk in earlier sweeps
over the same files.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fastmerge.backends import CHUNK_ELEMENTS, Buffer, Chunk, Kernels
from fastmerge.checkpoint import Journal, word_bytes
from fastmerge.dtypes import DType
from fastmerge.errors import ConflictError, NonFiniteError
from fastmerge.evaluate import (
    ModelTensor,
    Operands,
    bytes_of,
    first_nonfinite,
    resolve,
    resolve_model,
    run_walk,
)
from fastmerge.planner import (
    EMBEDDINGS,
    HEAD,
    Action,
    Piece,
    Plan,
    TensorJob,
    WorkItem,
    results_of,
    split,
    work_items,
)
from fastmerge.registry import Scope
from fastmerge.streaming.ring import WRITING_THREADS, Place, Reader, Run, Writer
from fastmerge.streaming.sources import Io, Sources
from fastmerge.stages import Copy, Grain, Statistic, Walk, grain
from fastmerge.streaming.stopwatch import Stage, Stopwatch

#: Called with (tensor name, bytes done, bytes in all) as work proceeds; bytes are operands read.
Progress = Callable[[str, int, int], None]


@dataclass
class Report:
    """What a finished merge did. seconds is wall time of the engine; warnings are for the user.

    bytes_kept: of the output, found written by a killed run; resumed: whether there was such a run.
    io: how the inputs were read; stages: where the time went, see `stopwatch.table`.
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
    warnings: list[str] = field(default_factory=list)


class Output(Protocol):
    """Where results go: a descriptor per shard and, where kept, the journal of what is written."""

    journal: Journal | None

    def fd(self, shard: int) -> int: ...

    def direct_fd(self, shard: int) -> int: ...


class Engine:
    """One run of one plan. only: names of the tensors to merge; default: those that no journal proves."""

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
    ) -> None:
        self.plan, self.kernels, self.out = plan, kernels, out
        self.only = only
        self.nan_policy, self.strict, self.io = nan_policy, strict, io
        self.chunk_elements = chunk_elements
        self.progress = progress
        self.report = Report(backend=kernels.name)
        self.watch = Stopwatch()
        self.walks: dict[str, Walk | Copy] = {}
        self._passed = 0  # bytes that need no reading
        self.places = plan.layout.places() if plan.layout else {}

    def run(self) -> Report:
        """Merge everything into the output folder's files (not yet committed)."""
        start = time.perf_counter()
        files = {o.info.file for j in self.plan.jobs for o in j.operands}
        self.reader = Reader(Sources(sorted(files), self.io), self.plan.operand_bytes)
        self.writer = Writer(self.plan.result_bytes)
        try:
            self._merge_all()
        finally:
            self.reader.close()
            self.writer.close()
        for checkpoint in self.plan.checkpoints:
            checkpoint.check_unchanged()
        self.report.n_tensors = len(self.plan.jobs)
        self.report.seconds = time.perf_counter() - start
        self.report.io = self.reader.sources.io.value
        self.report.stages = self._stages()
        return self.report

    def _stages(self) -> list[Stage]:
        report, reader, writer = self.report, self.reader, self.writer
        seconds = {
            "waiting for input": reader.waited,
            "statistics": 0.0,
            "walk": 0.0,
            **self.watch.seconds,
            "waiting for output": writer.waited,
        }
        return [
            *(Stage(name, s) for name, s in seconds.items()),
            Stage("rest", report.seconds - sum(seconds.values())),
            Stage("reading", reader.busy_seconds, report.bytes_read, reader.n_threads),
            Stage("writing", writer.busy_seconds, report.bytes_written, WRITING_THREADS),
        ]

    def _merge_all(self) -> None:
        jobs = self.plan.jobs
        over_model = [j for j in jobs if self._scope(j) is Scope.MODEL]
        if any(self._left(j) for j in over_model):
            self._resolve_model(over_model)
        for item, operands in self._sweep(self._skipping(work_items(self.plan, jobs))):
            for piece, held in zip(item.pieces, operands, strict=True):
                self._merge(piece, held)
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
        job = piece.job
        if self.only is not None:
            return job.name not in self.only
        # Copies of integers are made again: comparing them may have something to say.
        if self.out.journal is None or job.action is Action.COPY_EQUAL or not piece.n:
            return False
        start = piece.start * job.out_dtype.itemsize
        return self.out.journal.covers(job.name, start, piece.bytes_out)

    def _skipping(self, items: Iterator[WorkItem]) -> Iterator[WorkItem]:
        for item in items:
            pieces = tuple(p for p in item.pieces if not self._is_done(p))
            skipped = [p for p in item.pieces if self._is_done(p)]
            self.report.bytes_kept += sum(p.bytes_out for p in skipped)
            self._passed += sum(p.bytes_in for p in skipped)
            if pieces:
                yield WorkItem(pieces)

    # ---- reading -----------------------------------------------------------------------------------

    def _sweep(self, items: Iterator[WorkItem]) -> Iterator[tuple[WorkItem, list[Operands]]]:
        """Yield the items, each with its pieces' operands in memory."""
        for item, addresses in self.reader.sweep((item, _runs(item)) for item in items):
            yield item, list(_operands(item, addresses))
            self.report.bytes_read += sum(p.bytes_in for p in item.pieces)
            if self.progress:
                name = item.pieces[-1].job.name
                self.progress(name, self.report.bytes_read + self._passed, self.plan.bytes_read)

    # ---- merging -----------------------------------------------------------------------------------

    def _merge(self, piece: Piece, operands: Operands) -> None:
        """Merge what is in memory of a job: all of it, or the piece its walk is known for."""
        job = piece.job
        if job.action is Action.COPY_EQUAL:
            self._compare(job, operands)
            walk: Walk | Copy = Copy(0)
        elif job.action is Action.COPY:
            walk = Copy(0)
        else:
            walk = self.walks.get(job.name) or self._resolve_here(job, operands)
        if piece.n < job.n:
            self.walks[job.name] = walk
        # A piece of a tensor is cut as its results are; only a whole one has several.
        for part in results_of(job) if piece.n == job.n else (piece,):
            if not self._keeps(part):
                first = part.start - piece.start
                self._merge_part(part, walk, operands.slice(first, first + part.n))

    def _keeps(self, part: Piece) -> bool:
        """Return whether a part of a tensor whose other parts are left is written already."""
        if part.n < part.job.n and self._is_done(part):
            self.report.bytes_kept += part.bytes_out
            return True
        return False

    def _merge_part(self, part: Piece, walk: Walk | Copy, operands: Operands) -> None:
        job = part.job
        shard, info = self.places[job.name]
        size = job.out_dtype.itemsize
        start, word = part.start * size, word_bytes(job.shape, size)
        place = Place(
            self.out.fd(shard),
            self.out.direct_fd(shard),
            info.offset + start,
            part.bytes_out,
            word,
            start,
        )
        out = Buffer(self.writer.reserve(place), job.out_dtype, part.n)
        if job.action is Action.COPY_EQUAL:
            ctypes.memmove(out.address, operands.experts[0].address, part.bytes_out)
        else:
            with self.watch.time("walk"):
                bad = run_walk(self.kernels, walk, operands, out, self.chunk_elements)
            if bad and self.nan_policy == "error":
                self._refuse_nonfinite(job, operands)
        self.reader.sources.check()
        journal = self.out.journal

        def written(checksum: int) -> None:
            if journal is not None:
                journal.add([(job.name, start, part.bytes_out, checksum)])

        self.writer.write(out.address, place, written)
        self.report.bytes_written += part.bytes_out

    def _resolve_here(self, job: TensorJob, operands: Operands) -> Walk | Copy:
        assert job.params is not None
        context = job.context(self.plan.seed, self.plan.n_model)
        with self.watch.time("statistics"):
            return resolve(
                self.kernels, self.plan.spec, job.params, context, operands, self.chunk_elements
            )

    def _compare(self, job: TensorJob, operands: Operands) -> None:
        first = bytes_of(operands.experts[0])
        for operand, buffer in zip(job.experts[1:], operands.experts[1:], strict=True):
            if not (bytes_of(buffer) == first).all():
                text = (
                    f"{job.name!r} ({job.out_dtype.torch}) differs between {job.experts[0].model!r} and "
                    f"{operand.model!r}; {job.experts[0].model!r}'s is taken"
                )
                if self.strict:
                    raise ConflictError(text + ", which --strict refuses")
                if text not in self.report.warnings:
                    self.report.warnings.append(text)

    def _refuse_nonfinite(self, job: TensorJob, operands: Operands) -> None:
        for operand, buffer in zip(job.operands, operands.operands, strict=True):
            index = first_nonfinite(buffer)
            if index is not None:
                raise NonFiniteError(
                    f"{job.name!r} of {operand.model!r} holds NaN or infinity at flat index "
                    f"{operands.start + index}; mend the checkpoint or give --nan-policy propagate"
                )

    # ---- statistics that need sweeps of their own ----------------------------------------------------

    def _resolve_model(self, jobs: list[TensorJob]) -> None:
        """Give every job of a model-scope method its walk, by sweeps over the whole model."""
        jobs = sorted(jobs, key=lambda j: j.name)
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

        def visit(feed: Callable[[int, Chunk], None], wanted: set[int], size: Grain) -> None:
            pieces = (p for t in sorted(wanted) for p in split(jobs[t]))
            items = (WorkItem((p,)) for p in pieces)
            for item, (operands,) in self._sweep(items):
                for _, chunk in operands.chunks(size, self.chunk_elements):
                    with self.watch.time("statistics"):
                        feed(index[item.pieces[0].job.name], chunk)

        walks = resolve_model(self.kernels, self.plan.spec, tensors, visit)
        self.walks.update({job.name: walk for job, walk in zip(jobs, walks, strict=True)})

    def _merge_streamed(self, job: TensorJob) -> None:
        """Merge a tensor too large for the ring: one sweep per statistic pass, then one for the walk."""
        assert job.params is not None
        recipe = self.plan.spec.recipe(job.params, job.context(self.plan.seed, self.plan.n_model))
        answer = None
        while True:
            try:
                request = recipe.send(answer)
            except StopIteration as stop:
                self.walks[job.name] = stop.value
                break
            answer = self._stream_statistic(job, request)
        items = self._skipping(WorkItem((p,)) for p in split(job))
        for item, (operands,) in self._sweep(items):
            self._merge(item.pieces[0], operands)

    def _stream_statistic(self, job: TensorJob, request: Statistic) -> object:
        sweep = self.kernels.sweep(request, job.n, job.cols, len(job.experts), job.compute)
        while True:
            items = (WorkItem((p,)) for p in split(job))
            for _, (operands,) in self._sweep(items):
                delta = getattr(request, "delta", True)
                for _, chunk in operands.chunks(grain(request), self.chunk_elements, delta):
                    with self.watch.time("statistics"):
                        sweep.feed(chunk)
            if not sweep.next_pass():
                return sweep.result()


def _runs(item: WorkItem) -> list[Run]:
    """Return the runs of bytes that hold an item's operands, piece by piece."""
    runs = []
    for piece in item.pieces:
        for operand in piece.job.operands:
            size = operand.info.dtype.itemsize
            first = operand.info.offset + piece.start * size
            runs.append((operand.info.file, first, piece.n * size))
    return runs


def _operands(item: WorkItem, addresses: Sequence[int]) -> Iterator[Operands]:
    """Yield each piece's operands; addresses are in the order of `_runs`."""
    at = iter(addresses)
    for piece in item.pieces:
        job = piece.job
        buffers = [Buffer(next(at), o.info.dtype, piece.n) for o in job.operands]
        base = buffers.pop(0) if job.base else None
        yield Operands(base, buffers, job.cols, job.compute, piece.start)


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
