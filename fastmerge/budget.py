"""How much memory a merge takes, on the host and on a device, and what has to be streamed to stay in it."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from fastmerge.backends import CHUNK_ELEMENTS, MOST_DECIDED
from fastmerge.backends.cuda_order import whole_bytes
from fastmerge.backends.streamed_order import scratch_bytes
from fastmerge.backends.triton_plan import SPAN
from fastmerge.checkpoint.coded import CodedInfo
from fastmerge.dtypes import DType
from fastmerge.errors import DeviceMemoryError, RecipeError
from fastmerge.gptq_rounding import scratch_bytes as scratch_bytes_of_rounding
from fastmerge.jobs import (
    DEVICE_ITEM_BYTES,
    ITEM_BYTES,
    ITEM_TENSORS,
    MIB,
    Action,
    Piece,
    TensorJob,
    WorkItem,
    results_of,
    split,
    work_items,
)
from fastmerge.registry import Scope
from fastmerge.stages import Axis, Joined, Matrices, Moments, OrderStatistic, RankedDrop, Statistic
from fastmerge.streaming.ring import ALIGNMENT, BLOCK, DIRECT_LEAST, READ_AHEAD

if TYPE_CHECKING:
    from fastmerge.planner import Plan
    from fastmerge.streaming.device import Device, Memory

#: Results that wait to be written, at most, and the least memory for them.
WRITE_BEHIND = 4
RESULT_BYTES = 4 * MIB

#: What the process holds before any tensor: interpreter, numpy, pydantic, kernels (measured: 50 MiB).
PROCESS_BYTES = 56 * MIB

#: What torch takes beside that, where it decomposes (measured with its CPU build).
TORCH_BYTES = 280 * MIB

#: The same with torch and a device's driver. From torch's CPU build (measured: 330 MiB) and what is told of
#: CUDA's context; not yet measured on a GPU.
DEVICE_PROCESS_BYTES = 1200 * MIB

#: What an operand takes beside its bytes: a mapped file comes in pages of up to two MiB.
EDGE_BYTES = MIB

#: Bytes of one read and one copy over the link, and how many of them the pinned rings hold: those that are
#: being read, and so many copies queued that the link has work while the host waits for a statistic.
BLOCK_BYTES = 64 * MIB
BLOCKS_IN, BLOCKS_OUT = 16, 6

#: Pinned memory at most, unless asked for more: locking pages takes 0.1 to 0.3 s per GB.
PINNED_BYTES = 4096 * MIB

#: A device's memory for what kernels need of their own, at least, and the share of its free memory to use.
DEVICE_SCRATCH_BYTES = 64 * MIB
DEVICE_SHARE = 0.9


@dataclass(frozen=True)
class Target:
    """A device to plan for: its name, the bytes of its memory that are ours, the backend that runs there."""

    name: str
    memory: int
    backend: str = "cuda"


@dataclass(frozen=True)
class DeviceBudget:
    """Bytes on a device and of pinned host memory. block: of one read and one copy."""

    target: Target
    operands: int
    results: int
    scratch: int
    block: int
    pinned_in: int
    pinned_out: int

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def limit(self) -> int:
        return self.target.memory

    @property
    def total(self) -> int:
        return self.operands + self.results + self.scratch

    @property
    def pinned(self) -> int:
        return self.pinned_in + self.pinned_out


def available_memory() -> int:
    """Return the host memory that is free now, cgroup limits respected."""
    available = 2 << 30
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit != "max":
            available = min(available, max(0, int(limit) - used))
    except (OSError, ValueError):
        pass  # not Linux, or no cgroup: the guess above, or MemAvailable alone
    return available


def default_memory() -> int:
    """Return 40 % of what is free now."""
    return max(512 * MIB, int(available_memory() * 0.4))


def _first_statistic(plan: Plan, job: TensorJob) -> Statistic | None:
    """Return what a job's recipe asks for first, if anything."""
    if job.action is not Action.MERGE or job.scope in (Scope.ELEMENT, Scope.MATRIX):
        return None
    assert job.params is not None
    recipe = plan.spec.recipe(job.params, job.context(plan.seed, plan.n_model))
    request = next(recipe, None)
    recipe.close()
    assert not isinstance(request, Matrices | Joined)
    return request


def _rounding(job: TensorJob, n: int, device: str) -> int:
    """Bound what rounding with a Hessian takes, of n elements at once."""
    rounded = job.stored is not None and job.stored.hessian is not None
    return scratch_bytes_of_rounding(job.cols, n, device) if rounded else 0


def _scratch(plan: Plan, job: TensorJob) -> int:
    """Bound the kernels' own memory for one job, by the statistic that its recipe asks for first.

    A rank cut of n elements samples s of them and keeps what lies in its bracket, about 4 / sqrt(s) of all,
    more where neighbours are alike, 10 bytes each (csrc/cpu/order.cpp). Drops keep a bit of each element for
    the walk, or rank a chunk (csrc/cpu/sweeps.hpp).
    """
    if job.scope is Scope.MATRIX:
        return plan.cost(job).memory
    request = _first_statistic(plan, job)
    experts = len(job.experts)
    n = plan.n_model if job.scope is Scope.MODEL else job.n
    if isinstance(request, OrderStatistic) and request.scope != "row":
        n_cuts = 1 if request.of == "variance" else sum(max(1, len(r)) for r in request.ranks)
        sample = 16 * min(max(n // 2048, 1024), 1 << 16)
        held = int(10 * n * 4 * (2 / sample) ** 0.5)
        span = 10 * (1 << 15) * (os.cpu_count() or 1)
        return n_cuts * (min(held, 10 * n) + span) + experts * 10 * sample
    drop = request.keep.drop if isinstance(request, Moments) else None
    if isinstance(drop, RankedDrop) and (drop.axis is not Axis.ROW or job.cols % 64):
        ranked = n if drop.axis is not Axis.ROW else min(n, CHUNK_ELEMENTS)
        return ranked * (4 * experts + 16 * (os.cpu_count() or 1))
    return experts * n // 8 if drop is not None and n <= MOST_DECIDED else 0


def fit_host(plan: Plan) -> None:
    """Choose the rings' sizes and which tensors are too large to be held whole."""
    if not plan.jobs:
        return
    largest_parts = [p for j in plan.jobs if (p := next(results_of(j), None))]  # as large as any
    results = max((p.bytes_out + 2 * BLOCK * len(p.places) for p in largest_parts), default=0)
    plan.result_bytes = max(WRITE_BEHIND * results, RESULT_BYTES)
    most = max(len(j.operands) for j in plan.jobs)
    budget = plan.max_memory - plan.process_bytes - plan.result_bytes - most * EDGE_BYTES
    scratch = {
        j.name: _scratch(plan, j) + _rounding(j, min(j.n, CHUNK_ELEMENTS), "cpu") for j in plan.jobs
    }
    whole = {j.name: WorkItem((Piece(j, 0, j.n),)).memory for j in plan.jobs if j.is_whole and j.n}
    streamed = {name for name, size in whole.items() if size + scratch[name] > budget}
    plan.streamed = frozenset(streamed)
    held_scratch = max((n for name, n in scratch.items() if name not in streamed), default=0)
    sizes = [i.memory for i in work_items(plan.jobs, plan.streamed)]
    largest = max(sizes, default=0)
    ahead = READ_AHEAD * ITEM_BYTES
    if plan.flops:  # the next matrix is read while one is decomposed
        ahead = max(ahead, max((a + b for a, b in pairwise(sizes)), default=0) - largest)
    plan.operand_bytes = max(largest, min(budget - held_scratch, largest + ahead))
    working = plan.operand_bytes + held_scratch
    if streamed:
        pieces = (next(split(j)) for j in plan.jobs if j.name in streamed)
        item = max(WorkItem((piece,)).memory for piece in pieces)
        stream_scratch = max(scratch[name] for name in streamed)
        room_left = min(budget - stream_scratch, (READ_AHEAD + 2) * item)
        plan.stream_bytes = max(2 * item, room_left)
        working = max(working, plan.stream_bytes + stream_scratch)
    plan.working_bytes = working
    too_large = [j.name for j in plan.jobs if j.needs_whole and j.name in streamed]
    needed = max([plan.working_bytes, *(whole[n] + scratch[n] for n in too_large)])
    if needed > budget:
        raise RecipeError(
            f"max-memory of {plan.max_memory // MIB} MiB is too little for this merge; "
            f"give at least {-(-(plan.max_memory - budget + needed) // MIB)} MiB"
        )


# ---- on a device -----------------------------------------------------------------------------------


def target_of(device: Device, most: int | None, backend: str) -> Target:
    """Return what to plan for on an open device: `most` bytes of its memory, or most of what is free.

    Raises:
        DeviceMemoryError: `most` is more than that.
    """
    free = int(device.free_bytes() * DEVICE_SHARE)
    if most is not None and most > free:
        raise DeviceMemoryError(
            f"max-vram of {most >> 20} MiB is more than {device.name} has free, {free >> 20} MiB; "
            "lower it or free the device"
        )
    return Target(device.name, most or free, backend)


def fit_device(
    plan: Plan, target: Target, max_pinned: int | None = None, block: int | None = None
) -> None:
    """Choose the rings of a device and of pinned memory; see `fit_host`.

    Two groups of operands are in flight, one filling while the kernels read the other. A tensor whose group
    does not fit is streamed. block: of rings of pinned memory that exist already.
    """
    if not plan.jobs:
        return
    block = block or _block(plan, _pinned(plan, max_pinned))
    item = DEVICE_ITEM_BYTES
    limit = target.memory
    while (needed := _fit_device(plan, target, item, block)) > limit and item > MIB:
        item //= 2
    if needed > limit:  # what is held whole may keep too little for what is streamed
        needed = _fit_device(plan, target, item, block, hold=False)
    if needed > limit:
        raise RecipeError(
            f"max-vram of {limit // MIB} MiB is too little for this merge; "
            f"give at least {-(-needed // MIB)} MiB"
        )


def _pinned(plan: Plan, most: int | None) -> int:
    """Return the pinned memory to use at most."""
    left = plan.max_memory - DEVICE_PROCESS_BYTES
    if most is None:
        return min(PINNED_BYTES, left)
    if most > left:
        raise RecipeError(
            f"max-pinned of {most // MIB} MiB and {DEVICE_PROCESS_BYTES // MIB} MiB for the process "
            f"are more than max-memory, {plan.max_memory // MIB} MiB; lower one or raise the other"
        )
    return most


def _block(plan: Plan, pinned: int) -> int:
    """Return the bytes of a block: a power of two, so that direct reads may end where one does."""
    total = sum(j.bytes_in for j in plan.jobs)
    wanted = min(BLOCK_BYTES, max(MIB, total // 8))
    block = BLOCK_BYTES
    while block > wanted or (BLOCKS_IN + BLOCKS_OUT) * (block + _edges(plan, block)) > pinned:
        block //= 2
        if block < MIB // 4:
            raise RecipeError(
                f"{max(pinned, 0) // MIB} MiB of pinned memory are too little for this merge; "
                f"give a max-memory of at least {(DEVICE_PROCESS_BYTES // MIB) + 64} MiB"
            )
    return block


def _edges(plan: Plan, block: int) -> int:
    """Return the most that alignment adds to a block: small runs, and large ones moved to direct reads."""
    most = ITEM_TENSORS * max(len(j.operands) for j in plan.jobs)
    return most * ALIGNMENT + min(most, block // DIRECT_LEAST + 1) * BLOCK


def _fit_device(plan: Plan, target: Target, item_bytes: int, block: int, hold: bool = True) -> int:
    """Set the plan's budget for work items of a size; return the bytes needed at least.

    hold: whether tensors that fit are held whole.
    """
    plan.item_bytes = item_bytes
    results = 0
    for job in plan.jobs:
        for part in islice(results_of(job, item_bytes), 1):  # the first is as large as any
            # Small ones are run together, up to an item's bytes of input; a large whole one comes seldom.
            most = max(part.bytes_out, part.bytes_out * item_bytes // max(1, part.bytes_in))
            behind = 2 if part.bytes_in > item_bytes else WRITE_BEHIND
            stored = ITEM_TENSORS * len(part.places)
            results = max(results, behind * (most + stored * ALIGNMENT))
    results = min(results, sum(j.bytes_out + len(j.places(0, j.n)) * ALIGNMENT for j in plan.jobs))
    scratch = {
        j.name: _device_scratch(plan, j, j.n, item_bytes, target.backend)
        + _rounding(j, next(results_of(j, item_bytes)).n, "cuda")
        for j in plan.jobs
        if j.n
    }
    budget = target.memory - results - DEVICE_SCRATCH_BYTES
    whole = {
        j.name: WorkItem((Piece(j, 0, j.n),)).device_memory for j in plan.jobs if j.is_whole and j.n
    }
    pieces = {j.name: next(split(j, item_bytes)) for j in plan.jobs if j.name in whole}
    late = {
        n: _device_scratch(plan, p.job, p.n, item_bytes, target.backend)
        + _rounding(p.job, p.n, "cuda")
        for n, p in pieces.items()
    }
    plan.streamed, held = frozenset() if hold else frozenset(whole), 0
    while True:  # what is streamed frees scratch memory of what is held, and takes some itself
        held = max((late[n] if n in plan.streamed else s for n, s in scratch.items()), default=0)
        more = {n for n, size in whole.items() if size + held > budget} | plan.streamed
        if more == plan.streamed:
            break
        # The one with most scratch first: without it, others may fit.
        plan.streamed |= {max(more - plan.streamed, key=lambda n: (scratch[n] + whole[n], n))}
    sizes = [i.device_memory for i in work_items(plan.jobs, plan.streamed, item_bytes)]
    pair = max((a + b for a, b in pairwise(sizes)), default=0)
    wanted = max(pair, 3 * _usual(sizes))
    largest = max(sizes, default=0)
    if plan.streamed:
        piece = max(WorkItem((pieces[n],)).device_memory for n in plan.streamed)
        largest, wanted = max(largest, 2 * piece), max(wanted, 3 * piece)
    operands = max(largest, min(budget - held, wanted))
    too_large = [j.name for j in plan.jobs if j.needs_whole and j.name in plan.streamed]
    most = max([largest + held, *(whole[n] + scratch[n] for n in too_large)])
    edges = _edges(plan, block)
    plan.device = DeviceBudget(
        target,
        operands,
        results,
        DEVICE_SCRATCH_BYTES + held,
        block,
        BLOCKS_IN * (block + edges),
        BLOCKS_OUT * (block + 2 * BLOCK),
    )
    return results + DEVICE_SCRATCH_BYTES + most


def take_memory(plan: Plan, device: Device, warnings: list[str]) -> tuple[Memory, Memory]:
    """Take the device memory of a plan, for operands and for results; with less, where another process was
    quicker, which changes the plan and is told.

    Raises:
        DeviceMemoryError: there is too little for the smallest plan.
    """
    while True:
        assert plan.device is not None
        budget, operands = plan.device, None
        try:
            operands = device.allocate(budget.operands)
            return operands, device.allocate(budget.results)
        except DeviceMemoryError as error:
            if operands is not None:
                device.release(operands)
            try:
                less = replace(budget.target, memory=budget.limit // 2)
                fit_device(plan, less, block=budget.block)
            except RecipeError:
                raise error from None
            warnings.append(f"{error}; going on with {less.memory >> 20} MiB")


def _usual(sizes: list[int]) -> int:
    """Return the size below which items of nine tenths of all bytes are."""
    left = 0.9 * sum(sizes)
    for size in sorted(sizes):
        left -= size
        if left <= 0:
            return size
    return 0


def _device_scratch(plan: Plan, job: TensorJob, n: int, item_bytes: int, backend: str) -> int:
    """Bound what kernels on a device allocate for n elements of a job at once, and for its walk's parts.

    Keys of one expert (Triton), or what cuts in pieces take; ranks of a ranked drop, 4 bytes each and, where
    rows are not sorted in place, keys, their order and its inverse; decisions, a bit each; codes as float32
    (Triton); a result before it is coded (CUDA).
    """
    request = _first_statistic(plan, job)
    if job.scope is Scope.MATRIX:
        return plan.cost(job).memory
    coded = _decoded(job, n, request) if backend == "triton" else 0
    if backend == "cuda" and job.stored:
        coded = n * job.stored.coding.dtype.itemsize
    return coded + _statistic_scratch(plan, job, request, n, item_bytes, backend)


def _decoded(job: TensorJob, n: int, request: Statistic | None) -> int:
    """Bound what operands take as float32, and a result before it is coded and decoded again."""
    operands = sum(isinstance(o.info, CodedInfo) for o in job.operands)
    result = job.stored.coding.dtype.itemsize + 3 * 4 if job.stored else 0
    drop = request.keep.drop if isinstance(request, Moments) else None
    whole = isinstance(drop, RankedDrop) and drop.axis is not Axis.ROW
    return (n if whole else min(n, SPAN)) * (4 * operands + result)


def _statistic_scratch(
    plan: Plan, job: TensorJob, request: Statistic | None, n: int, item_bytes: int, backend: str
) -> int:
    experts, wide = len(job.experts), job.compute is DType.F64
    word = 8 if wide else 4
    if isinstance(request, OrderStatistic):
        over_model, rows = job.scope is Scope.MODEL, request.scope == "row"
        variance = request.of == "variance"
        n_keys = 1 if variance else experts
        n_ranks = max(1, len(request.ranks[0])) if request.ranks else 1
        if not rows and (n < job.n or over_model):
            part = min(n, next((p.n for p in split(job, item_bytes)), 0))
            whole = plan.n_model if over_model else job.n
            streamed = scratch_bytes(whole, part, n_keys, n_ranks, wide)
            return max(n * word if backend == "triton" else 0, streamed)
        if backend == "cuda":
            return whole_bytes(n, n_keys, n_ranks, variance, wide, rows)
        return n * word if backend == "triton" else 0
    drop = request.keep.drop if isinstance(request, Moments) else None
    if isinstance(drop, RankedDrop):
        sorts = drop.axis is not Axis.ROW or wide
        return experts * n * ((word + 8 + 8 + 4 + 4) if sorts else 8) + experts * n // 8
    return experts * n // 8 if drop is not None else 0


def device_passes(plan: Plan, job: TensorJob) -> int:
    """Return how many readings of a job's operands in a device's memory its kernels take the time of: a rank
    cut some four (one, with the brackets and candidates around it), other statistics one; the walk one."""
    request = _first_statistic(plan, job)
    if isinstance(request, OrderStatistic):
        return 5
    return 1 if request is None else 2
