"""Recipe and headers to a plan: what is merged, copied or in conflict, in how much memory.

Pure data: nothing here reads a weight. The engine carries a plan out; `fastmerge plan` prints it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastmerge.budget import (
    DEVICE_PROCESS_BYTES,
    EDGE_BYTES,
    PROCESS_BYTES,
    TORCH_BYTES,
    DeviceBudget,
    Target,
    default_memory,
    fit_device,
    fit_host,
)
from fastmerge.checkpoint import (
    EMBEDDINGS,
    HEAD,
    Checkpoint,
    Layout,
    TensorInfo,
)
from fastmerge.checkpoint.coded import CodedInfo
from fastmerge.coding import Format
from fastmerge.dtypes import DType, promote
from fastmerge.errors import ConflictError
from fastmerge.jobs import ITEM_BYTES, Action, Operand, TensorJob
from fastmerge.quant.opening import open_model
from fastmerge.quant.quantize import Quantize
from fastmerge.recipe import LayerPositions, Recipe
from fastmerge.registry import Cost, MethodSpec, Params, Scope, TensorContext
from fastmerge.storing import Storage, store


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
    item_bytes: int = ITEM_BYTES
    device: DeviceBudget | None = None  # instead of the four above, where a device merges
    n_model: int = 0
    allow_missing: bool = False
    streamed: frozenset[str] = field(default_factory=frozenset)
    quantize: Quantize | None = None
    storage: Storage | None = None

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

    def cost(self, job: TensorJob) -> Cost:
        """Return what decomposing a job's deltas takes."""
        if job.scope is not Scope.MATRIX or job.params is None or self.spec.cost is None:
            return Cost(0, 0.0)
        return self.spec.cost(job.params, job.context(self.seed, self.n_model))

    @property
    def flops(self) -> float:
        """Operations of all decompositions: what decides how long such a merge takes, and not its bytes."""
        return sum(self.cost(j).flops for j in self.jobs)

    @property
    def bits_per_weight(self) -> float:
        """Bits that a merged parameter takes on the disk, coded or dense, with its share of scales."""
        parameters = sum(j.n for j in self.jobs)
        return 8 * self.layout.total_size / parameters if self.layout and parameters else 0.0

    @property
    def coded(self) -> list[TensorJob]:
        """The tensors that are stored as codes."""
        return [j for j in self.jobs if j.stored and j.stored.coding.format is not Format.DENSE]

    @property
    def peak_memory(self) -> int:
        if self.device:
            return DEVICE_PROCESS_BYTES + self.device.pinned
        most = max((len(j.operands) for j in self.jobs), default=0)
        return self.process_bytes + self.result_bytes + self.working_bytes + most * EDGE_BYTES

    @property
    def process_bytes(self) -> int:
        """Bytes of the process before it holds a tensor, on the host."""
        return PROCESS_BYTES + (TORCH_BYTES if self.flops else 0)

    def extra_passes(self, job: TensorJob) -> int:
        """Reads of a job's operands before its walk, as planned: on the host a rank cut takes two (a bracket
        that misses costs more), other statistics one; a device keeps a cut's candidates of one pass."""
        passes = int(self.joins(job))
        if job.scope is Scope.MODEL or job.name in self.streamed:
            passes += 1 if self.device else 3
        return passes + self.finds_peak_apart(job)

    def joins(self, job: TensorJob) -> bool:
        """Return whether a job waits for what others have to say."""
        if job.scope is not Scope.MATRIX or self.spec.joins is None:
            return False
        return job.params is not None and self.spec.joins(job.params)

    def finds_peak_apart(self, job: TensorJob) -> bool:
        """Return whether a result's largest magnitude takes a reading of its own: all that share a scale are
        merged before any of them is coded."""
        if job.stored is None or not job.needs_peak:
            return False
        held = job.is_whole and job.name not in self.streamed
        return job.stored.scale_group is not None or not (held or job.bytes_in <= self.item_bytes)

    def raise_conflicts(self) -> None:
        if self.conflicts:
            more = len(self.conflicts) - 1
            rest = f" (and {more} more; see `fastmerge plan`)" if more else ""
            raise ConflictError(self.conflicts[0] + rest)

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-able data (`fastmerge plan --json`)."""
        return {
            "method": self.spec.name,
            "inputs": [str(c) for c in self.checkpoints],
            "base": None if self.recipe.base is None else str(self.checkpoints[self.recipe.base]),
            "tensors": len(self.jobs),
            "merged": sum(j.action is Action.MERGE for j in self.jobs),
            "copied": sum(j.action is not Action.MERGE for j in self.jobs),
            "parameters": sum(j.n for j in self.jobs),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "flops": self.flops,
            "quantize": None if self.quantize is None else self.quantize.as_dict(),
            "coded": len(self.coded),
            "bits_per_weight": round(self.bits_per_weight, 3),
            "shards": [s.file_name for s in self.layout.shards] if self.layout else [],
            "peak_memory": self.peak_memory,
            "device": None
            if self.device is None
            else {
                "name": self.device.name,
                "memory": self.device.total,
                "pinned": self.device.pinned,
                "streamed": sorted(self.streamed),
            },
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
    device: Target | None = None,
    max_pinned: int | None = None,
    quantize: Quantize | None = None,
) -> Plan:
    """Read all headers and decide everything that can be decided without reading a weight.

    Args:
        device: what merges; None: the host does.
        max_pinned: most bytes of page-locked memory then.
        quantize: how weights are coded; None: the merge is dense.
    Raises:
        CheckpointError, RecipeError: an input or the recipe itself is wrong. Conflicts among inputs
            do not raise: they are listed in `Plan.conflicts`.
    """
    spec = recipe.spec()
    checkpoints = [open_model(recipe.path(i), recipe.adapter(i)) for i in range(len(recipe.inputs))]
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
    for checkpoint in checkpoints:
        findings += [Finding(strict, w) for w in checkpoint.warnings]
    storage = None
    if jobs:
        storage = store(jobs, checkpoints[donor], out_shard_size, quantize)
        jobs = storage.jobs
        findings += [Finding(strict, w) for w in storage.warnings]
    plan = Plan(
        recipe,
        spec,
        checkpoints,
        donor,
        jobs,
        findings,
        storage.layout if storage else None,
        seed,
        max_memory or default_memory(),
        n_model=sum(j.n for j in jobs if j.action is Action.MERGE),
        allow_missing=allow_missing,
        quantize=quantize,
        storage=storage,
    )
    if device is None:
        fit_host(plan)
    else:
        fit_device(plan, device, max_pinned)
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

    def lookup(self, index: int, name: str) -> TensorInfo | CodedInfo | None:
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

    def integer_job(
        self, name: str, found: dict[int, TensorInfo | CodedInfo], first: int
    ) -> TensorJob:
        missing = [self.labels[i] for i in range(len(self.checkpoints)) if i not in found]
        if missing:
            text = f"{name!r} ({found[first].dtype.torch}) is missing in {_listed(missing)}; it is copied"
            self.findings.append(Finding(self.strict, f"{text} from {self.labels[first]!r}"))
        order = [first, *(i for i in found if i != first)]
        operands = tuple(Operand(self.labels[i], found[i]) for i in order)
        info = found[first]
        return TensorJob(name, info.shape, Action.COPY_EQUAL, info.dtype, DType.F32, None, operands)

    def float_job(
        self, name: str, found: dict[int, TensorInfo | CodedInfo], first: TensorInfo | CodedInfo
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
            spec.scope_for(params, TensorContext(name, first.shape, len(present), has_base)),
            params,
        )

    def reduced(
        self,
        name: str,
        found: dict[int, TensorInfo | CodedInfo],
        present: list[int],
        has_base: bool,
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
