"""Backends: each implements `Kernels` on memory that `Buffer`s describe; `ops` chooses one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastmerge.dtypes import DType
from fastmerge.stages import (
    F64,
    Cut,
    Gram,
    MomentResult,
    Moments,
    OrderStatistic,
    SignBalance,
    Statistic,
    Walk,
)

#: Elements of a tensor up to which a drop's decisions may be kept for the walk, an eighth of a byte each.
MOST_DECIDED = 1 << 27


@dataclass(frozen=True)
class Buffer:
    """A contiguous run of elements in memory: address, type, length. `owner` keeps the memory alive."""

    address: int
    dtype: DType
    n: int
    owner: Any = field(default=None, repr=False, compare=False)

    def slice(self, start: int, stop: int) -> Buffer:
        return Buffer(
            self.address + start * self.dtype.itemsize, self.dtype, stop - start, self.owner
        )


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

    Feed all chunks, then call `next_pass`: true asks for all chunks again. Then `result`.
    A sweep is over one tensor, except order statistics of model scope, which are fed every tensor of the
    model with its `offset` in the model's flattened order.
    """

    def feed(self, chunk: Chunk, offset: int = 0) -> None: ...
    def next_pass(self) -> bool: ...
    def result(self) -> Any: ...


class Kernels(Protocol):
    """What a backend computes. The arithmetic is docs/numerics.md, bit for bit."""

    name: str

    def sweep(
        self, statistic: Statistic, n: int, cols: int, n_experts: int, compute: DType
    ) -> Sweep:
        """Start a statistic over n elements (all of the model's for order statistics of model scope)."""
        ...

    def walk(self, walk: Walk, chunk: Chunk, out: Buffer) -> bool:
        """Merge one chunk into `out`. Returns whether an operand held NaN or infinity."""
        ...

    def keep_mask(self, keep: Any, chunk: Chunk) -> NDArray[np.uint8]:
        """Return [K, n] uint8: which coordinates the keep stages leave."""
        ...

    def keep_probability(self, drop: Any, chunk: Chunk) -> F64:
        """Return [K, n] float64: the exact keep probability p_i of a `RankedDrop`; the chunk is
        the whole tensor."""
        ...


__all__ = [
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
