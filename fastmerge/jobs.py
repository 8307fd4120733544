"""Output tensors as jobs, and jobs cut into the pieces that are read, merged and written together."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from fastmerge.checkpoint import TensorInfo
from fastmerge.checkpoint.coded import CodedInfo
from fastmerge.coding import (
    Coding,
    PartSpec,
    is_atomic,
    needs_peak,
    parts_of,
    result_rows,
    unit_rows,
)
from fastmerge.dtypes import DType
from fastmerge.quant.format import Constant, OutFormat, Part
from fastmerge.registry import Params, Scope, TensorContext
from fastmerge.streaming.ring import room
from fastmerge.streaming.upload import device_room

MIB = 1 << 20

#: Input bytes of one work item on the host: large enough for the disk, small enough to stay in a last-level
#: cache. A device's kernels want more, for a launch costs the host as much as a megabyte costs the link.
ITEM_BYTES = 16 * MIB
DEVICE_ITEM_BYTES = 128 * MIB
ITEM_TENSORS = 256


class Action(Enum):
    MERGE = "merge"
    COPY = "copy"  # one operand, converted to the output type if need be
    COPY_EQUAL = "copy if equal"  # integers: all operands should hold the same bytes


@dataclass(frozen=True)
class Span:
    """Bytes [first, first + n) of a stored tensor."""

    info: TensorInfo
    first: int
    n: int


@dataclass(frozen=True)
class Operand:
    """One input's tensor: the model's name for messages and where its bytes are."""

    model: str
    info: TensorInfo | CodedInfo

    def spans(self, start: int, stop: int) -> list[Span]:
        """Return what has to be read for elements [start, stop): slot by slot, then A and B."""
        info = self.info
        if isinstance(info, TensorInfo):
            size = info.dtype.itemsize
            return [Span(info, start * size, (stop - start) * size)]
        found = []
        for spec in self.specs:
            first, end = spec.span(start, stop)
            found.append(Span(info.parts[spec.slot], first, end - first))
        whole = [t for slot, t in info.parts.items() if slot not in {s.slot for s in self.specs}]
        low = [info.low_rank.a, info.low_rank.b] if info.low_rank else []
        return found + [Span(t, 0, t.n_bytes) for t in [*whole, *low]]

    @property
    def specs(self) -> tuple[PartSpec, ...]:
        assert isinstance(self.info, CodedInfo)
        return parts_of(self.info.coding, *matrix_of(self.info.shape))

    def bytes_of(self, start: int, stop: int) -> int:
        return sum(s.n for s in self.spans(start, stop))


@dataclass(frozen=True)
class Stored:
    """How a job's result is stored where it is not one dense tensor of the job's name.

    format: for what is known late; None: nothing is. constants: stored beside it. scale_group: of tensors
    that share one scale of the tensor; None: it is alone. hessian: that codes are rounded with.
    """

    format: OutFormat | None
    coding: Coding
    parts: tuple[Part, ...]
    constants: tuple[Constant, ...] = ()
    scale_group: str | None = None
    hessian: TensorInfo | None = None


def stored_names(job: TensorJob) -> list[str]:
    """Return the stored tensors that a job's result is in, codes first."""
    if job.stored is None:
        return [job.name]
    return [p.name for p in job.stored.parts] + [c.name for c in job.stored.constants]


def matrix_of(shape: Sequence[int]) -> tuple[int, int]:
    """Return a tensor's (rows, cols): all but the last dimension, and that."""
    cols = max(1, shape[-1]) if shape else 1
    return math.prod(shape) // cols, cols


@dataclass(frozen=True)
class TensorJob:
    """One output tensor. base is set for delta methods only; experts are the recipe's other operands."""

    name: str
    shape: tuple[int, ...]
    action: Action
    out_dtype: DType
    compute: DType
    base: Operand | None
    experts: tuple[Operand, ...]
    scope: Scope = Scope.ELEMENT
    params: Params | None = None
    stored: Stored | None = None

    @property
    def operands(self) -> tuple[Operand, ...]:
        return ((self.base,) if self.base else ()) + self.experts

    @property
    def n(self) -> int:
        return math.prod(self.shape)

    @property
    def cols(self) -> int:
        return max(1, self.shape[-1]) if self.shape else 1

    @property
    def bytes_in(self) -> int:
        return sum(o.info.n_bytes for o in self.operands)

    @property
    def bytes_out(self) -> int:
        """Bytes that the walk writes."""
        return sum(end - first for _, first, end in self.places(0, self.n))

    def places(self, start: int, stop: int) -> list[tuple[str, int, int]]:
        """Return (stored tensor, first byte, end) of what elements [start, stop) are written to.

        A result that can only be written whole is so for any elements of it.
        """
        if self.stored is None:
            size = self.out_dtype.itemsize
            return [(self.name, start * size, stop * size)]
        if self.is_atomic:
            start, stop = 0, self.n
        return [
            (part.name, *spec.span(start, stop))
            for part, spec in self.parts
            if self.is_atomic or spec.per_element is not None
        ]

    @property
    def parts(self) -> list[tuple[Part, PartSpec]]:
        """The stored tensors that the walk fills, with their bytes."""
        assert self.stored is not None
        specs = parts_of(self.stored.coding, *matrix_of(self.shape))
        return list(zip(self.stored.parts, specs, strict=True))

    @property
    def late(self) -> list[tuple[str, int]]:
        """(stored tensor, bytes) of what is known from the merge, but not written by its walk."""
        if self.stored is None:
            return []
        scales = [
            (p.name, s.n_bytes)
            for p, s in self.parts
            if not self.is_atomic and s.per_element is None
        ]
        constants = [(c.name, c.n_bytes) for c in self.stored.constants if c.content is None]
        return scales + constants

    @property
    def needs_peak(self) -> bool:
        """Whether the largest magnitude of the whole result decides how it is coded."""
        return self.stored is not None and needs_peak(self.stored.coding)

    @property
    def is_atomic(self) -> bool:
        """Whether the result is held in memory until all of it is merged."""
        return self.stored is not None and is_atomic(self.stored.coding)

    @property
    def is_whole(self) -> bool:
        """Whether all of the tensor should be in memory at once."""
        return self.action is Action.MERGE and self.scope in (
            Scope.TENSOR,
            Scope.WHOLE,
            Scope.MATRIX,
        )

    @property
    def needs_whole(self) -> bool:
        """Whether it cannot be merged but with all of the tensor in memory at once."""
        return self.action is Action.MERGE and self.scope in (Scope.WHOLE, Scope.MATRIX)

    @functools.cached_property
    def unit(self) -> int:
        """Elements that a cut through the tensor is a multiple of; 0: an operand's parts cannot be cut."""
        rows = 1
        cols = matrix_of(self.shape)[1]
        for operand in self.operands:
            if isinstance(operand.info, CodedInfo):
                rows = math.lcm(rows, unit_rows(operand.info.coding, cols))
        if self.stored is not None:
            rows = math.lcm(rows, result_rows(self.stored.coding, cols))
            for _, spec in self.parts:
                if rows and spec.per_element and len(spec.shape) == 1:
                    # Checksums go by words of up to 8 bytes, which a cut must not go through.
                    rows *= 8 // math.gcd(8, int(spec.per_element * rows * cols))
        return rows * cols if self.stored or rows != 1 or self._is_coded else 1

    @property
    def _is_coded(self) -> bool:
        return any(isinstance(o.info, CodedInfo) for o in self.operands)

    def context(self, seed: int, n_model: int) -> TensorContext:
        return TensorContext(
            self.name, self.shape, len(self.experts), self.base is not None, seed, n_model
        )


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + n) of one job."""

    job: TensorJob
    start: int
    n: int

    @property
    def spans(self) -> Iterator[Span]:
        """Yield what has to be read, operand by operand."""
        for operand in self.job.operands:
            yield from operand.spans(self.start, self.start + self.n)

    @property
    def bytes_in(self) -> int:
        return sum(s.n for s in self.spans)

    @property
    def places(self) -> list[tuple[str, int, int]]:
        return self.job.places(self.start, self.start + self.n)

    @property
    def needed(self) -> list[tuple[str, int, int]]:
        """(stored tensor, first byte, end) of all that must have been written for this to be done."""
        late = [(name, 0, n) for name, n in self.job.late] if self.start == 0 else []
        return self.places + late

    @property
    def bytes_out(self) -> int:
        return sum(end - first for _, first, end in self.places)


@dataclass(frozen=True)
class WorkItem:
    """What is read, merged and written together."""

    pieces: tuple[Piece, ...]

    @property
    def memory(self) -> int:
        """Bytes of ring memory that the operands take on the host."""
        return sum(room(s.n) for p in self.pieces for s in p.spans)

    @property
    def device_memory(self) -> int:
        """Bytes of a device's ring that the operands take."""
        return sum(device_room(s.n) for p in self.pieces for s in p.spans)


def results_of(job: TensorJob, item_bytes: int = ITEM_BYTES) -> Iterator[Piece]:
    """Cut a job into the pieces that its walk is run and written in."""
    if job.is_whole and job.scope is Scope.WHOLE:
        yield Piece(job, 0, job.n)
    else:
        yield from split(job, item_bytes)


def split(
    job: TensorJob, item_bytes: int = ITEM_BYTES, first: int = 0, stop: int | None = None
) -> Iterator[Piece]:
    """Cut elements [first, stop) of a job into pieces of about `item_bytes` of input: whole rows, or 4096s
    of a long row, where `first` is a multiple of them. Coded tensors are cut where that can be, beyond
    these elements if need be."""
    end = job.n if stop is None else stop
    if not job.unit:
        yield Piece(job, 0, job.n)
        return
    step = max(4096, item_bytes * job.n // max(1, job.bytes_in))
    if job.unit > 1:  # what is cut along with it is cut where its units end
        step = max(job.unit, step // job.unit * job.unit)
        first -= first % job.unit
        end = min(job.n, -(-end // job.unit) * job.unit)
    else:
        step = step // job.cols * job.cols if job.cols <= step else step // 4096 * 4096
    for start in range(first, end, step):
        yield Piece(job, start, min(step, end - start))


def together(pieces: Sequence[Piece], item_bytes: int) -> Iterator[WorkItem]:
    """Batch small pieces, in order."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        if batch and (size + piece.bytes_in > item_bytes or len(batch) == ITEM_TENSORS):
            yield WorkItem(tuple(batch))
            batch, size = [], 0
        batch.append(piece)
        size += piece.bytes_in
    if batch:
        yield WorkItem(tuple(batch))


def work_items(
    jobs: Sequence[TensorJob], streamed: Collection[str] = (), item_bytes: int = ITEM_BYTES
) -> Iterator[WorkItem]:
    """Batch small jobs and cut large ones, in output order. streamed: too large to hold whole, left out."""
    batch: list[Piece] = []
    size = 0
    for job in jobs:
        if job.name in streamed:
            continue
        whole = job.bytes_in <= item_bytes
        if whole and size + job.bytes_in <= item_bytes and len(batch) < ITEM_TENSORS:
            batch.append(Piece(job, 0, job.n))
            size += job.bytes_in
            continue
        if batch:
            yield WorkItem(tuple(batch))
            batch, size = [], 0
        if whole:
            batch, size = [Piece(job, 0, job.n)], job.bytes_in
        elif job.is_whole:
            yield WorkItem((Piece(job, 0, job.n),))
        else:
            yield from (WorkItem((piece,)) for piece in split(job, item_bytes))
    if batch:
        yield WorkItem(tuple(batch))
