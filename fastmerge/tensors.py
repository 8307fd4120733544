"""Merges of tensors and state dicts in memory, dense or coded, wherever they lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

from fastmerge import ops
from fastmerge.backends import Chunk, Kernels
from fastmerge.coded_tensors import (
    AnyTensor,
    QuantTensor,
    code,
    coding_of,
    dense_type,
    empty_dense,
    operand_of,
    parsed,
    refuse_nonfinite,
)
from fastmerge.dtypes import DType
from fastmerge.errors import ConflictError
from fastmerge.evaluate import (
    JoinedRecipes,
    ModelTensor,
    Operands,
    Ranges,
    check_nan_policy,
    resolve,
    resolve_model,
    run_walks,
)
from fastmerge.recipe import keyword_params
from fastmerge.registry import MethodSpec, Params, Scope, TensorContext, get
from fastmerge.stages import Copy, GivenMask, Grain, Walk

if TYPE_CHECKING:
    import torch

Tensor = AnyTensor

#: What recipes may hold while they wait for each other: all operands are in memory, too.
WAITING_BYTES = math.inf


def _spec_operands(
    spec: MethodSpec, base: Any | None, experts: Sequence[Any]
) -> tuple[Any | None, list[Any]]:
    """Return (delta base, recipe operands) for a method."""
    operands = list(experts)
    delta_base = base
    if spec.base_is_operand:
        delta_base = None
        if base is not None:
            operands = [base, *operands] if spec.base == "required" else [*operands, base]
    elif spec.base == "ignored":
        delta_base = None
    return delta_base, operands


def merge_tensors(
    base: Tensor | None,
    experts: Sequence[Tensor],
    *,
    method: str,
    backend: str | None = None,
    seed: int = 0,
    name: str = "tensor",
    masks: Sequence[Any] | None = None,
    nan_policy: str = "error",
    chunk_elements: int | None = None,
    **params: Any,
) -> ops.Tensor:
    """Merge one tensor of several models.

    Args:
        base: [...] float16, bfloat16, float32 or float64 torch tensor or numpy array, or None where
            the method allows it; or a `QuantTensor`, which is decoded in registers, or a `LoraTensor`.
        experts: n_experts tensors of base's shape, on its device; any mix of types, coded ones among them;
            strided ones are copied.
            Tensors on a GPU are merged there, on torch's current stream.
        method: a name from `methods()`; params: its parameters, per-expert ones as one value or a list.
        seed, name: of the random drops; the same name and seed give the mask that a file merge draws.
        masks: keep masks instead of random draws, one per expert, nonzero keeps.
        nan_policy: error refuses NaN and infinity in the operands, propagate carries them through.
    Returns:
        Same kind, shape and device; dtype of base, or of the first expert. Of a coded one: a dense tensor.
    Raises:
        RecipeError: unknown method or parameter, value out of bounds. ConflictError: shapes or dtypes.
        NonFiniteError: NaN or infinity in an operand; names it and the first flat index.
    """
    merged = merge_state_dicts(
        None if base is None else {name: base},
        [{name: e} for e in experts],
        method=method,
        backend=backend,
        seed=seed,
        masks=None if masks is None else {name: masks},
        nan_policy=nan_policy,
        chunk_elements=chunk_elements,
        **params,
    )
    return merged[name]


def merge_state_dicts(
    base: Mapping[str, Tensor] | None,
    experts: Sequence[Mapping[str, Tensor]],
    *,
    method: str,
    backend: str | None = None,
    seed: int = 0,
    masks: Mapping[str, Sequence[Any]] | None = None,
    nan_policy: str = "error",
    chunk_elements: int | None = None,
    **params: Any,
) -> dict[str, ops.Tensor]:
    """Merge whole state dicts in memory; see `merge_tensors`. All must hold the same names."""
    check_nan_policy(nan_policy)
    ready = _prepared(base, experts, method, params, backend, seed, masks, chunk_elements)
    out = {job.key: empty_dense(job.like, job.dtype) for job in ready.jobs}
    bad = run_walks(
        ready.kernels,
        [
            (walk, job.over or job.operands, ops.buffer_of(out[job.key], job.key))
            for job, walk in zip(ready.jobs, ready.walks, strict=True)
        ],
        ready.limit,
    )
    for job, found in zip(ready.jobs, bad, strict=True):
        if found and nan_policy == "error":
            _refuse_nonfinite(job)
    return {key: out[key] for key in ready.order}


def merge_to_4bit(
    base: Tensor | None,
    experts: Sequence[Tensor],
    *,
    method: str,
    format: str = "nf4",
    dtype: str | torch.dtype | None = None,
    rounding: str = "nearest",
    backend: str | None = None,
    seed: int = 0,
    name: str = "tensor",
    masks: Sequence[Any] | None = None,
    chunk_elements: int | None = None,
    **params: Any,
) -> QuantTensor:
    """Merge one tensor of several models straight into codes: what is merged is never stored dense.

    The bytes are those of `quantize_4bit(merge_tensors(...))`, where the merge is of `dtype`.

    Args:
        base, experts, method, seed, name, masks, chunk_elements, params: see `merge_tensors`.
        format, rounding: see `quantize_4bit`.
        dtype: what merged values are rounded to before they are coded, nearest even; default: the type of the
            base, or of the first expert.
    Returns:
        A `QuantTensor` of the kind of the base, or of the first expert, on its device.
    Raises:
        RecipeError: unknown method, parameter, format, rounding or dtype. ConflictError: shapes or dtypes, or
            a shape that the format cannot hold.
        NonFiniteError: NaN or infinity in an operand, or beyond `dtype` when merged.
    """
    kept = None if masks is None else {name: masks}
    ready = _prepared(
        None if base is None else {name: base},
        [{name: e} for e in experts],
        method,
        params,
        backend,
        seed,
        kept,
        chunk_elements,
    )
    (job,), (walk,) = ready.jobs, ready.walks
    coding = coding_of(format, tuple(job.like.shape), parsed(dtype) or job.dtype, rounding)
    coded = code(ready.kernels, walk, job.over or job.operands, coding, job.like, ready.limit)
    if coded is None:
        _refuse_nonfinite(job, coding.dtype)
    return coded


@dataclass(frozen=True)
class _Job:
    """One tensor to merge. like: the operand whose kind, shape and device the result has; dtype: its type.
    over: what its walk is run over, once that is known."""

    key: str
    tensor: ModelTensor
    operands: Operands
    like: Tensor
    dtype: DType
    over: Operands | None = None


@dataclass(frozen=True)
class _Ready:
    """Jobs with their walks, in sorted order of name. order: the names as they were given."""

    kernels: Kernels
    jobs: Sequence[_Job]
    walks: Sequence[Walk | Copy]
    limit: int
    order: Sequence[str]


def _prepared(
    base: Mapping[str, Tensor] | None,
    experts: Sequence[Mapping[str, Tensor]],
    method: str,
    params: Mapping[str, Any],
    backend: str | None,
    seed: int,
    masks: Mapping[str, Sequence[Any]] | None,
    chunk_elements: int | None,
) -> _Ready:
    """Check the operands, choose the kernels and run the statistics."""
    spec = get(method)
    delta_base, operands = _spec_operands(spec, base, experts)
    resolved = keyword_params(spec, len(operands), base is not None, params)
    first = operands[0] if delta_base is None else delta_base
    jobs: list[_Job] = []
    n_model = sum(math.prod(t.shape) for t in first.values())
    device = "cpu"
    for key in sorted(first):
        like = first[key]
        buffers = _buffers(key, delta_base, operands)
        shape = tuple(like.shape)
        given = GivenMask(masks[key]) if masks and key in masks else None
        context = TensorContext(
            key, shape, len(operands), delta_base is not None, seed, n_model, given
        )
        cols = max(1, shape[-1]) if shape else 1
        wide = any(b.dtype is DType.F64 for b in buffers)
        compute = DType.F64 if wide else DType.F32
        if jobs and buffers[0].device != device:
            raise ConflictError(
                f"{jobs[0].key!r} is on {device} but {key!r} on {buffers[0].device}; "
                "merge the tensors of each device on their own"
            )
        device = buffers[0].device
        dtype = dense_type(like, buffers[0])
        origin = buffers.pop(0) if delta_base is not None else None
        tensor = ModelTensor(resolved, context, cols, compute)
        jobs.append(_Job(key, tensor, Operands(origin, buffers, cols, compute), like, dtype))
    kernels = ops.choose(device, backend)
    limit = chunk_elements or kernels.chunk_elements
    walks, over = _walks(kernels, spec, resolved, jobs, limit)
    jobs = [replace(job, over=held) for job, held in zip(jobs, over, strict=True)]
    return _Ready(ops.choose(device, backend, walks), jobs, walks, limit, list(first))


def _walks(
    kernels: Any,
    spec: MethodSpec,
    params: Params,
    jobs: Sequence[_Job],
    limit: int,
) -> tuple[list[Walk | Copy], list[Operands]]:
    """Return each job's walk, and what it is to be run over."""
    if spec.joins is not None and spec.joins(params):
        recipes = JoinedRecipes(kernels, spec, limit, WAITING_BYTES)
        for job in jobs:
            recipes.begin(params, job.tensor.context, job.operands)
        recipes.join()
        found = [recipes.end(params, job.tensor.context, job.operands) for job in jobs]
        return [walk for walk, _ in found], [held for _, held in found]
    if all(spec.scope_for(params, j.tensor.context) is not Scope.MODEL for j in jobs):
        found = [resolve(kernels, spec, params, j.tensor.context, j.operands, limit) for j in jobs]
        return [walk for walk, _ in found], [held for _, held in found]

    def visit(
        feed: Callable[[int, Chunk], None], wanted: Mapping[int, Ranges], size: Grain
    ) -> None:
        for t in sorted(wanted):
            held, ranges = jobs[t].operands, wanted[t]
            for a, b in ((0, held.n),) if ranges is None else ranges:
                for _, chunk in held.slice(a, b).chunks(size, limit):
                    feed(t, chunk)

    walks = resolve_model(kernels, spec, [j.tensor for j in jobs], visit)
    return walks, [j.operands for j in jobs]


def _refuse_nonfinite(job: _Job, coded_as: DType | None = None) -> NoReturn:
    held = job.operands
    labels = (["base"] if held.base else []) + [f"experts[{k}]" for k in range(len(held.experts))]
    remedy = "mend it" if coded_as else "mend it or give nan_policy='propagate'"
    dtype = coded_as or job.dtype
    refuse_nonfinite(held, [f"{job.key!r} of {label}" for label in labels], remedy, dtype)


def _buffers(key: str, base: Any | None, operands: Sequence[Any]) -> list[Any]:
    everything = ([] if base is None else [base]) + list(operands)
    labels = ([] if base is None else ["base"]) + [f"experts[{k}]" for k in range(len(operands))]
    buffers = []
    for label, state in zip(labels, everything, strict=True):
        if key not in state:
            raise ConflictError(f"{key!r} is missing in {label}")
        if tuple(state[key].shape) != tuple(everything[0][key].shape):
            raise ConflictError(
                f"{key!r} is {list(everything[0][key].shape)} in {labels[0]} but "
                f"{list(state[key].shape)} in {label}"
            )
        buffers.append(operand_of(state[key], f"{key!r} of {label}"))
    ops.one_device(buffers, [f"{key!r} of {label}" for label in labels])
    return buffers


__all__ = ["merge_state_dicts", "merge_tensors", "merge_to_4bit"]
