"""Recipe and headers to a plan: what is merged, copied or in conflict, in how much memory.

Pure data: nothing here reads a weight. The engine carries a plan out; `fastmerge plan` prints it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from fastmerge.backends import CHUNK_ELEMENTS, MOST_DECIDED
from fastmerge.checkpoint import (
    Checkpoint,
    Layout,
    OutputTensor,
    TensorInfo,
    open_checkpoint,
    plan_layout,
)
from fastmerge.dtypes import DType, promote
from fastmerge.errors import ConflictError, RecipeError
from fastmerge.recipe import LayerPositions, Recipe
from fastmerge.registry import MethodSpec, Params, Scope, TensorContext
from fastmerge.streaming.ring import BLOCK, READ_AHEAD, room
from fastmerge.stages import Axis, Moments, OrderStatistic, RankedDrop

MIB = 1 << 20

#: Input bytes of one work item: large enough for the disk, small enough to stay in a last-level cache.
ITEM_BYTES = 16 * MIB
ITEM_TENSORS = 256

#: Results that wait to be written, at most, and the least memory for them.
WRITE_BEHIND = 4
RESULT_BYTES = 4 * MIB

#: What the process holds before any tensor: interpreter, numpy, pydantic, kernels (measured: 50 MiB).
PROCESS_BYTES = 56 * MIB

#: What an operand takes beside its bytes: a mapped file comes in pages of up to two MiB.
EDGE_BYTES = MIB

#: Names under which an output head may be tied to an embedding, nearest first.
HEAD = "lm_head.weight"
EMBEDDINGS = (
    "model.embed_tokens.weight",
    "transformer.wte.weight",
    "gpt_neox.embed_in.weight",
    "model.decoder.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "transformer.word_embeddings.weight",
)


class Action(Enum):
    MERGE = "merge"
    COPY = "copy"  # one operand, converted to the output type if need be
    COPY_EQUAL = "copy if equal"  # integers: all operands should hold the same bytes


@dataclass(frozen=True)
class Operand:
    """One input's tensor: the model's name for messages and where its bytes are."""

    model: str
    info: TensorInfo


@dataclass(frozen=True)
class TensorJob:
    """One output tensor. base is set for delta methods only; experts are the recipe's other operands."""

    name: str
    shape: tuple[int, ...]
    action: Action
    out_dtype: DType
    compute: DType
    base: Operand | None
    experts: tuple[Operand, ...]
    scope: Scope = Scope.ELEMENT
    params: Params | None = None

    @property
    def operands(self) -> tuple[Operand, ...]:
        return ((self.base,) if self.base else ()) + self.experts

    @property
    def n(self) -> int:
        return math.prod(self.shape)

    @property
    def cols(self) -> int:
        return max(1, self.shape[-1]) if self.shape else 1

    @property
    def bytes_in(self) -> int:
        return sum(o.info.n_bytes for o in self.operands)

    @property
    def bytes_out(self) -> int:
        return self.n * self.out_dtype.itemsize

    @property
    def is_whole(self) -> bool:
        """Whether all of the tensor should be in memory at once."""
        return self.action is Action.MERGE and self.scope in (Scope.TENSOR, Scope.WHOLE)

    def context(self, seed: int, n_model: int) -> TensorContext:
        return TensorContext(
            self.name, self.shape, len(self.experts), self.base is not None, seed, n_model
        )


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + n) of one job."""

    job: TensorJob
    start: int
    n: int

    @property
    def bytes_in(self) -> int:
        return sum(self.n * o.info.dtype.itemsize for o in self.job.operands)

    @property
    def bytes_out(self) -> int:
        return self.n * self.job.out_dtype.itemsize


@dataclass(frozen=True)
class WorkItem:
    """What is read, merged and written together."""

    pieces: tuple[Piece, ...]

    @property
    def memory(self) -> int:
        """Bytes of ring memory that the operands take."""
        return sum(room(p.n * o.info.dtype.itemsize) for p in self.pieces for o in p.job.operands)


@dataclass(frozen=True)
class Finding:
    """Something a user should know before work starts; conflicts stop it."""

    conflict: bool
    text: str


@dataclass
class Plan:
    """Everything that is decided before the first byte is merged."""

    recipe: Recipe
    spec: MethodSpec
    checkpoints: list[Checkpoint]
    donor: int
    jobs: list[TensorJob]
    findings: list[Finding]
    layout: Layout | None
    seed: int
    max_memory: int
    operand_bytes: int = 0  # of memory for operands, while tensors are held whole
    stream_bytes: int = 0  # the same while those that are too large are streamed
    result_bytes: int = 0
    working_bytes: int = 0  # the most that operands and kernels take together
    n_model: int = 0
    allow_missing: bool = False
    streamed: frozenset[str] = field(default_factory=frozenset)

    @property
    def conflicts(self) -> list[str]:
        return [f.text for f in self.findings if f.conflict]

    @property
    def warnings(self) -> list[str]:
        return [f.text for f in self.findings if not f.conflict]

    @property
    def bytes_read(self) -> int:
        """Bytes the engine reads: all operands once, and once more per extra pass."""
        return sum(j.bytes_in * (1 + self.extra_passes(j)) for j in self.jobs)

    @property
    def bytes_written(self) -> int:
        return sum(j.bytes_out for j in self.jobs)

    @property
    def peak_memory(self) -> int:
        most = max((len(j.operands) for j in self.jobs), default=0)
        return PROCESS_BYTES + self.result_bytes + self.working_bytes + most * EDGE_BYTES

    def extra_passes(self, job: TensorJob) -> int:
        """Reads of a job's operands before its walk, as planned: a rank cut takes two (a bracket that
        misses costs more), other statistics one."""
        if job.scope is Scope.MODEL or job.name in self.streamed:
            return 3
        return 0

    def raise_conflicts(self) -> None:
        if self.conflicts:
            more = len(self.conflicts) - 1
            rest = f" (and {more} more; see `fastmerge plan`)" if more else ""
            raise ConflictError(self.conflicts[0] + rest)

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-able data (`fastmerge plan --json`)."""
        return {
            "method": self.spec.name,
            "inputs": [str(c.path) for c in self.checkpoints],
            "base": None
            if self.recipe.base is None
            else str(self.checkpoints[self.recipe.base].path),
            "tensors": len(self.jobs),
            "merged": sum(j.action is Action.MERGE for j in self.jobs),
            "copied": sum(j.action is not Action.MERGE for j in self.jobs),
            "parameters": sum(j.n for j in self.jobs),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "shards": [s.file_name for s in self.layout.shards] if self.layout else [],
            "peak_memory": self.peak_memory,
            "disk": self.layout.disk_bytes if self.layout else 0,
            "conflicts": self.conflicts,
            "warnings": self.warnings,
        }


def make_plan(
    recipe: Recipe,
    *,
    out_shard_size: int = 5_000_000_000,
    max_memory: int | None = None,
    allow_missing: bool = False,
    strict: bool = False,
    seed: int = 0,
) -> Plan:
    """Read all headers and decide everything that can be decided without reading a weight.

    Raises:
        CheckpointError, RecipeError: an input or the recipe itself is wrong. Conflicts among inputs
            do not raise: they are listed in `Plan.conflicts`.
    """
    spec = recipe.spec()
    checkpoints = [open_checkpoint(recipe.path(i)) for i in range(len(recipe.inputs))]
    donor = recipe.base if recipe.base is not None else 0
    names = list(checkpoints[donor].tensors)
    seen = set(names)
    for checkpoint in checkpoints:
        names += [n for n in checkpoint.tensors if not (n in seen or seen.add(n))]  # type: ignore[func-returns-value]
    builder = _Builder(recipe, spec, checkpoints, names, donor, allow_missing, strict)
    jobs = [job for name in names if (job := builder.job(name)) is not None]
    findings = [Finding(strict, w) for w in recipe.warnings] + builder.findings
    if not jobs and not builder.findings:
        findings.append(Finding(True, "the inputs hold no tensors"))
    layout = None
    if jobs:
        layout = plan_layout(
            [OutputTensor(j.name, j.out_dtype, j.shape) for j in jobs], out_shard_size
        )
    plan = Plan(
        recipe,
        spec,
        checkpoints,
        donor,
        jobs,
        findings,
        layout,
        seed,
        max_memory or default_memory(),
        n_model=sum(j.n for j in jobs if j.action is Action.MERGE),
        allow_missing=allow_missing,
    )
    _fit_memory(plan)
    return plan


class _Builder:
    """Decides each output tensor's job, collecting findings on the way."""

    def __init__(
        self,
        recipe: Recipe,
        spec: MethodSpec,
        checkpoints: Sequence[Checkpoint],
        names: Sequence[str],
        donor: int,
        allow_missing: bool,
        strict: bool,
    ) -> None:
        self.recipe, self.spec, self.checkpoints = recipe, spec, checkpoints
        self.donor, self.allow_missing, self.strict = donor, allow_missing, strict
        self.layers = LayerPositions.from_names(names, checkpoints[donor].config)
        self.findings: list[Finding] = []
        self.labels = [str(i.ref) for i in recipe.inputs]
        self.delta_base = None if spec.base_is_operand or spec.base == "ignored" else recipe.base
        self.order = recipe.operands()

    def conflict(self, text: str) -> None:
        self.findings.append(Finding(True, text))

    def lookup(self, index: int, name: str) -> TensorInfo | None:
        """Find an input's tensor; a head that it lacks is its tied embedding."""
        tensors = self.checkpoints[index].tensors
        found = tensors.get(name)
        if found is None and name == HEAD:
            found = next((tensors[e] for e in EMBEDDINGS if e in tensors), None)
        return found

    def job(self, name: str) -> TensorJob | None:
        found = {i: t for i in range(len(self.checkpoints)) if (t := self.lookup(i, name))}
        first_index = self.donor if self.donor in found else next(iter(found))
        first = found[first_index]
        for i, info in found.items():
            if info.shape != first.shape:
                self.conflict(
                    f"{name!r} is {list(first.shape)} in {self.labels[first_index]!r} but "
                    f"{list(info.shape)} in {self.labels[i]!r}; merge models of one shape"
                )
                return None
            if info.dtype.is_merged != first.dtype.is_merged:
                self.conflict(
                    f"{name!r} is {first.dtype.torch} in {self.labels[first_index]!r} but "
                    f"{info.dtype.torch} in {self.labels[i]!r}; convert one of them first"
                )
                return None
        if first.dtype in (DType.F8_E4M3, DType.F8_E5M2):
            self.conflict(
                f"{name!r} in {self.labels[first_index]!r} is {first.dtype.torch}, which is quantised; "
                "dequantise the checkpoint to bfloat16 first"
            )
            return None
        if not first.dtype.is_merged:
            return self.integer_job(name, found, first_index)
        return self.float_job(name, found, first)

    def integer_job(self, name: str, found: dict[int, TensorInfo], first: int) -> TensorJob:
        missing = [self.labels[i] for i in range(len(self.checkpoints)) if i not in found]
        if missing:
            text = f"{name!r} ({found[first].dtype.torch}) is missing in {_listed(missing)}; it is copied"
            self.findings.append(Finding(self.strict, f"{text} from {self.labels[first]!r}"))
        order = [first, *(i for i in found if i != first)]
        operands = tuple(Operand(self.labels[i], found[i]) for i in order)
        info = found[first]
        return TensorJob(name, info.shape, Action.COPY_EQUAL, info.dtype, DType.F32, None, operands)

    def float_job(
        self, name: str, found: dict[int, TensorInfo], first: TensorInfo
    ) -> TensorJob | None:
        spec = self.spec
        missing = [i for i in range(len(self.checkpoints)) if i not in found]
        if missing and not self.allow_missing:
            self.conflict(
                f"{name!r} is missing in {_listed([self.labels[i] for i in missing])} but present in "
                f"{_listed([self.labels[i] for i in found])}; --allow-missing merges what is there"
            )
            return None
        present = [i for i in self.order if i in found]
        dtypes = [t.dtype for t in found.values()]
        out = self.recipe.out_dtype or self.recipe.dtype or promote(dtypes)
        wide = DType.F64 in dtypes or self.recipe.dtype is DType.F64
        compute = DType.F64 if wide else DType.F32
        base = self.delta_base
        has_base = base is not None and base in found
        if missing:
            kept = self.reduced(name, found, present, has_base)
            if kept is not None:
                operand = Operand(self.labels[kept], found[kept])
                return TensorJob(name, first.shape, Action.COPY, out, compute, None, (operand,))
            if base is not None and not has_base and spec.base == "required":
                self.conflict(
                    f"{name!r} is missing in the base {self.labels[base]!r}, which {spec.name} needs; "
                    "remove it from the experts or choose a base that has it"
                )
                return None
            if len(present) < spec.n_inputs[0]:
                self.conflict(
                    f"{name!r} is in {len(present)} inputs, but {spec.name} needs {spec.n_inputs[0]}; "
                    "give it to more inputs or remove it"
                )
                return None
        params = self.recipe.params_for(name, lambda: self.layers.t(name))
        if len(present) < len(self.order):
            params = self.params_of(params, present)
        return TensorJob(
            name,
            first.shape,
            Action.MERGE,
            out,
            compute,
            Operand(self.labels[base], found[base]) if base is not None and has_base else None,
            tuple(Operand(self.labels[i], found[i]) for i in present),
            spec.scope_for(params),
            params,
        )

    def reduced(
        self, name: str, found: dict[int, TensorInfo], present: list[int], has_base: bool
    ) -> int | None:
        """Return the input to copy when too few inputs have a tensor and the method's policy is to copy."""
        spec = self.spec
        source = None
        if not present and has_base:
            source = self.delta_base
        elif len(found) == 1 and (spec.on_few == "copy_single" or spec.base == "required"):
            source = next(iter(found))
        elif len(present) < spec.n_inputs[0] and spec.on_few == "copy_base" and has_base:
            source = self.delta_base
        if source is not None:
            text = f"{name!r} is copied from {self.labels[source]!r}: too few inputs have it"
            self.findings.append(Finding(False, text))
        return source

    def params_of(self, params: Params, present: list[int]) -> Params:
        """Keep the per-input values of the operands that have the tensor."""
        at = [self.order.index(i) for i in present]
        kept = dict(vars(params))
        for param in self.spec.params:
            if param.scope != "shared":
                key = "lambda_" if param.name == "lambda" else param.name
                kept[key] = [kept[key][j] for j in at]
        return Params(**kept)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(n) for n in names)


# ---- memory ----------------------------------------------------------------------------------------


def default_memory() -> int:
    """Return 40 % of what is free now, cgroup limits respected."""
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
    return max(512 * MIB, int(available * 0.4))


def _scratch(plan: Plan, job: TensorJob) -> int:
    """Bound the kernels' own memory for one job, by the statistic that its recipe asks for first.

    A rank cut of n elements samples s of them and keeps what lies in its bracket, about 4 / sqrt(s) of all,
    more where neighbours are alike, 10 bytes each (csrc/cpu/order.cpp). Drops keep a bit of each element for
    the walk, or rank a chunk (csrc/cpu/sweeps.hpp).
    """
    if job.action is not Action.MERGE or job.scope is Scope.ELEMENT:
        return 0
    assert job.params is not None
    recipe = plan.spec.recipe(job.params, job.context(plan.seed, plan.n_model))
    request = next(recipe, None)
    recipe.close()
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


def _fit_memory(plan: Plan) -> None:
    """Choose the rings' sizes and which tensors are too large to be held whole."""
    if not plan.jobs:
        return
    largest_parts = (next(results_of(j), None) for j in plan.jobs)  # the first is as large as any
    results = max((p.bytes_out + 2 * BLOCK for p in largest_parts if p), default=0)
    plan.result_bytes = max(WRITE_BEHIND * results, RESULT_BYTES)
    most = max(len(j.operands) for j in plan.jobs)
    budget = plan.max_memory - PROCESS_BYTES - plan.result_bytes - most * EDGE_BYTES
    scratch = {j.name: _scratch(plan, j) for j in plan.jobs}
    whole = {j.name: WorkItem((Piece(j, 0, j.n),)).memory for j in plan.jobs if j.is_whole}
    streamed = {name for name, size in whole.items() if size + scratch[name] > budget}
    plan.streamed = frozenset(streamed)
    held_scratch = max((n for name, n in scratch.items() if name not in streamed), default=0)
    largest = max((i.memory for i in work_items(plan, plan.jobs)), default=0)
    ahead = READ_AHEAD * ITEM_BYTES
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
    too_large = [j.name for j in plan.jobs if j.scope is Scope.WHOLE and j.name in streamed]
    needed = max([plan.working_bytes, *(whole[n] + scratch[n] for n in too_large)])
    if needed > budget:
        raise RecipeError(
            f"max-memory of {plan.max_memory // MIB} MiB is too little for this merge; "
            f"give at least {-(-(plan.max_memory - budget + needed) // MIB)} MiB"
        )


def results_of(job: TensorJob) -> Iterator[Piece]:
    """Cut a job into the pieces that its walk is run and written in."""
    if job.is_whole and job.scope is Scope.WHOLE:
        yield Piece(job, 0, job.n)
    else:
        yield from split(job)


def split(job: TensorJob, item_bytes: int = ITEM_BYTES) -> Iterator[Piece]:
    """Cut a job into pieces of about `item_bytes` of input: whole rows, or 4096s of a long row."""
    per_element = sum(o.info.dtype.itemsize for o in job.operands)
    step = max(4096, item_bytes // per_element)
    step = step // job.cols * job.cols if job.cols <= step else step // 4096 * 4096
    for start in range(0, job.n, step):
        yield Piece(job, start, min(step, job.n - start))


def work_items(plan: Plan, jobs: Sequence[TensorJob]) -> Iterator[WorkItem]:
    """Batch small jobs and cut large ones, in output order; jobs too large to hold whole are left out."""
    batch: list[Piece] = []
    size = 0
    for job in jobs:
        if job.name in plan.streamed:
            continue
        whole = job.bytes_in <= ITEM_BYTES
        if whole and size + job.bytes_in <= ITEM_BYTES and len(batch) < ITEM_TENSORS:
            batch.append(Piece(job, 0, job.n))
            size += job.bytes_in
            continue
        if batch:
            yield WorkItem(tuple(batch))
            batch, size = [], 0
        if whole:
            batch, size = [Piece(job, 0, job.n)], job.bytes_in
        elif job.is_whole:
            yield WorkItem((Piece(job, 0, job.n),))
        else:
            yield from (WorkItem((piece,)) for piece in split(job))
    if batch:
        yield WorkItem(tuple(batch))
