"""Output tensors as jobs, and jobs cut into the pieces that are read, merged and written together."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from fastmerge.checkpoint import TensorInfo
from fastmerge.dtypes import DType
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
class Operand:
    """One input's tensor: the model's name for messages and where its bytes are."""

    model: str
    info: TensorInfo


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
        return self.n * self.out_dtype.itemsize

    @property
    def is_whole(self) -> bool:
        """Whether all of the tensor should be in memory at once."""
        return self.action is Action.MERGE and self.scope in (Scope.TENSOR, Scope.WHOLE)

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
    def bytes_in(self) -> int:
        return sum(self.n * o.info.dtype.itemsize for o in self.job.operands)

    @property
    def bytes_out(self) -> int:
        return self.n * self.job.out_dtype.itemsize


@dataclass(frozen=True)
class WorkItem:
    """What is read, merged and written together."""

    pieces: tuple[Piece, ...]

    @property
    def memory(self) -> int:
        """Bytes of ring memory that the operands take on the host."""
        return sum(room(p.n * o.info.dtype.itemsize) for p in self.pieces for o in p.job.operands)

    @property
    def device_memory(self) -> int:
        """Bytes of a device's ring that the operands take."""
        return sum(
            device_room(p.n * o.info.dtype.itemsize) for p in self.pieces for o in p.job.operands
        )


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
    of a long row, where `first` is a multiple of them."""
    per_element = sum(o.info.dtype.itemsize for o in job.operands)
    step = max(4096, item_bytes // per_element)
    step = step // job.cols * job.cols if job.cols <= step else step // 4096 * 4096
    end = job.n if stop is None else stop
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
