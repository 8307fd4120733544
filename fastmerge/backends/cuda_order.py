"""Order statistics of the CUDA backend: what comes whole by radix selection, what comes in pieces by keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastmerge.backends import Buffer, Chunk, Sweep
from fastmerge.backends.streamed_order import StreamedOrder
from fastmerge.dtypes import DType
from fastmerge.stages import Axis, Cut, OrderStatistic

if TYPE_CHECKING:
    from torch import Tensor

    from fastmerge.backends.cuda import CudaKernels


def order_sweep(
    kernels: CudaKernels, request: OrderStatistic, n: int, cols: int, k: int, compute: DType
) -> Sweep:
    """Start the cuts of rows, or of a tensor or model that comes whole or in pieces."""
    variance = request.of == "variance"

    def whole() -> Sweep:
        return WholeOrder(kernels, request, n, cols, k, compute)

    def keys(chunk: Chunk, own: Sequence[int]) -> Iterator[Tensor]:
        queue = kernels._queue()
        batch = kernels.batch_of(queue, chunk)
        for j in own:
            first = -1 if variance else j
            yield kernels.order_keys(queue, batch, chunk, first, first + 1)[0]

    if request.scope == "row":
        return whole()
    n_keys = 1 if variance else k
    return StreamedOrder(request, n, n_keys, compute is DType.F64, keys, whole)


def whole_bytes(n: int, n_keys: int, n_ranks: int, variance: bool, wide: bool, rows: bool) -> int:
    """Bound the device memory that the cuts of n elements take that come at once."""
    keys = n * (8 if wide else 4) if variance else 0
    if rows or wide:
        return keys
    # A sixteenth of all keys, and as much again for what each piece counts and samples.
    return keys + n_keys * (n_ranks * (n // 4 + (1 << 19)) + (1 << 18))


class WholeOrder(Sweep):
    """Cuts of rows, in chunks of whole ones, or of a tensor in one chunk.

    A row, or a short tensor, takes one launch. A longer tensor is read once: what lies in brackets that a
    sample sets is kept, and looked at digit by digit.
    """

    def __init__(
        self,
        kernels: CudaKernels,
        request: OrderStatistic,
        n: int,
        cols: int,
        k: int,
        compute: DType,
    ) -> None:
        self._kernels, self._all_ties = kernels, request.all_ties
        self._native = native = kernels._native
        self._queue = queue = kernels._queue()
        by_row, self._variance = request.scope == "row", request.of == "variance"
        self._axis = Axis.ROW if by_row else Axis.TENSOR
        self._f64 = compute is DType.F64
        self._n_keys = 1 if self._variance else k
        fraction = request.fraction_of_nonzero
        n_ranks = 1 if fraction is not None else len(request.ranks[0]) if request.ranks else 1
        self._unit = cols if by_row else n
        self._units = (n // cols if cols else 0) if by_row else 1
        self._short = by_row or n <= native.PIECE
        n_targets = n_ranks * self._n_keys
        shape = (n_ranks, self._n_keys, self._units)
        size = native.target_dtype.itemsize
        self._targets = queue.empty(*shape, size, dtype="uint8")
        ranks = np.zeros((n_ranks, self._n_keys), np.int64)
        if fraction is None:
            ranks[:] = np.asarray(request.ranks, np.int64).reshape(self._n_keys, n_ranks).T
        pieces = 1 if self._short else -(-n // native.PIECE)
        bins = queue.zeros(1 if self._short else n_targets, native.DIGIT_BINS, dtype="int64")
        nonzero = queue.zeros(self._n_keys, dtype="int64")
        equal = queue.zeros(n_targets, pieces, dtype="int32")
        uploaded = queue.upload(ranks)
        self._narrowed = not self._short and not self._f64
        several = n_targets if self._narrowed else 0
        sample = queue.empty(self._n_keys if several else 0, native.SAMPLE, dtype="int32")
        brackets = queue.zeros(several, native.BRACKET_BYTES, dtype="uint8")
        inside = queue.empty(several, pieces, native.INSIDE_BYTES, dtype="uint8")
        between = queue.empty(several, pieces, native.MOST_BETWEEN, dtype="int32")
        self._owned = [bins, nonzero, equal, uploaded, sample, brackets, inside, between]
        self._selection = native.Selection(
            self._n_keys,
            n_ranks,
            request.all_ties,
            self._f64,
            -1.0 if fraction is None else fraction,
            self._targets.data_ptr(),
            bins.data_ptr(),
            nonzero.data_ptr(),
            equal.data_ptr(),
            n,
            pieces,
            sample.data_ptr(),
            brackets.data_ptr(),
            inside.data_ptr(),
            between.data_ptr(),
        )
        queue.run("open_targets", self._selection, uploaded.data_ptr(), self._units, self._unit)

    def feed(self, chunk: Chunk, offset: int = 0) -> None:
        if not chunk.n or not self._n_keys:
            return
        queue, s = self._queue, self._selection
        if self._variance:
            chunk = self._as_delta(chunk)
        batch = self._kernels.batch_of(queue, chunk)
        if self._short:
            queue.run("select_units", batch, s, self._unit, self._units)
            return
        if self._narrowed:
            queue.run("narrow", batch, s)
        for digit in range(self._native.n_digits(self._f64)):
            queue.run("count_digits", batch, s, digit)
            queue.run("choose_digits", s, digit)
        if not self._all_ties:
            queue.run("count_equals", batch, s)
            queue.run("locate_ties", s)
            queue.run("find_ties", batch, s, offset)

    def _as_delta(self, chunk: Chunk) -> Chunk:
        """Return the variance as the one delta of a chunk: a key is the bits of a number of that key."""
        queue, dtype = self._queue, DType.F64 if self._f64 else DType.F32
        batch = self._kernels.batch_of(queue, chunk)
        keys = self._kernels.order_keys(queue, batch, chunk, -1, 0)[0]
        variance = Buffer(keys.data_ptr(), dtype, chunk.n, keys, str(queue.device))
        return dataclasses.replace(chunk, base=None, experts=[variance])

    def next_pass(self) -> bool:
        return False

    def result(self) -> list[Cut]:
        targets = self._targets.cpu().numpy().view(self._native.target_dtype)[..., 0]
        return [Cut(t["value"].copy(), t["last_tie"].copy(), self._axis) for t in targets]
