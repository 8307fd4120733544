"""Order statistics of the Triton backend: cuts by counting above thresholds, or of whole units at once."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmerge.backends import Chunk, Sweep
from fastmerge.backends.triton_plan import INF_KEY, real_words, sliced, values_of_keys
from fastmerge.stages import Axis, Cut, OrderStatistic

if TYPE_CHECKING:
    from torch import Tensor

    from fastmerge.backends.triton import TritonKernels

END = 2**63 - 1


class _Search:
    """The bracket of one cut: count(key > low) >= rank > count(key > high), narrowed by counting."""

    WAYS = 16  # thresholds of a pass: triton_kernels/select.py

    def __init__(self, kernels: TritonKernels, wide: bool) -> None:
        import torch

        self._kernels, self._wide = kernels, wide
        self.rank = 0
        self._low = torch.tensor([-1], device=kernels.device)
        self._high = torch.tensor([INF_KEY[wide] + 1], device=kernels.device)
        self._above = kernels.zeros(1, dtype="int64")
        self._parts = torch.arange(1, self.WAYS + 1, device=kernels.device)
        self.value, self.quota, self.last_tie = -1, 0, -1
        self._width = INF_KEY[wide] + 2
        self.open(zero=False)

    @property
    def narrow_enough(self) -> bool:
        return self._width == 1

    def open(self, zero: bool) -> None:
        """Set the thresholds of the next pass; zero: count the nonzero keys instead."""
        width = self._high - self._low
        ways = self.WAYS + 1
        # As (width * part) // ways, without overflow.
        ahead = width // ways * self._parts + width % ways * self._parts // ways
        self._thresholds = ahead * 0 if zero else self._low + ahead
        self._counts = self._kernels.zeros(self.WAYS, dtype="int64")

    def count(self, keys: Tensor) -> None:
        from fastmerge.triton_kernels.select import count_above_kernel

        for a, n, programs, masked in self._kernels.pieces(len(keys), self._kernels.tiles.count):
            self._kernels.launch(
                count_above_kernel, (programs,), keys.data_ptr() + a * keys.element_size(),
                self._thresholds.data_ptr(), self._counts.data_ptr(), n,
                BLOCK=self._kernels.tiles.count, WIDE=self._wide, MASKED=masked,
            )  # fmt: skip

    def n_nonzero(self) -> int:
        return int(self._counts[0].item())

    def narrow(self) -> None:
        """Take the counts of a pass; no wait for the device."""
        import torch

        within = (self._counts >= self.rank).sum().view(1)
        self._low, self._high, self._above = (
            torch.cat(pair).gather(0, within)
            for pair in (
                (self._low, self._thresholds),
                (self._thresholds, self._high),
                (self._counts, self._above),
            )
        )
        self._width = -(-self._width // (self.WAYS + 1))
        self.open(zero=False)

    def settle(self) -> None:
        """Read the value, and how many of its equals are above."""
        self.value = int(self._high.item())
        self.quota = self.rank - int(self._above.item())

    def find_tie(self, keys: Tensor, first: int) -> None:
        """Go on counting equals; in the piece that holds the last one above, find its index."""
        import torch

        from fastmerge.triton_kernels.select import count_equal_kernel

        if self.quota <= 0:
            return
        block = self._kernels.tiles.count
        counts = self._kernels.empty(-(-len(keys) // block), dtype="int64")
        self._kernels.launch(
            count_equal_kernel, (len(counts),), keys.data_ptr(), self._high.data_ptr(),
            counts.data_ptr(), len(keys), BLOCK=block, WIDE=self._wide,
        )  # fmt: skip
        upto = torch.cumsum(counts, 0)
        total = int(upto[-1].item())
        if total < self.quota:
            self.quota -= total
            return
        b = int(torch.searchsorted(upto, self.quota).item())
        wanted = self.quota - int((upto[b] - counts[b]).item())
        equal = (keys[b * block : (b + 1) * block] == self.value).nonzero()
        self.last_tie = first + b * block + int(equal[wanted - 1].item())
        self.quota = 0


class OrderSweep(Sweep):
    """Cuts of ranks. A unit that comes whole is done at once; else every pass is fed again."""

    def __init__(
        self, kernels: TritonKernels, request: OrderStatistic, n: int, cols: int, k: int, wide: bool
    ) -> None:
        self._kernels, self._request, self._wide, self._n = kernels, request, wide, n
        self._fraction = request.fraction_of_nonzero
        self._k = 1 if request.of == "variance" else k
        by_row = request.scope == "row"
        self._axis = Axis.ROW if by_row else Axis.TENSOR
        self._m = cols if by_row else n
        self._n_ranks = 1 if self._fraction is not None else len(request.ranks[0])
        units = (n // cols if cols else 0) if by_row else 1
        self._value = np.full((self._n_ranks, self._k, units), math.inf)
        self._tie = np.full((self._n_ranks, self._k, units), -1, np.int64)
        self._stage = "nonzero" if self._fraction is not None else "narrow"
        self._done = by_row or n == 0
        self._searches: dict[tuple[int, int], _Search] = {}
        if self._fraction is None:
            for r, k_ in itertools.product(range(self._n_ranks), range(self._k)):
                self._set_trivial(r, k_, int(request.ranks[k_][r]))
        elif n == 0:
            self._done = True

    def _set_trivial(self, r: int, k: int, rank: int) -> bool:
        """Set the cut of a rank that leaves nothing to find."""
        if rank <= 0:
            self._value[r, k], self._tie[r, k] = math.inf, -1
        elif rank >= self._m:
            self._value[r, k], self._tie[r, k] = -1.0, END
        return rank <= 0 or rank >= self._m

    def _keys(self, chunk: Chunk, k: int) -> Tensor:
        if self._request.of == "delta":
            return self._kernels.keys(chunk, k)
        return variance_keys(self._kernels, chunk)

    def feed(self, chunk: Chunk, offset: int = 0) -> None:
        if chunk.n == 0:
            return
        if self._axis is Axis.ROW:
            self._select_units(chunk, chunk.n // chunk.cols, chunk.cols, chunk.start // chunk.cols)
        elif chunk.n == self._n and chunk.n <= self._kernels.tiles.direct:
            self._select_units(chunk, 1, chunk.n, 0)
            self._done = True
        elif chunk.n == self._n:
            for k in range(self._k):
                keys = self._keys(chunk, k)
                self._stage = "nonzero" if self._fraction is not None else "narrow"
                self._open(k)
                while self._searches:
                    self._feed_keys(keys, k, offset + chunk.start)
                    if not self._advance():
                        break
            self._done = True
        else:
            if not self._searches:
                for k in range(self._k):
                    self._open(k)
            for k in range(self._k):
                if any(at[1] == k for at in self._searches):
                    self._feed_keys(self._keys(chunk, k), k, offset + chunk.start)

    # ---- a tensor's cuts, by counting ------------------------------------------------------------

    def _open(self, k: int) -> None:
        for r in range(self._n_ranks):
            search = _Search(self._kernels, self._wide)
            if self._fraction is not None:
                search.open(zero=True)
            else:
                search.rank = int(self._request.ranks[k][r])
                if not 0 < search.rank < self._m:
                    continue
            self._searches[r, k] = search

    def _feed_keys(self, keys: Tensor, k: int, first: int) -> None:
        for (_, k_), search in self._searches.items():
            if k_ == k and self._stage == "tie":
                search.find_tie(keys, first)
            elif k_ == k:
                search.count(keys)

    def _advance(self) -> bool:
        """Take what a pass brought; true if another one is needed."""
        if self._stage == "nonzero":
            self._take_nonzero()
            self._stage = "narrow"
            return bool(self._searches)
        if self._stage == "narrow":
            for search in self._searches.values():
                search.narrow()
            if not all(s.narrow_enough for s in self._searches.values()):
                return True
            for (r, k), search in self._searches.items():
                search.settle()
                self._value[r, k] = values_of_keys([search.value], self._wide)
                self._tie[r, k] = END
            if not self._request.all_ties:
                self._stage = "tie"
                return True
        else:
            for (r, k), search in self._searches.items():
                self._tie[r, k] = search.last_tie
        self._searches.clear()
        return False

    def _take_nonzero(self) -> None:
        assert self._fraction is not None
        for (r, k), search in list(self._searches.items()):
            z = search.n_nonzero()
            search.rank = int(self._fraction * z)
            if search.rank > 0 and search.rank >= z:
                self._value[r, k], self._tie[r, k] = 0.0, -1
                del self._searches[r, k]
            elif self._set_trivial(r, k, search.rank):
                del self._searches[r, k]
            else:
                search.open(zero=False)

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
        return not self._done and bool(self._searches) and self._advance()

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
    for a, n, programs, masked in kernels.pieces(chunk.n, kernels.tiles.block):
        part = sliced(chunk, a, a + n)
        described = kernels.operand_flags(part)
        kernels.launch(
            write_variance_keys_kernel, (programs,), part.base.address if part.base else 0,
            tuple(x.address for x in part.experts), keys.data_ptr() + a * keys.element_size(),
            n_experts, n, K=len(part.experts), HAS_BASE=part.base is not None, WIDE=wide,
            MASKED=masked, **{name: described[name] for name in flags},
        )  # fmt: skip
    return keys
