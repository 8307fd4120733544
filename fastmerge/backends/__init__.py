"""Backends: each implements `Kernels` on memory that `Buffer`s describe; `ops` chooses one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastmerge.dtypes import DType
from fastmerge.stages import (
    Cut,
    Gram,
    MomentResult,
    Moments,
    OrderStatistic,
    SignBalance,
    Statistic,
    Walk,
)

#: Elements that one kernel call on the CPU works on: large enough to share among threads, small
#: enough that the ranks of a ranked drop (4 bytes per element and expert) stay a fraction of the operands.
CHUNK_ELEMENTS = 1 << 22

#: Elements of a tensor up to which a drop's decisions may be kept for the walk, an eighth of a byte each.
MOST_DECIDED = 1 << 27


@dataclass(frozen=True)
class Buffer:
    """A contiguous run of elements in memory: address, type, length, torch's name of the device.

    `owner` keeps the memory alive; off the CPU it is the flat torch tensor that holds the run.
    """

    address: int
    dtype: DType
    n: int
    owner: Any = field(default=None, repr=False, compare=False)
    device: str = "cpu"

    def slice(self, start: int, stop: int) -> Buffer:
        address = self.address + start * self.dtype.itemsize
        return Buffer(address, self.dtype, stop - start, self.owner, self.device)


@dataclass(frozen=True)
class Chunk:
    """Elements [start, start + n) of one tensor, of all operands.

    base is None for walks without one. cols is the tensor's last dimension; where a statistic or a
    stage is over
    rows or columns, a chunk holds whole rows.
    """

    base: Buffer | None
    experts: Sequence[Buffer]
    start: int
    n: int
    cols: int
    compute: DType  # F32 or F64


class Sweep(Protocol):
    """One statistic, fed chunk by chunk in ascending order of index.

    Feed all chunks, then call `next_pass`: true asks for another pass. Then `result`.
    A sweep is over one tensor, except order statistics of model scope, which are fed every tensor of the
    model with its `offset` in the model's flattened order.
    """

    def feed(self, chunk: Chunk, offset: int = 0) -> None: ...
    def next_pass(self) -> bool: ...
    def wanted(self) -> Sequence[tuple[int, int]] | None:
        """Return the ranges [start, stop) of elements, ascending, that the coming pass is to be fed; None:
        all. Who has everything in one chunk may feed that in the first pass instead, and is then done."""
        return None

    def result(self) -> Any: ...


class Kernels(Protocol):
    """What a backend computes. The arithmetic is docs/numerics.md, bit for bit."""

    name: str
    #: Elements that one call is best given.
    chunk_elements: int = CHUNK_ELEMENTS

    def sweep(
        self, statistic: Statistic, n: int, cols: int, n_experts: int, compute: DType
    ) -> Sweep:
        """Start a statistic over n elements (all of the model's for order statistics of model scope)."""
        ...

    def walk(self, walk: Walk, chunk: Chunk, out: Buffer) -> bool:
        """Merge one chunk into `out`. Returns whether an operand held NaN or infinity."""
        ...

    def walks(self, jobs: Sequence[tuple[Walk, Chunk, Buffer]]) -> list[bool]:
        """As `walk`, many at once: where a launch costs more than a small tensor, they share one."""
        return [self.walk(*job) for job in jobs]

    def start_walks(self, jobs: Sequence[tuple[Walk, Chunk, Buffer]]) -> Callable[[], list[bool]]:
        """As `walks`, without waiting for a device: what is returned waits, and tells what `walks` does."""
        found = self.walks(jobs)
        return lambda: found

    def refuses(self, walk: Walk) -> str | None:
        """Return why this backend cannot run `walk`, or None."""
        return refuses_transform(walk)

    def keep_mask(self, keep: Any, chunk: Chunk) -> Any:
        """Return [K, n] uint8, where the operands are: which coordinates the keep stages leave."""
        ...

    def keep_probability(self, drop: Any, chunk: Chunk) -> Any:
        """Return [K, n] float64, where the operands are: the exact keep probability p_i of a
        `RankedDrop`; the chunk is the whole tensor."""
        ...


def refuses_transform(walk: Walk) -> str | None:
    """Return why a backend of compiled stages cannot run a walk that brings its own stage."""
    if walk.transform is None:
        return None
    return f"the stage {walk.transform.name!r} is written in Triton; backend 'triton' runs it"


__all__ = [
    "CHUNK_ELEMENTS",
    "MOST_DECIDED",
    "Buffer",
    "Chunk",
    "Cut",
    "Gram",
    "Kernels",
    "MomentResult",
    "Moments",
    "OrderStatistic",
    "SignBalance",
    "Sweep",
]
