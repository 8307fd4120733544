"""Carry out a plan: read, statistics, fused walk, write, overlapped, in the memory the plan allows.

One tensor's way: its operands are read into a region of the ring (`_loads`), its recipe is run to a walk
(`evaluate.resolve`), the walk fills the region's output part, and the region's writes go to the
tensor's final
offset in its shard. Tensors too large for the ring, and methods with statistics over the model, get their
walk in earlier sweeps over the same files.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fastmerge.backends import Buffer, Chunk, Kernels
from fastmerge.checkpoint import Journal, word_bytes
from fastmerge.dtypes import DType
from fastmerge.errors import ConflictError, NonFiniteError
from fastmerge.evaluate import (
    CHUNK_ELEMENTS,
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
    split,
    work_items,
)
from fastmerge.registry import Scope
from fastmerge.ring import ALIGNMENT, Region, Ring, Segment
from fastmerge.stages import Copy, Grain, Statistic, Walk, grain

#: Called with (tensor name, bytes done, bytes in all) as work proceeds; bytes are operands read.
Progress = Callable[[str, int, int], None]


@dataclass
class Report:
    """What a finished merge did. seconds is wall time of the engine; warnings are for the user.

    bytes_kept: of the output, found written by a killed run; resumed: whether there was such a run.
    """

    n_tensors: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    bytes_kept: int = 0
    resumed: bool = False
    seconds: float = 0.0
    backend: str = ""
    warnings: list[str] = field(default_factory=list)


@dataclass
class _Place:
    """Where one piece's bytes lie in its region: offsets of each operand and of the result."""

    piece: Piece
    operands: list[int]
    result: int


class Output(Protocol):
    """Where results go: a descriptor per shard and, where kept, the journal of what is written."""

    journal: Journal | None

    def fd(self, shard: int) -> int: ...


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
        chunk_elements: int = CHUNK_ELEMENTS,
        progress: Progress | None = None,
    ) -> None:
        self.plan, self.kernels, self.out = plan, kernels, out
        self.only = only
        self.nan_policy, self.strict = nan_policy, strict
        self.chunk_elements = chunk_elements
        self.progress = progress
        self.report = Report(backend=kernels.name)
        self.walks: dict[str, Walk | Copy] = {}
        self._passed = 0  # bytes that need no reading
        self.places = plan.layout.places() if plan.layout else {}

    def run(self) -> Report:
        """Merge everything into the output folder's files (not yet committed)."""
        start = time.perf_counter()
        jobs = self.plan.jobs
        with Ring(self.plan.ring_bytes) as ring:
            over_model = [j for j in jobs if self._scope(j) is Scope.MODEL]
            if any(self._left(j) for j in over_model):
                self._resolve_model(ring, over_model)
            items = self._skipping(work_items(self.plan, jobs))
            for places, region in self._sweep(ring, items):
                self._merge_item(ring, region, places)
            for job in jobs:
                if job.name in self.plan.streamed and self._left(job):
                    self._merge_streamed(ring, job)
        for checkpoint in self.plan.checkpoints:
            checkpoint.check_unchanged()
        self.report.n_tensors = len(jobs)
        self.report.seconds = time.perf_counter() - start
        return self.report

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

    def _sweep(
        self, ring: Ring, items: Iterator[WorkItem], with_result: bool = True
    ) -> Iterator[tuple[list[_Place], Region]]:
        loads = (self._load(ring, item, with_result) for item in items)
        for places, region in ring.sweep(loads):
            yield places, region
            read = sum(p.piece.bytes_in for p in places)
            self.report.bytes_read += read
            if self.progress:
                name = places[-1].piece.job.name
                self.progress(name, self.report.bytes_read + self._passed, self.plan.bytes_read)

    def _load(
        self, ring: Ring, item: WorkItem, with_result: bool
    ) -> tuple[list[_Place], int, list[Segment]]:
        """Lay an item's operands and results out in memory; return the places, size and reads."""
        places: list[_Place] = []
        segments: list[Segment] = []
        at = 0
        for piece in item.pieces:
            place = _Place(piece, [], 0)
            for operand in piece.job.operands:
                info = operand.info
                size = info.dtype.itemsize
                segments.append(
                    (ring.file(info.file), info.offset + piece.start * size, piece.n * size, at)
                )
                place.operands.append(at)
                at = _aligned(at + piece.n * size)
            if with_result:
                place.result = at
                at = _aligned(at + piece.bytes_out)
            places.append(place)
        return places, at, segments

    def _operands(self, place: _Place, region: Region) -> Operands:
        piece = place.piece
        buffers = [
            Buffer(region.address + at, o.info.dtype, piece.n)
            for at, o in zip(place.operands, piece.job.operands, strict=True)
        ]
        base = buffers.pop(0) if piece.job.base else None
        return Operands(base, buffers, piece.job.cols, piece.job.compute, piece.start)

    # ---- merging -----------------------------------------------------------------------------------

    def _merge_item(self, ring: Ring, region: Region, places: Sequence[_Place]) -> None:
        writes: list[Segment] = []
        words: list[tuple[int, int]] = []
        for place in places:
            job, piece = place.piece.job, place.piece
            result = self._merge_piece(place, region)
            shard, info = self.places[job.name]
            start = piece.start * job.out_dtype.itemsize
            n_bytes = piece.bytes_out
            writes.append((self.out.fd(shard), info.offset + start, n_bytes, result))
            words.append((word_bytes(job.shape, job.out_dtype.itemsize), start))
            self.report.bytes_written += n_bytes
        journal = self.out.journal
        if journal is None:
            ring.write(region, writes)
            return
        names = [place.piece.job.name for place in places]

        def written(sums: list[int]) -> None:
            parts = zip(names, words, writes, sums, strict=True)
            journal.add([(name, word[1], write[2], s) for name, word, write, s in parts])

        ring.write(region, writes, words, written)

    def _merge_piece(self, place: _Place, region: Region) -> int:
        """Merge one piece in memory and return the address of its result."""
        job = place.piece.job
        operands = self._operands(place, region)
        if job.action is Action.COPY_EQUAL:
            self._compare(job, operands)
            return operands.experts[0].address
        out = Buffer(region.address + place.result, job.out_dtype, place.piece.n)
        walk = Copy(0) if job.action is Action.COPY else self.walks.get(job.name)
        if walk is None:
            walk = self._resolve_here(job, operands)
            if place.piece.n < job.n:
                self.walks[job.name] = walk
        bad = run_walk(self.kernels, walk, operands, out, self.chunk_elements)
        if bad and self.nan_policy == "error":
            self._refuse_nonfinite(job, operands)
        return out.address

    def _resolve_here(self, job: TensorJob, operands: Operands) -> Walk | Copy:
        assert job.params is not None
        context = job.context(self.plan.seed, self.plan.n_model)
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

    def _resolve_model(self, ring: Ring, jobs: list[TensorJob]) -> None:
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
            for places, region in self._sweep(ring, items, with_result=False):
                operands = self._operands(places[0], region)
                for _, chunk in operands.chunks(size, self.chunk_elements):
                    feed(index[places[0].piece.job.name], chunk)

        walks = resolve_model(self.kernels, self.plan.spec, tensors, visit)
        self.walks.update({job.name: walk for job, walk in zip(jobs, walks, strict=True)})

    def _merge_streamed(self, ring: Ring, job: TensorJob) -> None:
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
            answer = self._stream_statistic(ring, job, request)
        items = self._skipping(WorkItem((p,)) for p in split(job))
        for places, region in self._sweep(ring, items):
            self._merge_item(ring, region, places)

    def _stream_statistic(self, ring: Ring, job: TensorJob, request: Statistic) -> object:
        sweep = self.kernels.sweep(request, job.n, job.cols, len(job.experts), job.compute)
        while True:
            items = (WorkItem((p,)) for p in split(job))
            for places, region in self._sweep(ring, items, with_result=False):
                operands = self._operands(places[0], region)
                delta = getattr(request, "delta", True)
                for _, chunk in operands.chunks(grain(request), self.chunk_elements, delta):
                    sweep.feed(chunk)
            if not sweep.next_pass():
                return sweep.result()


def _aligned(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


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
