"""The Triton backend: kernels compiled at first use, for NVIDIA and AMD GPUs, or interpreted on the host.

Where no compiled backend was built, and for methods that bring a stage of their own. The kernels are in
`fastmerge.triton_kernels`; `triton_plan` lowers stages to their arguments, `triton_sweeps` and
`triton_order` have the statistics.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmerge.backends import Buffer, Chunk, Coded, Kernels, Sweep
from fastmerge.backends.triton_coded import (
    decode,
    encode,
    is_coded,
    residual_of,
    why_not_written,
)
from fastmerge.backends.triton_plan import (
    MOST_ARGUMENTS,
    Dense,
    Plan,
    lower_keep,
    lower_walk,
    sliced,
    spans,
)
from fastmerge.coding import Coding
from fastmerge.dtypes import DType
from fastmerge.stages import (
    Axis,
    Gram,
    Keep,
    Moments,
    OrderStatistic,
    RankedDrop,
    Statistic,
    Walk,
)

if TYPE_CHECKING:
    from torch import Tensor


#: What a GPU's driver leaves in the file system: NVIDIA's, AMD's, and that of Linux under Windows.
GPU_NODES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def interprets() -> bool:
    """Return whether Triton's interpreter stands in for a GPU."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def why_not() -> str | None:
    """Return why this backend cannot run here, or None."""
    for name in ("triton", "torch"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    if interprets():
        return None
    if any(Path(node).exists() for node in GPU_NODES):  # else torch need not be imported to know
        import torch

        if torch.cuda.is_available():
            return None
    return "no CUDA or ROCm device; TRITON_INTERPRET=1 runs it on the host, slowly"


@dataclass(frozen=True)
class Tiles:
    """How much one program works on; results do not depend on it.

    block:    elements of a walk: 8 per thread of 4 warps, one 16-byte load of a 16-bit type.
    count:    keys of a count: so many that the sums over threads are a small part of it.
    segments: segments of a sum. rows: keys of a tile of whole rows.
    direct:   keys up to which one program finds a tensor's cut in one launch.
    """

    block: int = 1024
    count: int = 8192
    segments: int = 16
    rows: int = 2048
    direct: int = 1 << 16


#: The interpreter pays for each operation, hardly for its size.
INTERPRETED = Tiles(block=1 << 13, count=1 << 15, segments=64, rows=1 << 16, direct=1 << 16)


@dataclass
class Prepared:
    """What a walk over one part of a tensor reads besides its operands; tensors keep memory alive."""

    given: tuple[int, ...] | int = 0
    thresholds: int = 0
    inverses: int = 0
    stride: int = 0
    held: tuple[Any, ...] = ()

    def advanced(self, a: int, wide: bool) -> Prepared:
        """Return the addresses of element `a` on."""
        given = tuple(g + a for g in self.given) if isinstance(self.given, tuple) else 0
        inverses = self.inverses + a * (8 if wide else 4)
        return Prepared(given, self.thresholds + 4 * a, inverses, self.stride, self.held)


class TritonKernels(Kernels):
    """Kernels for `device`: one of torch's "cuda" devices, or "cpu" under the interpreter."""

    name = "triton"
    chunk_elements = 1 << 28

    def __init__(self, device: str) -> None:
        import torch

        self._torch = torch
        self.device = device
        self.tiles = INTERPRETED if device == "cpu" else Tiles()

    # ---- launches --------------------------------------------------------------------------------

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **flags: Any) -> None:
        """Start `grid` programs of a kernel on torch's current stream."""
        with ExitStack() as stack:
            if self.device != "cpu":
                stack.enter_context(self._torch.cuda.device(self.device))
            # The interpreter computes in numpy, which warns where IEEE arithmetic just gives infinity.
            stack.enter_context(np.errstate(all="ignore"))
            kernel[grid](*args, **flags, num_warps=4, enable_fp_fusion=False)

    def pieces(self, n: int, block: int) -> list[tuple[int, int, int, bool]]:
        """Cut n elements: whole blocks, without a mask, and the rest: (first, elements, programs, masked)."""
        whole = n // block * block
        body = [(0, whole, n // block, False)] if whole else []
        return body + ([(whole, n - whole, 1, True)] if n > whole else [])

    def empty(self, *shape: int, dtype: str) -> Tensor:
        return self._torch.empty(shape, dtype=getattr(self._torch, dtype), device=self.device)

    def zeros(self, *shape: int, dtype: str) -> Tensor:
        return self._torch.zeros(shape, dtype=getattr(self._torch, dtype), device=self.device)

    def upload(self, array: Any) -> Tensor:
        host = self._torch.from_numpy(np.ascontiguousarray(array))
        if self.device != "cpu":  # a copy from pageable memory would wait for the stream
            host = host.pin_memory()
        return host.to(self.device, non_blocking=True)

    # ---- codes -----------------------------------------------------------------------------------

    @cached_property
    def dynamic_map(self) -> Tensor:
        """[256] float32: what codes of bitsandbytes' nested scales stand for."""
        from fastmerge.triton_kernels.quant4_decode import dynamic_map

        return self.upload(dynamic_map().numpy())

    def dense(self, chunk: Chunk) -> Dense:
        """Return the chunk with coded operands decoded to float32, in scratch memory of that size."""

        def of(operand: Buffer | Coded) -> Buffer:
            return decode(self, operand) if isinstance(operand, Coded) else operand

        base = None if chunk.base is None else of(chunk.base)
        experts = [of(x) for x in chunk.experts]
        return Dense(base, experts, chunk.start, chunk.n, chunk.cols, chunk.compute)

    def dense_spans(self, chunk: Chunk) -> Iterator[tuple[int, Dense]]:
        """Cut a chunk into parts with coded operands decoded: (first, part)."""
        for begin, span in spans(chunk, None, SPAN_OF[is_coded(chunk)]):
            yield begin, self.dense(span)

    # ---- keys and ranked drops -------------------------------------------------------------------

    def keys(self, chunk: Chunk, k: int) -> Tensor:
        """Return [n] int32 or int64: the keys of expert k's deltas."""
        from fastmerge.triton_kernels.select import write_keys_kernel

        wide = chunk.compute is DType.F64
        keys = self.empty(chunk.n, dtype="int64" if wide else "int32")
        for begin, span in self.dense_spans(replace(chunk, experts=[chunk.experts[k]])):
            for a, n, programs, masked in self.pieces(span.n, self.tiles.block):
                part = sliced(span, a, a + n)
                at = keys.data_ptr() + (begin + a) * keys.element_size()
                base, x = part.base, part.experts[0]
                self.launch(
                    write_keys_kernel, (programs,), base.address if base else 0, x.address, at, n,
                    BASE=base.dtype.code if base else 0, X=x.dtype.code, HAS_BASE=base is not None,
                    BLOCK=self.tiles.block, WIDE=wide, MASKED=masked,
                    ALIGNED=aligned(base.address if base else 0, x.address, at),
                )  # fmt: skip
        return keys

    def _probabilities(self, drop: RankedDrop, chunk: Chunk, k: int) -> Tensor:
        from fastmerge.triton_kernels.ranks import keep_probabilities

        m = chunk.cols if drop.axis is Axis.ROW else chunk.n
        keys = self.keys(chunk, k).view(-1, m)
        by_value = drop.by == "value"
        p: Tensor = keep_probabilities(keys, drop.low[k], drop.high[k], by_value)
        return p.view(-1)

    def prepare(self, plan: Plan, chunk: Chunk, begin: int = 0) -> Prepared:
        """Make ready what the keep stages read: masks on the device, thresholds of a ranked drop.

        begin: where in the plan's masks the chunk starts.
        """
        from fastmerge.triton_kernels.ranks import draw_thresholds, rescale_factors

        masks = [
            (self._torch.as_tensor(m).to(self.device) != 0).view(self._torch.uint8).reshape(-1)
            for m in plan.masks
        ]
        given = tuple(m.data_ptr() + begin for m in masks)
        ready = Prepared(given if masks else 0, held=(masks,))
        drop = plan.drop
        if drop is None or (masks and not plan.rescale):
            return ready
        real = "float64" if plan.flags["WIDE"] else "float32"
        ready.stride = -(-chunk.n // 16) * 16
        thresholds = self.zeros(len(chunk.experts), ready.stride, dtype="int32")
        inverses = self.zeros(len(chunk.experts), ready.stride if plan.rescale else 0, dtype=real)
        for k in range(len(chunk.experts)):
            if drop.low[k] >= 1 or not drop.high[k] > 0:
                thresholds[k] = 65536 if drop.low[k] >= 1 else 0
                inverses[k] = 1
                continue
            p = self._probabilities(drop, chunk, k)
            thresholds[k, : chunk.n] = draw_thresholds(p)
            if plan.rescale:
                whole = thresholds[k, : chunk.n]
                inverses[k, : chunk.n] = rescale_factors(p, whole, bool(masks))
        ready.thresholds, ready.inverses = thresholds.data_ptr(), inverses.data_ptr()
        ready.held += (thresholds, inverses)
        return ready

    def operand_flags(self, chunk: Dense, *addresses: int) -> dict[str, Any]:
        """Return the constants that describe a chunk's memory."""
        base = chunk.base.address if chunk.base else 0
        return {
            "BASE": chunk.base.dtype.code if chunk.base else 0,
            "TYPES": tuple(x.dtype.code for x in chunk.experts),
            "BLOCK": self.tiles.block,
            "ALIGNED": aligned(base, *(x.address for x in chunk.experts), *addresses),
            "DRAWS_ALIGNED": chunk.start % 8 == 0,
            "LONG": chunk.cols >= self.tiles.block,
        }

    # ---- the interface ---------------------------------------------------------------------------

    def walk(self, walk: Walk, chunk: Chunk, out: Buffer | Coded) -> bool:
        return self.walks([(walk, chunk, out)])[0]

    def walks(self, jobs: Sequence[tuple[Walk, Chunk, Buffer | Coded]]) -> list[bool]:
        return self.start_walks(jobs)()

    def start_walks(
        self, jobs: Sequence[tuple[Walk, Chunk, Buffer | Coded]]
    ) -> Callable[[], list[bool]]:
        plans: list[Plan] = []
        works: list[tuple[Chunk, Buffer | Coded]] = []
        for walk, chunk, out in jobs:
            if not chunk.experts:  # the base, stored
                assert chunk.base is not None
                chunk = Chunk(None, [chunk.base], chunk.start, chunk.n, chunk.cols, chunk.compute)
                walk = Walk(np.ones((1, 1)), add_base=False)
            elif not walk.takes_base:
                chunk = Chunk(None, chunk.experts, chunk.start, chunk.n, chunk.cols, chunk.compute)
            works.append((chunk, out))
            plans.append(lower_walk(walk, len(chunk.experts), chunk.compute is DType.F64))
        # All tables go up at once: a copy costs more than a small tensor's walk.
        tables = [plan.table() for plan in plans]
        words = self.upload(np.concatenate([*tables, np.zeros(1, np.int64)]))
        flags = self.zeros(max(1, len(jobs)), dtype="int32")
        at = words.data_ptr()
        costs: list[list[Tensor]] = []
        for j, (plan, table, (chunk, out)) in enumerate(zip(plans, tables, works, strict=True)):
            costs.append(self._walk_spans(plan, chunk, out, at, flags.data_ptr() + 4 * j))
            at += 8 * len(table)

        @cache  # what coding cost is added once
        def wait() -> list[bool]:
            bad = [bool(f) for f in flags.cpu().tolist()[: len(jobs)]]
            for (_, out), cost, is_bad in zip(works, costs, bad, strict=True):
                if isinstance(out, Coded) and out.residual is not None and not is_bad:
                    for sums in cost:
                        out.residual.add(*sums.tolist())
            return bad

        return wait

    def _walk_spans(
        self, plan: Plan, chunk: Chunk, out: Buffer | Coded, table: int, flag: int
    ) -> list[Tensor]:
        """Merge a chunk; returns what coding cost, [2] float64 of each span."""
        coded = isinstance(out, Coded)
        scratch = plan.drop is not None or coded or is_coded(chunk)
        unit = out.unit if isinstance(out, Coded) else 1
        costs = []
        for begin, span in spans(chunk, plan.drop, SPAN_OF[scratch], unit):
            part = out.slice(begin, begin + span.n)
            if isinstance(part, Buffer):
                self._walk_span(plan, self.dense(span), begin, part, table, flag)
                continue
            dtype = part.coding.dtype
            held = self.empty(span.n, dtype=dtype.torch)
            merged = Buffer(held.data_ptr(), dtype, span.n, held, self.device)
            self._walk_span(plan, self.dense(span), begin, merged, table, flag)
            encode(self, part, merged, flag)
            if part.residual is not None:
                costs.append(residual_of(self, part, merged))
        return costs

    def _walk_span(
        self, plan: Plan, span: Dense, begin: int, out: Buffer, table: int, flag: int
    ) -> None:
        from fastmerge.triton_kernels.fused import merge_elements_kernel

        ready = self.prepare(plan, span, begin)
        for a, n, programs, masked in self.pieces(span.n, self.tiles.block):
            part = sliced(span, a, a + n)
            to = out.address + a * out.dtype.itemsize
            r = ready.advanced(a, span.compute is DType.F64)
            self.launch(
                merge_elements_kernel, (programs,), part.base.address if part.base else 0,
                tuple(x.address for x in part.experts), to, table, r.given, r.thresholds,
                r.inverses, r.stride, flag, part.start, n, max(1, part.cols),
                OUT=out.dtype.code, MASKED=masked,
                **self.operand_flags(part, to, *given_of(r)), **plan.flags,
            )  # fmt: skip

    def refuses(self, walk: Walk) -> str | None:
        if walk.transform is not None and len(walk.transform.arguments) > MOST_ARGUMENTS:
            return (
                f"the stage {walk.transform.name!r} has {len(walk.transform.arguments)} arguments; "
                f"give it at most {MOST_ARGUMENTS}"
            )
        return None

    def refuses_coding(self, coding: Coding) -> str | None:
        return why_not_written(coding)

    def mask_span(self, plan: Plan, chunk: Dense, table: int, ready: Prepared) -> Tensor:
        """Return [K, n] uint8 of one span: what the keep stages leave."""
        from fastmerge.triton_kernels.fused import keep_elements_kernel

        stride = -(-chunk.n // 16) * 16
        out = self.empty(len(chunk.experts), stride, dtype="uint8")
        flags = {k: v for k, v in plan.flags.items() if k != "RESCALE"}
        for a, n, programs, masked in self.pieces(chunk.n, self.tiles.block):
            part = sliced(chunk, a, a + n)
            r = ready.advanced(a, chunk.compute is DType.F64)
            self.launch(
                keep_elements_kernel, (programs,),
                part.base.address if part.base else 0, tuple(x.address for x in part.experts),
                out.data_ptr() + a, table, r.given, r.thresholds, r.stride, stride,
                part.start, n, max(1, part.cols), HAS_BASE=part.base is not None, MASKED=masked,
                **self.operand_flags(part, *given_of(r)), **flags,
            )  # fmt: skip
        return out[:, : chunk.n]

    def keep_mask(self, keep: Keep, chunk: Chunk) -> Any:
        plan = lower_keep(keep, len(chunk.experts), chunk.compute is DType.F64)
        if chunk.n == 0 or not chunk.experts:
            return self._as_operands(self.zeros(len(chunk.experts), chunk.n, dtype="uint8"))
        table = self.upload(plan.table())
        dense = self.dense(chunk)
        ready = self.prepare(plan, dense)
        return self._as_operands(self.mask_span(plan, dense, table.data_ptr(), ready).contiguous())

    def keep_probability(self, drop: RankedDrop, chunk: Chunk) -> Any:
        p = self.empty(len(chunk.experts), chunk.n, dtype="float64")
        for k in range(len(chunk.experts) if chunk.n else 0):
            p[k] = self._probabilities(drop, chunk, k)
        return self._as_operands(p)

    def _as_operands(self, x: Tensor) -> Any:
        return x.numpy() if self.device == "cpu" else x

    def sweep(
        self, statistic: Statistic, n: int, cols: int, n_experts: int, compute: DType
    ) -> Sweep:
        from fastmerge.backends import triton_order, triton_sweeps

        wide = compute is DType.F64
        if isinstance(statistic, OrderStatistic):
            return triton_order.order_sweep(self, statistic, n, cols, n_experts, wide)
        if isinstance(statistic, Moments):
            return triton_sweeps.MomentSweep(self, statistic, n_experts, wide)
        if isinstance(statistic, Gram):
            return triton_sweeps.GramSweep(self, statistic, n, cols, n_experts, wide)
        return triton_sweeps.BalanceSweep(self, statistic, n_experts, wide)


#: By whether scratch memory is made, for a ranked drop or for codes: a walk without it is cut by nothing.
SPAN_OF = {True: 1 << 23, False: 1 << 62}


def given_of(ready: Prepared) -> tuple[int, ...]:
    """Return the addresses of masks from outside, if there are any."""
    return ready.given if isinstance(ready.given, tuple) else ()


def aligned(*addresses: int) -> bool:
    """Return whether 16-byte loads can go to all of them."""
    return all(a % 16 == 0 for a in addresses)
