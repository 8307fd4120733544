"""Order statistics of the Triton backend: what comes whole by counting above thresholds, or of whole units at
once; what comes in pieces by keys."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmerge.backends import Chunk, Sweep
from fastmerge.backends.streamed_order import StreamedOrder
from fastmerge.backends.triton_plan import INF_KEY, real_words, sliced, values_of_keys
from fastmerge.stages import Axis, Cut, OrderStatistic

if TYPE_CHECKING:
    from torch import Tensor

    from fastmerge.backends.triton import TritonKernels

END = 2**63 - 1


def order_sweep(
    kernels: TritonKernels, request: OrderStatistic, n: int, cols: int, k: int, wide: bool
) -> Sweep:
    """Start the cuts of rows, or of a tensor or model that comes whole or in pieces."""

    def whole() -> Sweep:
        return WholeOrder(kernels, request, n, cols, k, wide)

    def keys(chunk: Chunk, own: Sequence[int]) -> Iterator[Tensor]:
        return (keys_of(kernels, request, chunk, j) for j in own)

    if request.scope == "row":
        return whole()
    return StreamedOrder(request, n, 1 if request.of == "variance" else k, wide, keys, whole)


def keys_of(kernels: TritonKernels, request: OrderStatistic, chunk: Chunk, k: int) -> Tensor:
    """Return [n] int32 or int64: the keys of expert k's deltas, or of the variance over experts."""
    return kernels.keys(chunk, k) if request.of == "delta" else variance_keys(kernels, chunk)


class _Search:
    """The bracket of one cut of keys: count(key > low) >= rank > count(key > high), narrowed by counting."""

    WAYS = 16  # thresholds of a count: triton_kernels/select.py

    def __init__(self, kernels: TritonKernels, keys: Tensor, rank: int, wide: bool) -> None:
        import torch

        self._kernels, self._keys, self._wide, self._rank = kernels, keys, wide, rank
        self._low = torch.tensor([-1], device=kernels.device)
        self._high = torch.tensor([INF_KEY[wide] + 1], device=kernels.device)
        self._above = kernels.zeros(1, dtype="int64")
        self._parts = torch.arange(1, self.WAYS + 1, device=kernels.device)

    def find(self) -> int:
        """Return the key of the cut: the rank-th largest. Waits for the device once."""
        width = INF_KEY[self._wide] + 2
        while width > 1:
            self._narrow()
            width = -(-width // (self.WAYS + 1))
        return int(self._high.item())

    def _narrow(self) -> None:
        import torch

        from fastmerge.triton_kernels.select import count_above_kernel

        width, ways, keys = self._high - self._low, self.WAYS + 1, self._keys
        # low + (width * part) // ways, without overflow.
        ahead = width // ways * self._parts + width % ways * self._parts // ways
        thresholds = self._low + ahead
        counts = self._kernels.zeros(self.WAYS, dtype="int64")
        for a, n, programs, masked in self._kernels.pieces(len(keys), self._kernels.tiles.count):
            self._kernels.launch(
                count_above_kernel, (programs,), keys.data_ptr() + a * keys.element_size(),
                thresholds.data_ptr(), counts.data_ptr(), n,
                BLOCK=self._kernels.tiles.count, WIDE=self._wide, MASKED=masked,
            )  # fmt: skip
        within = (counts >= self._rank).sum().view(1)
        self._low, self._high, self._above = (
            torch.cat(pair).gather(0, within)
            for pair in ((self._low, thresholds), (thresholds, self._high), (counts, self._above))
        )

    def last_tie(self, key: int) -> int:
        """Return the place of the last of the found key's equals that is above the cut."""
        import torch

        from fastmerge.triton_kernels.select import count_equal_kernel

        keys, block = self._keys, self._kernels.tiles.count
        counts = self._kernels.empty(-(-len(keys) // block), dtype="int64")
        self._kernels.launch(
            count_equal_kernel, (len(counts),), keys.data_ptr(), self._high.data_ptr(),
            counts.data_ptr(), len(keys), BLOCK=block, WIDE=self._wide,
        )  # fmt: skip
        upto = torch.cumsum(counts, 0)
        quota = self._rank - int(self._above.item())
        b = int(torch.searchsorted(upto, quota).item())
        quota -= int((upto[b] - counts[b]).item())
        equal = (keys[b * block : (b + 1) * block] == key).nonzero()
        return b * block + int(equal[quota - 1].item())


class WholeOrder(Sweep):
    """Cuts of rows, in chunks of whole ones, or of a tensor in one chunk."""

    def __init__(
        self, kernels: TritonKernels, request: OrderStatistic, n: int, cols: int, k: int, wide: bool
    ) -> None:
        self._kernels, self._request, self._wide = kernels, request, wide
        self._fraction = request.fraction_of_nonzero
        self._k = 1 if request.of == "variance" else k
        by_row = request.scope == "row"
        self._axis = Axis.ROW if by_row else Axis.TENSOR
        self._n_ranks = 1 if self._fraction is not None else len(request.ranks[0])
        units = (n // cols if cols else 0) if by_row else 1
        self._value = np.full((self._n_ranks, self._k, units), math.inf)
        self._tie = np.full((self._n_ranks, self._k, units), -1, np.int64)

    def feed(self, chunk: Chunk, offset: int = 0) -> None:
        if chunk.n == 0:
            return
        if self._axis is Axis.ROW:
            self._select_units(chunk, chunk.n // chunk.cols, chunk.cols, chunk.start // chunk.cols)
        elif chunk.n <= self._kernels.tiles.direct:
            self._select_units(chunk, 1, chunk.n, 0)
        else:
            for k in range(self._k):
                self._search(self._keys(chunk, k), k, offset + chunk.start)

    def _keys(self, chunk: Chunk, k: int) -> Tensor:
        return keys_of(self._kernels, self._request, chunk, k)

    def _search(self, keys: Tensor, k: int, first: int) -> None:
        """Find the cuts of one expert's keys, by counting."""
        m = len(keys)
        for r in range(self._n_ranks):
            at = (r, k, 0)
            nonzero = m
            if self._fraction is not None:
                nonzero = int((keys != 0).sum().item())
                rank = int(self._fraction * nonzero)
            else:
                rank = int(self._request.ranks[k][r])
            if rank <= 0:
                continue
            if self._fraction is not None and rank >= nonzero:
                self._value[at], self._tie[at] = 0.0, -1
            elif rank >= m:
                self._value[at], self._tie[at] = -1.0, END
            else:
                search = _Search(self._kernels, keys, rank, self._wide)
                key = search.find()
                self._value[at] = values_of_keys([key], self._wide)[0]
                every = self._request.all_ties
                self._tie[at] = END if every else first + search.last_tie(key)

    # ---- cuts of whole units, each by one program ------------------------------------------------

    def _select_units(self, chunk: Chunk, units: int, m: int, first: int) -> None:
        run = slice(first, first + units)
        for k in range(self._k):
            keys = self._keys(chunk, k)
            for r in range(self._n_ranks):
                if self._fraction is None:
                    ranks = np.full(units, int(self._request.ranks[k][r]), np.int64)
                    nonzero = None
                else:
                    nonzero = (keys.view(units, m) != 0).sum(1).cpu().numpy()
                    ranks = (self._fraction * nonzero).astype(np.int64)
                values, ties = self._select(keys, units, m, ranks)
                ties += chunk.start + np.arange(units) * m
                if self._request.all_ties:
                    ties[:] = END
                real = values_of_keys(values, self._wide)
                real[ranks <= 0], ties[ranks <= 0] = math.inf, -1
                real[ranks >= m], ties[ranks >= m] = -1.0, END
                if nonzero is not None:
                    every = (ranks > 0) & (ranks >= nonzero)
                    real[every], ties[every] = 0.0, -1
                self._value[r, k, run], self._tie[r, k, run] = real, ties

    def _select(self, keys: Tensor, units: int, m: int, ranks: Any) -> tuple[Any, Any]:
        """Return [units] int64 each: the keys of the cuts and the places of their last ties."""
        from fastmerge.triton_kernels.select import select_rows_kernel

        if ((ranks <= 0) | (ranks >= m)).all():
            return np.zeros(units, np.int64), np.zeros(units, np.int64)
        wanted = self._kernels.upload(np.clip(ranks, 1, m))
        found = self._kernels.empty(2, units, dtype="int64")
        block = min(1 << max(4, (m - 1).bit_length()), self._kernels.tiles.rows)
        rows = self._kernels.tiles.rows // block
        rows = min(rows, 1 << (units - 1).bit_length())
        self._kernels.launch(
            select_rows_kernel, (-(-units // rows),), keys.data_ptr(), wanted.data_ptr(),
            found[0].data_ptr(), found[1].data_ptr(), units, m,
            BITS=63 if self._wide else 31, ROWS=rows, BLOCK=block, WIDE=self._wide,
        )  # fmt: skip
        values, ties = found.cpu().numpy()
        return values, ties

    # ---- the interface ---------------------------------------------------------------------------

    def next_pass(self) -> bool:
        return False

    def result(self) -> list[Cut]:
        return [
            Cut(value, tie, self._axis) for value, tie in zip(self._value, self._tie, strict=True)
        ]


def variance_keys(kernels: TritonKernels, chunk: Chunk) -> Tensor:
    """Return [n] int32 or int64: the keys of the variance over experts."""
    from fastmerge.triton_kernels.select import write_variance_keys_kernel

    wide = chunk.compute.itemsize == 8
    keys = kernels.empty(chunk.n, dtype="int64" if wide else "int32")
    flags = ("BASE", "TYPES", "BLOCK", "ALIGNED")
    n_experts = int(real_words([len(chunk.experts)], wide)[0])
    for begin, span in kernels.dense_spans(chunk):
        for a, n, programs, masked in kernels.pieces(span.n, kernels.tiles.block):
            part = sliced(span, a, a + n)
            described = kernels.operand_flags(part)
            at = keys.data_ptr() + (begin + a) * keys.element_size()
            kernels.launch(
                write_variance_keys_kernel, (programs,), part.base.address if part.base else 0,
                tuple(x.address for x in part.experts), at,
                n_experts, n, K=len(part.experts), HAS_BASE=part.base is not None, WIDE=wide,
                MASKED=masked, **{name: described[name] for name in flags},
            )  # fmt: skip
    return keys
