"""Backends: each implements `Kernels` on memory that `Buffer`s describe; `ops` chooses one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from fastmerge.coding import Coding, result_rows
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


@dataclass
class Residual:
    """What coding cost: sums of squared errors and of squares, over the elements coded so far."""

    errors: float = 0.0
    squares: float = 0.0

    def add(self, errors: float, squares: float) -> None:
        self.errors += errors
        self.squares += squares

    @classmethod
    def of_all(cls, parts: Iterable[Residual]) -> Residual:
        """Return the sums over several tensors."""
        total = cls()
        for part in parts:
            total.add(part.errors, part.squares)
        return total

    @property
    def relative_rms(self) -> float:
        """sqrt(sum (decoded - merged)^2 / sum merged^2); 0 for a tensor of zeros."""
        return math.sqrt(self.errors / self.squares) if self.squares else 0.0


@dataclass(frozen=True)
class Coded:
    """As `Buffer`, elements [start, start + n) of a tensor [rows, cols] that is stored as codes.

    Read as operand, written as result. slots: memory of each part (`coding.parts_of`); parts that are cut
    along with the tensor begin with what belongs to flat index `origin`. low_a, low_b: see `LowRank`.
    residual: of a result, is added to by kernels that tell it.
    """

    coding: Coding
    rows: int
    cols: int
    origin: int
    start: int
    n: int
    slots: Mapping[str, Buffer]
    nested_offset: float = 0.0
    tensor_scale: float = 1.0
    low_scale: float = 0.0
    residual: Residual | None = field(default=None, compare=False)

    #: What kernels see of it.
    dtype = DType.F32

    @property
    def device(self) -> str:
        return self.slots["codes"].device

    @property
    def unit(self) -> int:
        """Elements that what is coded at once must be a multiple of, where the tensor does not end."""
        return result_rows(self.coding, self.cols) * self.cols

    def slice(self, start: int, stop: int) -> Coded:
        return replace(self, start=self.start + start, n=stop - start)


@dataclass(frozen=True)
class Chunk:
    """Elements [start, start + n) of one tensor, of all operands.

    base is None for walks without one. cols is the tensor's last dimension; where a statistic or a
    stage is over
    rows or columns, a chunk holds whole rows.
    """

    base: Buffer | Coded | None
    experts: Sequence[Buffer | Coded]
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

    def walk(self, walk: Walk, chunk: Chunk, out: Buffer | Coded) -> bool:
        """Merge one chunk into `out`. Returns whether an operand held NaN or infinity."""
        ...

    def peak(self, walk: Walk, chunk: Chunk, dtype: DType) -> tuple[bool, float]:
        """Return (as `walk`, the largest magnitude of what `walk` would write as `dtype`)."""
        import torch

        device = chunk.experts[0].device if chunk.experts else "cpu"
        held = torch.empty(chunk.n, dtype=getattr(torch, dtype.torch), device=device)
        bad = self.walk(walk, chunk, Buffer(held.data_ptr(), dtype, chunk.n, held, device))
        return bad, float(held.abs().max()) if chunk.n else 0.0

    def walks(self, jobs: Sequence[tuple[Walk, Chunk, Buffer | Coded]]) -> list[bool]:
        """As `walk`, many at once: where a launch costs more than a small tensor, they share one."""
        return [self.walk(*job) for job in jobs]

    def start_walks(
        self, jobs: Sequence[tuple[Walk, Chunk, Buffer | Coded]]
    ) -> Callable[[], list[bool]]:
        """As `walks`, without waiting for a device: what is returned waits, and tells what `walks` does."""
        found = self.walks(jobs)
        return lambda: found

    def refuses(self, walk: Walk) -> str | None:
        """Return why this backend cannot run `walk`, or None."""
        return refuses_transform(walk)

    def refuses_coding(self, coding: Coding) -> str | None:
        """Return why this backend cannot write results of `coding`, or None."""
        return None

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
    "Coded",
    "Cut",
    "Gram",
    "Kernels",
    "MomentResult",
    "Moments",
    "OrderStatistic",
    "Residual",
    "SignBalance",
    "Sweep",
]
