"""The statistics of the Triton backend: what kernels leave per block, brought to one result.

Sums over blocks are a few torch additions in the order that docs/numerics.md fixes; counts are integers.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmerge.backends import Chunk, Sweep
from fastmerge.backends.triton_coded import is_coded
from fastmerge.backends.triton_plan import (
    SPAN,
    Dense,
    lower_keep,
    lower_walk,
    sliced,
    spans,
    values_of_keys,
)
from fastmerge.stages import (
    F64,
    Axis,
    Gram,
    Keep,
    MomentResult,
    Moments,
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
        self, kernels: TritonKernels, chunk: Dense, x: int, y: int, mask: int, term: int
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
    chunk: Dense,
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
            skew, 0 if unit_segments == n_segments else unit, unit, unit_segments, rounds, first, count,
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


class MomentSweep(Sweep):
    def __init__(self, kernels: TritonKernels, request: Moments, k: int, wide: bool) -> None:
        self._kernels, self._of, self._wide = kernels, request.of, wide
        self._plan = None if request.keep == Keep() else lower_keep(request.keep, k, wide)
        self._table = None if self._plan is None else kernels.upload(self._plan.table())
        self._sums = [_Segments() for _ in range(k)]
        self._largest = kernels.zeros(2, k, dtype="int64")

    def feed(self, chunk: Chunk, offset: int = 0) -> None:
        plan = self._plan
        for begin, coded in spans(chunk, plan.drop if plan else None):
            span = self._kernels.dense(coded)
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
            return MomentResult(*values_of_keys(self._largest.cpu().numpy(), self._wide))
        values = np.array([s.result(self._kernels).tolist() for s in self._sums], np.float64)
        values = values.reshape(len(self._sums), 2)
        return MomentResult(values[:, 0].copy(), values[:, 0 if self._plan is None else 1].copy())


class GramSweep(Sweep):
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
            most = max(1, SPAN // chunk.cols) * chunk.cols if is_coded(chunk) else chunk.n
        for _, coded in spans(chunk, None, most):
            span = self._kernels.dense(coded)
            rows = span.n // span.cols
            for p in range(len(self._pairs)):
                if self._request.axis is Axis.TENSOR:
                    self._sums[p].feed(self._kernels, span, *self._pairs[p], 0, PRODUCT)
                elif self._request.axis is Axis.ROW:
                    self._feed_rows(p, span, rows)
                else:
                    self._feed_columns(p, span, rows)
            self._rows += rows

    def _feed_rows(self, p: int, span: Dense, rows: int) -> None:
        each = -(-span.cols // SEGMENT)
        lanes = sum_lanes(
            self._kernels, span, *self._pairs[p], 0, PRODUCT, 0, span.cols, each, rows * each
        )
        self._parts[p].append(tree_sum(fold_lanes(lanes[0]).view(rows, each)))

    def _feed_columns(self, p: int, span: Dense, rows: int) -> None:
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


class BalanceSweep(Sweep):
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
        for begin, coded in spans(chunk, self._plan.drop):
            span = kernels.dense(coded)
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
