"""Run one method's recipe on one tensor's operands in memory, chunk by chunk.

This is the whole meaning of a merge without any file: statistics that the recipe yields are swept
over the operands,
their results sent back, and the walk it returns is run. `chunk_elements` bounds the kernels' scratch memory
and never shows in a result.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmerge.backends import CHUNK_ELEMENTS, Buffer, Chunk, Coded, Kernels
from fastmerge.backends.memory import (
    buffer_of,
    bytes_of,
    copy_bytes,
    empty,
    same_bytes,
    tensor_of,
    to_host,
)
from fastmerge.backends.through_dense import decoded
from fastmerge.coding import Coding, Format
from fastmerge.dtypes import DType
from fastmerge.errors import BackendError, RecipeError
from fastmerge.registry import MethodSpec, Params, TensorContext
from fastmerge.stages import (
    F64,
    Add,
    Copy,
    Cut,
    GivenMask,
    Grain,
    Joined,
    Keep,
    Matrices,
    MomentResult,
    Moments,
    OrderStatistic,
    Outcome,
    SignBalance,
    Statistic,
    Walk,
    grain,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Operands:
    """One tensor's operands in memory: base (delta methods only), experts, last dimension, compute type."""

    base: Buffer | Coded | None
    experts: Sequence[Buffer | Coded]
    cols: int
    compute: DType
    start: int = 0

    @property
    def n(self) -> int:
        return self.experts[0].n if self.experts else self.base.n if self.base else 0

    @property
    def operands(self) -> list[Buffer | Coded]:
        """The base, if there is one, and the experts."""
        return ([self.base] if self.base else []) + list(self.experts)

    def slice(self, a: int, b: int) -> Operands:
        """Return elements [a, b) of these."""
        return Operands(
            self.base.slice(a, b) if self.base else None,
            [e.slice(a, b) for e in self.experts],
            self.cols,
            self.compute,
            self.start + a,
        )

    def chunks(
        self, size: Grain, limit: int, with_base: bool = True, unit: int = 1
    ) -> Iterator[tuple[int, Chunk]]:
        """Cut into chunks of about `limit` elements, a multiple of `unit`, that respect `size`; yields (first
        element, chunk)."""
        if size is Grain.ROW:
            unit = math.lcm(unit, self.cols)
        step = max(unit, limit // unit * unit)
        if size is Grain.TENSOR:
            step = max(1, self.n)
        for a in range(0, self.n, step):
            b = min(self.n, a + step)
            yield (
                a,
                Chunk(
                    self.base.slice(a, b) if self.base and with_base else None,
                    [e.slice(a, b) for e in self.experts],
                    self.start + a,
                    b - a,
                    self.cols,
                    self.compute,
                ),
            )


def _slice_given(request: Any, a: int, b: int) -> Any:
    """Return `request` with masks from outside cut to elements [a, b)."""
    import dataclasses

    keep: Keep | None = getattr(request, "keep", None)
    if keep is None or keep.given is None:
        return request
    masks = [
        (m if hasattr(m, "reshape") else np.asarray(m)).reshape(-1)[a:b] for m in keep.given.masks
    ]
    return dataclasses.replace(request, keep=dataclasses.replace(keep, given=GivenMask(masks)))


def _needs_base(request: Statistic) -> bool:
    return getattr(request, "delta", True)


def sweep_statistic(
    kernels: Kernels, request: Statistic, operands: Operands, limit: int = CHUNK_ELEMENTS
) -> Any:
    """Return the result of one statistic over one tensor in memory."""
    keep: Keep | None = getattr(request, "keep", None)
    size = Grain.TENSOR if keep is not None and keep.given is not None else grain(request)
    sweep = kernels.sweep(
        request, operands.n, operands.cols, len(operands.experts), operands.compute
    )
    while True:
        whole = limit >= operands.n or size is Grain.TENSOR
        wanted = None if whole else sweep.wanted()
        for a, b in ((0, operands.n),) if wanted is None else wanted:
            for _, chunk in operands.slice(a, b).chunks(size, limit, _needs_base(request)):
                sweep.feed(chunk)
        if not sweep.next_pass():
            return sweep.result()


def resolve(
    kernels: Kernels,
    spec: MethodSpec,
    params: Params,
    context: TensorContext,
    operands: Operands,
    limit: int = CHUNK_ELEMENTS,
) -> tuple[Walk | Copy, Operands]:
    """Run a recipe to its walk: every statistic it yields is swept over `operands`.

    Returns:
        The walk, and what it is to be run over: the operands, or the base and what a method of scope MATRIX
        has computed to be added to it.
    """
    try:
        next(_outcome(kernels, spec, params, context, operands, limit))
    except StopIteration as stop:
        return _walk_of(stop.value, operands)
    raise RecipeError(f"{spec.name} waits for other tensors but does not say that it joins them")


def _outcome(
    kernels: Kernels,
    spec: MethodSpec,
    params: Params,
    context: TensorContext,
    operands: Operands,
    limit: int,
) -> Generator[Joined, Any, Outcome]:
    """Run a recipe; yield only what it asks of other tensors."""
    recipe = spec.recipe(params, context)
    answer: Any = None
    while True:
        try:
            request = recipe.send(answer)
        except StopIteration as stop:
            outcome: Outcome = stop.value
            return outcome
        except _NotFinite as stop:  # so is all that would be computed from it
            return Add(stop.delta.fill_(math.nan))
        if isinstance(request, Joined):
            answer = yield request
        elif isinstance(request, Matrices):
            answer = _Deltas(kernels, operands, request.shape, limit)
        else:
            answer = sweep_statistic(kernels, request, operands, limit)


@dataclass
class JoinedRecipes:
    """The recipes of a model whose tensors wait for each other: `begin` all, `join`, then `end` each.

    spare: bytes that recipes may hold while they wait; those beyond run twice.
    """

    kernels: Kernels
    spec: MethodSpec
    limit: int
    spare: float
    answer: Mapping[str, Any] | None = None
    _values: dict[str, Joined] = field(default_factory=dict)
    _waiting: dict[str, Generator[Joined, Any, Outcome]] = field(default_factory=dict)

    def begin(self, params: Params, context: TensorContext, operands: Operands) -> None:
        """Run one tensor's recipe to where it waits for the others."""
        run = self._run(params, context, operands)
        try:
            self._values[context.name] = next(run)
        except StopIteration:  # it holds NaN, and has nothing to say to the others
            return
        held = operands.compute.itemsize * context.n
        if held <= self.spare:
            self.spare -= held
            self._waiting[context.name] = run
        else:
            run.close()

    def join(self) -> None:
        """Compute what all wait for."""
        values = [self._values[name] for name in sorted(self._values)]
        self.answer = values[0].join([v.value for v in values]) if values else None

    def end(
        self, params: Params, context: TensorContext, operands: Operands
    ) -> tuple[Walk | Copy, Operands]:
        """As `resolve`."""
        run = self._waiting.pop(context.name, None)
        try:
            if run is None:
                run = self._run(params, context, operands)
                next(run)
            run.send(self.answer)
        except StopIteration as stop:
            return _walk_of(stop.value, operands)
        raise RecipeError(f"{self.spec.name} joins more than once")

    def _run(
        self, params: Params, context: TensorContext, operands: Operands
    ) -> Generator[Joined, Any, Outcome]:
        return _outcome(self.kernels, self.spec, params, context, operands, self.limit)


def _walk_of(outcome: Outcome, operands: Operands) -> tuple[Walk | Copy, Operands]:
    """Return the walk of what a recipe returned, and what it is to be run over."""
    if isinstance(outcome, Add):
        return _adding(outcome.values, outcome.scale, operands)
    return outcome, operands


class _NotFinite(Exception):
    """A delta holds NaN or infinity, and cannot be decomposed."""

    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        self.delta = delta


@dataclass(frozen=True)
class _Deltas:
    """The `stages.Deltas` of operands in memory."""

    kernels: Kernels
    operands: Operands
    shape: tuple[int, int]
    limit: int

    def __len__(self) -> int:
        return len(self.operands.experts)

    def __getitem__(self, k: int) -> Tensor:
        return self._sum(self.operands.experts[k : k + 1], [1.0])

    def total(self, weight: Sequence[float]) -> Tensor:
        return self._sum(self.operands.experts, weight)

    def _sum(self, experts: Sequence[Buffer | Coded], weight: Sequence[float]) -> Tensor:
        import torch

        held = self.operands
        assert held.base is not None
        part = Operands(held.base, experts, held.cols, held.compute, held.start)
        walk = Walk(np.array(weight)[:, None], add_base=False, only_delta=True)
        made = torch.empty(
            self.shape, dtype=getattr(torch, held.compute.torch), device=held.base.device
        )
        if run_walk(self.kernels, walk, part, buffer_of(made), self.limit):
            raise _NotFinite(made)
        return made

    def factors(self, k: int) -> tuple[Tensor, Tensor] | None:
        import torch

        base, expert = self.operands.base, self.operands.experts[k]
        if not (isinstance(expert, Coded) and "low_a" in expert.slots and isinstance(base, Buffer)):
            return None
        whole = expert.coding.format is Format.DENSE and expert.coding.rotary == 0
        codes = expert.slots["codes"]
        if not whole or codes.dtype is not base.dtype or not same_bytes(codes, base):
            return None
        compute = getattr(torch, self.operands.compute.torch)
        b, a = (tensor_of(expert.slots[s]).to(compute) for s in ("low_b", "low_a"))
        rows, cols = expert.rows, expert.cols
        return b.reshape(rows, -1) * expert.low_scale, a.reshape(-1, cols)


def _adding(values: Tensor, scale: float, operands: Operands) -> tuple[Walk, Operands]:
    """Return the walk over base and computed values whose result is base + scale * values."""
    import torch

    assert operands.base is not None
    pair = [operands.base, buffer_of(values.to(getattr(torch, operands.compute.torch)))]
    walk = Walk(np.array([[1.0], [scale]]), add_base=False)
    return walk, Operands(None, pair, operands.cols, operands.compute, operands.start)


def run_walk(
    kernels: Kernels,
    walk: Walk | Copy,
    operands: Operands,
    out: Buffer | Coded,
    limit: int = CHUNK_ELEMENTS,
) -> bool:
    """Run a walk over operands in memory into `out`; true if an operand held NaN or infinity."""
    return run_walks(kernels, [(walk, operands, out)], limit)[0]


def run_walks(
    kernels: Kernels,
    jobs: Sequence[tuple[Walk | Copy, Operands, Buffer | Coded]],
    limit: int = CHUNK_ELEMENTS,
) -> list[bool]:
    """As `run_walk`, of many tensors at once."""
    return start_walks(kernels, jobs, limit)()


def start_walks(
    kernels: Kernels,
    jobs: Sequence[tuple[Walk | Copy, Operands, Buffer | Coded]],
    limit: int = CHUNK_ELEMENTS,
) -> Callable[[], list[bool]]:
    """As `run_walks`, without waiting for a device: what is returned waits for it, and may be called once
    the operands are gone."""
    parts: list[tuple[Walk, Chunk, Buffer | Coded]] = []
    tensor: list[int] = []
    copies: list[tuple[int, Buffer, Buffer]] = []
    early = [False] * len(jobs)
    for t, (walk, operands, out) in enumerate(jobs):
        if isinstance(walk, Copy):
            source = operands.operands[walk.index]
            if isinstance(source, Buffer) and isinstance(out, Buffer) and source.dtype is out.dtype:
                copies.append((t, out, source))
            walk, operands = identity(operands, walk)
        refuse_unrunnable(kernels, walk)
        unit = 1
        if isinstance(out, Coded):
            refuse_unwritable(kernels, [out.coding])
            unit = out.unit
        for a, chunk in operands.chunks(grain(walk), limit, walk.takes_base, unit):
            cut = _slice_given(walk, operands.start + a, operands.start + a + chunk.n)
            target = out.slice(a, a + chunk.n)
            if isinstance(target, Coded) and target.feedback is not None:
                early[t] |= _code_with_feedback(kernels, cut, chunk, target)
                continue
            parts.append((cut, chunk, target))
            tensor.append(t)
    parts_bad = kernels.start_walks(parts)

    def bad() -> list[bool]:
        found = list(early)
        for t, is_bad in zip(tensor, parts_bad(), strict=True):
            found[t] |= is_bad
        return found

    for t, target, source in copies:
        # A walk makes all NaNs the same one. On the host it is known by now whether there are any.
        if source.device != "cpu" or bad()[t]:
            copy_bytes(target, source)
    return bad


def _code_with_feedback(kernels: Kernels, walk: Walk, chunk: Chunk, out: Coded) -> bool:
    """Merge whole rows into memory of their own, then code them; returns whether some are not finite."""
    assert out.feedback is not None
    merged = empty(chunk.n, out.coding.dtype, out.device)
    return kernels.walk(walk, chunk, merged) or not out.feedback.code(out, merged)


def identity(operands: Operands, copy: Copy) -> tuple[Walk, Operands]:
    """Return the walk that gives one of the operands as it is, and what it is over."""
    source = operands.operands[copy.index]
    walk = Walk(coefficient=np.ones((1, 1)), add_base=False)
    return walk, Operands(None, [source], operands.cols, operands.compute, operands.start)


def peak(
    kernels: Kernels,
    walk: Walk | Copy,
    operands: Operands,
    dtype: DType,
    limit: int = CHUNK_ELEMENTS,
) -> tuple[bool, float]:
    """Return (whether an operand held NaN or infinity, the largest magnitude of the result as `dtype`)."""
    if isinstance(walk, Copy):
        walk, operands = identity(operands, walk)
    refuse_unrunnable(kernels, walk)
    bad, largest = False, 0.0
    for a, chunk in operands.chunks(grain(walk), limit, walk.takes_base):
        cut = _slice_given(walk, operands.start + a, operands.start + a + chunk.n)
        found, high = kernels.peak(cut, chunk, dtype)
        bad, largest = bad or found, max(largest, high)
    return bad, largest


def refuse_unrunnable(kernels: Kernels, walk: Walk) -> None:
    """Raise BackendError if a walk needs what these kernels do not have."""
    reason = kernels.refuses(walk)
    if reason:
        raise BackendError(f"{kernels.name} cannot run this walk: {reason}")


def refuse_unwritable(kernels: Kernels, codings: Iterable[Coding]) -> None:
    """Raise BackendError if there is a coding that these kernels cannot write."""
    for coding in codings:
        reason = kernels.refuses_coding(coding)
        if reason:
            raise BackendError(f"{kernels.name} cannot write this format: {reason}")


def first_nonfinite(operand: Buffer | Coded) -> int | None:
    """Return the index of the first NaN or infinity."""
    if isinstance(operand, Coded):
        operand = replace(operand, slots={k: to_host(v) for k, v in operand.slots.items()})
    else:
        operand = to_host(operand)
    for a in range(0, operand.n, CHUNK_ELEMENTS):
        values = decoded(operand.slice(a, min(operand.n, a + CHUNK_ELEMENTS)))
        assert values is not None
        index = _first_by_exponent(values)
        if index is not None:
            return a + index
    return None


def _first_by_exponent(buffer: Buffer) -> int | None:
    """Return the index of the first NaN or infinity, by the exponent bits."""
    pattern: dict[DType, tuple[Any, int]] = {
        DType.F64: (np.uint64, 0x7FF0000000000000),
        DType.F32: (np.uint32, 0x7F800000),
        DType.F16: (np.uint16, 0x7C00),
        DType.BF16: (np.uint16, 0x7F80),
    }
    kind, exponent = pattern[buffer.dtype]
    bits = bytes_of(buffer).view(kind)
    bad = np.flatnonzero((bits & kind(exponent)) == kind(exponent))
    return int(bad[0]) if bad.size else None


# ---- methods whose statistics are over the whole model ---------------------------------------------


@dataclass(frozen=True)
class ModelTensor:
    """One tensor of a model-scope merge: its recipe's inputs and its size."""

    params: Params
    context: TensorContext
    cols: int
    compute: DType


#: Elements [start, stop) of a tensor, ascending; None: all of it.
Ranges = Sequence[tuple[int, int]] | None

#: Calls its argument with (tensor index, chunk) for every chunk of the given ranges of every tensor in the
#: mapping, tensors in order, chunks ascending and cut by the given grain.
Visit = Callable[[Callable[[int, Chunk], None], Mapping[int, Ranges], Grain], None]


def resolve_model(
    kernels: Kernels, spec: MethodSpec, tensors: Sequence[ModelTensor], visit: Visit
) -> list[Walk | Copy]:
    """Run all recipes of a model in step, one statistic at a time, each over as few visits as it needs.

    `tensors` are in sorted order of name: that is the model's flattened order.
    """
    recipes = [spec.recipe(t.params, t.context) for t in tensors]
    walks: list[Walk | Copy | None] = [None] * len(tensors)
    answers: list[Any] = [None] * len(tensors)
    while True:
        requests: dict[int, Statistic] = {}
        for t, recipe in enumerate(recipes):
            if walks[t] is None:
                try:
                    request = recipe.send(answers[t])
                    assert not isinstance(request, Matrices | Joined)  # nothing does both
                    requests[t] = request
                except StopIteration as stop:
                    walks[t] = stop.value
        if not requests:
            return [w for w in walks if w is not None]
        for t, answer in _answer_all(kernels, spec, tensors, requests, visit).items():
            answers[t] = answer


def _answer_all(
    kernels: Kernels,
    spec: MethodSpec,
    tensors: Sequence[ModelTensor],
    requests: dict[int, Statistic],
    visit: Visit,
) -> dict[int, Any]:
    first = next(iter(requests.values()))
    over_model = getattr(first, "scope", "tensor") == "model"
    apart = len({type(r) for r in requests.values()}) > 1
    if isinstance(first, OrderStatistic) and over_model:
        apart |= any(r != first for r in requests.values())
    if over_model and apart:
        raise RecipeError(
            f"{spec.name} over the whole model needs one value of its parameters for all tensors; "
            "give no filter and no gradient, or choose scope: tensor"
        )
    if isinstance(first, OrderStatistic) and over_model:
        return _joint_order(kernels, tensors, requests, first, visit)
    sweeps = {
        t: kernels.sweep(
            r,
            tensors[t].context.n,
            tensors[t].cols,
            tensors[t].context.n_experts,
            tensors[t].compute,
        )
        for t, r in requests.items()
    }
    size = max(grain(r) for r in requests.values())
    left = set(requests)
    while left:
        visit(lambda t, chunk: sweeps[t].feed(chunk), {t: sweeps[t].wanted() for t in left}, size)
        left = {t for t in left if sweeps[t].next_pass()}
    results = {t: s.result() for t, s in sweeps.items()}
    if not over_model:
        return results
    if isinstance(first, SignBalance):
        total = sum(results.values())
        return dict.fromkeys(results, total)
    assert isinstance(first, Moments)
    return dict.fromkeys(results, _join_moments(first.of, list(results.values())))


def _joint_order(
    kernels: Kernels,
    tensors: Sequence[ModelTensor],
    requests: dict[int, Statistic],
    request: OrderStatistic,
    visit: Visit,
) -> dict[int, Any]:
    offsets, n = {}, 0
    for t in requests:
        offsets[t] = n
        n += tensors[t].context.n
    some = tensors[next(iter(requests))]
    sweep = kernels.sweep(request, n, 1, some.context.n_experts, some.compute)
    sizes = {t: tensors[t].context.n for t in requests}
    while True:
        wanted = _within(sweep.wanted(), offsets, sizes)
        visit(lambda t, chunk: sweep.feed(chunk, offsets[t]), wanted, Grain.ELEMENT)
        if not sweep.next_pass():
            break
    cuts: list[Cut] = sweep.result()
    return {t: [_shift(cut, offset) for cut in cuts] for t, offset in offsets.items()}


def _within(
    ranges: Ranges, offsets: Mapping[int, int], sizes: Mapping[int, int]
) -> dict[int, Ranges]:
    """Return each tensor's own share of ranges of the model's flattened order; tensors without are left out.

    Both mappings are in that order.
    """
    if ranges is None:
        return dict.fromkeys(offsets)
    found: dict[int, list[tuple[int, int]]] = {}
    left = deque(ranges)
    for t, offset in offsets.items():
        end = offset + sizes[t]
        while left and left[0][0] < end:
            start, stop = left.popleft()
            if stop > end:
                left.appendleft((end, stop))
            found.setdefault(t, []).append((start - offset, min(stop, end) - offset))
    return dict(found)


def _shift(cut: Cut, offset: int) -> Cut:
    """Translate last_tie from the model's flattened order to one tensor's; the ends stay ends."""
    end = np.iinfo(np.int64).max
    tie = np.where(cut.last_tie == end, end, np.maximum(cut.last_tie - offset, -1))
    return Cut(cut.value, tie, cut.axis)


def _join_moments(of: str, parts: Sequence[MomentResult]) -> MomentResult:
    def join(values: Iterable[F64]) -> F64:
        if of == "max":
            return np.asarray(np.max(list(values), axis=0), np.float64)
        return np.array([math.fsum(expert) for expert in zip(*values, strict=True)])

    return MomentResult(join(p.all for p in parts), join(p.kept for p in parts))


def check_nan_policy(nan_policy: str) -> None:
    """Raise RecipeError unless it is one of the two."""
    if nan_policy not in ("error", "propagate"):
        raise RecipeError(f"nan_policy must be error or propagate, got {nan_policy!r}")
