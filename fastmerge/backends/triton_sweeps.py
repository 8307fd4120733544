"""The statistics of the Triton backend: what kernels leave per block, brought to one result.

Sums over blocks are a few torch additions in the order that docs/numerics.md fixes; counts are integers.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmerge.backends import Chunk
from fastmerge.backends.triton_plan import (
    INF_KEY,
    SPAN,
    lower_keep,
    lower_walk,
    real_words,
    sliced,
    spans,
    value_of_key,
)
from fastmerge.stages import (
    F64,
    Axis,
    Cut,
    Gram,
    Keep,
    MomentResult,
    Moments,
    OrderStatistic,
    SignBalance,
    Walk,
)

if TYPE_CHECKING:
    from torch import Tensor

    from fastmerge.backends.triton import TritonKernels

END = 2**63 - 1
LANES = 64
SEGMENT = 4096

#: Rows that one launch sums over: each takes 64 lanes of scratch, however short it is.
MOST_ROWS = 1 << 15


# ---- the reduction tree --------------------------------------------------------------------------


def fold_lanes(lanes: Tensor) -> Tensor:
    """Return [...]: the 64 lanes of [..., 64], combined by halving."""
    half = LANES // 2
    while half:
        lanes = lanes[..., :half] + lanes[..., half:]
        half //= 2
    return lanes[..., 0]


def tree_sum(leaves: Tensor) -> Tensor:
    """Return [...]: the leaves of [..., S], S > 0, combined as a binary counter would.

    Equal levels are added in pairs; what is left over at each level is added from the lowest upward.
    """
    left: list[Tensor] = []
    while leaves.shape[-1] > 1:
        if leaves.shape[-1] % 2:
            left.append(leaves[..., -1])
            leaves = leaves[..., :-1]
        leaves = leaves[..., 0::2] + leaves[..., 1::2]
    left.append(leaves[..., 0])
    total = left[0]
    for value in left[1:]:
        total = value + total
    return total


class _Segments:
    """Sums of one unit fed piece by piece: whole segments so far, and the lanes of a started one."""

    def __init__(self) -> None:
        self.position = 0
        self._carry: Tensor | None = None
        self._sums: list[Tensor] = []

    def feed(
        self, kernels: TritonKernels, chunk: Chunk, x: int, y: int, mask: int, term: int
    ) -> None:
        """Go on with a piece. mask: address of what is kept of it, or 0."""
        skew = self.position % SEGMENT
        n_segments = -(-(skew + chunk.n) // SEGMENT)
        lanes = sum_lanes(
            kernels, chunk, x, y, mask, term, skew, skew + chunk.n, n_segments, n_segments, self._carry
        )  # fmt: skip
        self.position += chunk.n
        self._carry = None
        if self.position % SEGMENT:
            self._carry = lanes[:, -1]
            lanes = lanes[:, :-1]
        self._sums.append(fold_lanes(lanes))

    def result(self, kernels: TritonKernels) -> Tensor:
        """Return [2] float64: the sum of all terms and of those kept."""
        import torch

        sums = list(self._sums)
        if self._carry is not None:
            sums.append(fold_lanes(self._carry)[:, None])
        leaves = torch.cat(sums, 1) if sums else kernels.zeros(2, 1, dtype="float64")
        return tree_sum(leaves) if leaves.shape[1] else kernels.zeros(2, dtype="float64")


def sum_lanes(
    kernels: TritonKernels,
    chunk: Chunk,
    x: int,
    y: int,
    mask: int,
    term: int,
    skew: int,
    unit: int,
    unit_segments: int,
    n_segments: int,
    carry: Tensor | None = None,
) -> Tensor:
    """Return [2, n_segments, 64] float64: lanes of all terms and of those kept. x, y: experts' indices."""
    from fastmerge.backends.triton import aligned
    from fastmerge.triton_kernels.stats import sum_lanes_kernel

    lanes = kernels.empty(2, n_segments, LANES, dtype="float64")
    base, one, two = chunk.base, chunk.experts[x], chunk.experts[y]
    tile = kernels.tiles.segments
    rounds = -(-min(unit, SEGMENT) // (4 * LANES))
    # Whole tiles of whole segments need no mask: those of a tensor behind a started segment.
    whole = unit % SEGMENT == 0 and skew == 0
    body = n_segments // tile if whole else (unit // SEGMENT // tile if skew == 0 else 0)
    if unit_segments != n_segments and not whole:
        body = 0
    for first, count, programs, masked in (
        (0, body * tile, body, False),
        (body * tile, n_segments - body * tile, -(-(n_segments - body * tile) // tile), True),
    ):
        if not programs:
            continue
        part = lanes if count == n_segments else kernels.empty(2, count, LANES, dtype="float64")
        carried = carry.contiguous() if carry is not None and first == 0 else None
        kernels.launch(
            sum_lanes_kernel, (programs,), base.address if base else 0, one.address, two.address,
            mask, 0 if carried is None else carried.data_ptr(), part.data_ptr(),
            skew, unit, unit_segments, rounds, first, count,
            BASE=base.dtype.code if base else 0, X=one.dtype.code, Y=two.dtype.code,
            HAS_BASE=base is not None, TERM=term, HAS_MASK=bool(mask), HAS_CARRY=carried is not None,
            SEGMENTS=tile, WIDE=chunk.compute.itemsize == 8,
            ALIGNED=aligned(base.address if base else 0, one.address, two.address, mask),
            WHOLE_STEPS=unit % LANES == 0 and skew % LANES == 0, MASKED=masked,
        )  # fmt: skip
        if part is not lanes:
            lanes[:, first : first + count] = part
    return lanes


TERMS = {"abs": 0, "square": 1}
PRODUCT = 2


class MomentSweep:
    def __init__(self, kernels: TritonKernels, request: Moments, k: int, wide: bool) -> None:
        self._kernels, self._of, self._wide = kernels, request.of, wide
        self._plan = None if request.keep == Keep() else lower_keep(request.keep, k, wide)
        self._table = None if self._plan is None else kernels.upload(self._plan.table())
        self._sums = [_Segments() for _ in range(k)]
        self._largest = kernels.zeros(2, k, dtype="int64")

    def feed(self, chunk: Chunk, offset: int = 0) -> None:
        plan = self._plan
        for begin, span in spans(chunk, plan.drop if plan else None):
            kept = None
            if plan is not None and self._table is not None:
                ready = self._kernels.prepare(plan, span, begin)
                kept = self._kernels.mask_span(plan, span, self._table.data_ptr(), ready)
            for k, sums in enumerate(self._sums):
                if self._of == "max":
                    self._take_max(span, k, kept)
                else:
                    mask = 0 if kept is None else kept[k].data_ptr()
                    sums.feed(self._kernels, span, k, k, mask, TERMS[self._of])

    def _take_max(self, span: Chunk, k: int, kept: Tensor | None) -> None:
        keys = self._kernels.keys(span, k)
        left = keys if kept is None else keys * kept[k]
        for which, values in enumerate((keys, left)):
            self._largest[which, k] = self._largest[which, k].maximum(values.amax())

    def next_pass(self) -> bool:
        return False

    def result(self) -> MomentResult:
        if self._of == "max":
            keys = self._largest.tolist()
            both = [[value_of_key(key, self._wide) for key in row] for row in keys]
            return MomentResult(*(np.array(row, np.float64) for row in both))
        values = np.array([s.result(self._kernels).tolist() for s in self._sums], np.float64)
        values = values.reshape(len(self._sums), 2)
        return MomentResult(values[:, 0].copy(), values[:, 0 if self._plan is None else 1].copy())


class GramSweep:
    def __init__(
        self, kernels: TritonKernels, request: Gram, n: int, cols: int, k: int, wide: bool
    ) -> None:
        self._kernels, self._request, self._k, self._cols = kernels, request, k, cols
        rows = n // cols if cols else 0
        self._units = {Axis.TENSOR: 1, Axis.ROW: rows, Axis.COLUMN: cols}[request.axis]
        self._pairs = list(itertools.combinations_with_replacement(range(k), 2))
        self._sums = [_Segments() for _ in self._pairs]
        self._parts: list[list[Tensor]] = [[] for _ in self._pairs]
        self._carry: list[Tensor | None] = [None for _ in self._pairs]
        self._rows = 0

    def feed(self, chunk: Chunk, offset: int = 0) -> None:
        if not self._request.delta:
            chunk = replace(chunk, base=None)
        most = SPAN
        if self._request.axis is Axis.ROW:
            rows = max(1, min(SPAN // chunk.cols, MOST_ROWS))
            most = rows * chunk.cols
        elif self._request.axis is Axis.COLUMN:
            most = chunk.n
        for _, span in spans(chunk, None, most):
            rows = span.n // span.cols
            for p in range(len(self._pairs)):
                if self._request.axis is Axis.TENSOR:
                    self._sums[p].feed(self._kernels, span, *self._pairs[p], 0, PRODUCT)
                elif self._request.axis is Axis.ROW:
                    self._feed_rows(p, span, rows)
                else:
                    self._feed_columns(p, span, rows)
            self._rows += rows

    def _feed_rows(self, p: int, span: Chunk, rows: int) -> None:
        each = -(-span.cols // SEGMENT)
        lanes = sum_lanes(
            self._kernels, span, *self._pairs[p], 0, PRODUCT, 0, span.cols, each, rows * each
        )
        self._parts[p].append(tree_sum(fold_lanes(lanes[0]).view(rows, each)))

    def _feed_columns(self, p: int, span: Chunk, rows: int) -> None:
        from fastmerge.backends.triton import aligned
        from fastmerge.triton_kernels.stats import sum_columns_kernel

        j, k = self._pairs[p]
        base, x, y, cols = span.base, span.experts[j], span.experts[k], span.cols
        skew = self._rows % LANES
        blocks = -(-(skew + rows) // LANES)
        sums = self._kernels.empty(blocks, cols, dtype="float64")
        carry = self._carry[p]
        width = self._kernels.tiles.block
        self._kernels.launch(
            sum_columns_kernel, (blocks, -(-cols // width)), base.address if base else 0, x.address,
            y.address, 0 if carry is None else carry.data_ptr(), sums.data_ptr(), skew, rows, cols,
            BASE=base.dtype.code if base else 0, X=x.dtype.code, Y=y.dtype.code,
            HAS_BASE=base is not None, HAS_CARRY=carry is not None, BLOCK=width,
            WIDE=span.compute.itemsize == 8,
            ALIGNED=aligned(base.address if base else 0, x.address, y.address),
        )  # fmt: skip
        self._carry[p] = None
        if (skew + rows) % LANES:
            self._carry[p] = sums[-1]
            sums = sums[:-1]
        self._parts[p].append(sums)

    def next_pass(self) -> bool:
        return False

    def _result(self, p: int) -> Any:
        import torch

        if self._request.axis is Axis.TENSOR:
            return self._sums[p].result(self._kernels)[:1].cpu()
        parts, carry = self._parts[p], self._carry[p]
        if self._request.axis is Axis.ROW:
            return (
                torch.cat(parts).cpu() if parts else torch.zeros(self._units, dtype=torch.float64)
            )
        if carry is not None:
            parts = [*parts, carry[None]]
        leaves = torch.cat(parts) if parts else torch.zeros((0, self._units), dtype=torch.float64)
        if not leaves.shape[0]:
            return torch.zeros(self._units, dtype=torch.float64)
        return tree_sum(leaves.T).cpu()

    def result(self) -> F64:
        full = np.zeros((self._k, self._k, self._units))
        for p, (j, k) in enumerate(self._pairs):
            full[j, k] = full[k, j] = self._result(p).numpy()
        return full


class BalanceSweep:
    def __init__(self, kernels: TritonKernels, request: SignBalance, k: int, wide: bool) -> None:
        walk = Walk(coefficient=request.coefficient, keep=request.keep, elect=request.elect)
        self._kernels = kernels
        self._plan = lower_walk(walk, k, wide)
        self._table = kernels.upload(self._plan.table())
        self._balance = kernels.zeros(1, dtype="int64")
        names = (
            "K",
            "TRIM",
            "REMOVE",
            "SELECT",
            "GIVEN",
            "DROP",
            "FINE",
            "RESCALE",
            "VOTE",
            "WIDE",
        )
        self._flags = {name: self._plan.flags[name] for name in names}

    def feed(self, chunk: Chunk, offset: int = 0) -> None:
        from fastmerge.backends.triton import given_of
        from fastmerge.triton_kernels.fused import tally_votes_kernel

        kernels = self._kernels
        for begin, span in spans(chunk, self._plan.drop):
            ready = kernels.prepare(self._plan, span, begin)
            for a, n, programs, masked in kernels.pieces(span.n, kernels.tiles.block):
                part = sliced(span, a, a + n)
                r = ready.advanced(a, self._flags["WIDE"])
                kernels.launch(
                    tally_votes_kernel, (programs,),
                    part.base.address if part.base else 0, tuple(x.address for x in part.experts),
                    self._table.data_ptr(), r.given, r.thresholds, r.inverses, r.stride,
                    self._balance.data_ptr(), part.start, n, max(1, part.cols),
                    HAS_BASE=part.base is not None, MASKED=masked,
                    **kernels.operand_flags(part, *given_of(r)), **self._flags,
                )  # fmt: skip

    def next_pass(self) -> bool:
        return False

    def result(self) -> int:
        return int(self._balance.item())


# ---- order statistics ----------------------------------------------------------------------------


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


class OrderSweep:
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
                self._value[r, k] = value_of_key(search.value, self._wide)
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
                real = np.array([value_of_key(int(v), self._wide) for v in values])
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
