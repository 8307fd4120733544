"""Merges of tensors and state dicts in memory, wherever they lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastmerge import ops
from fastmerge.backends import Buffer, Chunk
from fastmerge.dtypes import DType
from fastmerge.errors import ConflictError, NonFiniteError
from fastmerge.evaluate import (
    ModelTensor,
    Operands,
    Ranges,
    check_nan_policy,
    first_nonfinite,
    resolve,
    resolve_model,
    run_walks,
)
from fastmerge.recipe import keyword_params
from fastmerge.registry import MethodSpec, Params, Scope, TensorContext, get
from fastmerge.stages import Copy, GivenMask, Grain, Walk


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
    base: ops.Tensor | None,
    experts: Sequence[ops.Tensor],
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
            the method allows it.
        experts: n_experts tensors of base's shape, on its device; any mix of types; strided ones are copied.
            Tensors on a GPU are merged there, on torch's current stream.
        method: a name from `methods()`; params: its parameters, per-expert ones as one value or a list.
        seed, name: of the random drops; the same name and seed give the mask that a file merge draws.
        masks: keep masks instead of random draws, one per expert, nonzero keeps.
        nan_policy: error refuses NaN and infinity in the operands, propagate carries them through.
    Returns:
        Same kind, shape and device; dtype of base, or of the first expert.
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
    base: Mapping[str, ops.Tensor] | None,
    experts: Sequence[Mapping[str, ops.Tensor]],
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
    spec = get(method)
    delta_base, operands = _spec_operands(spec, base, experts)
    resolved = keyword_params(spec, len(operands), base is not None, params)
    first = operands[0] if delta_base is None else delta_base
    jobs: list[tuple[str, ModelTensor, Operands, Any]] = []
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
                f"{jobs[0][0]!r} is on {device} but {key!r} on {buffers[0].device}; "
                "merge the tensors of each device on their own"
            )
        device = buffers[0].device
        origin = buffers.pop(0) if delta_base is not None else None
        tensor = ModelTensor(resolved, context, cols, compute)
        jobs.append((key, tensor, Operands(origin, buffers, cols, compute), like))
    kernels = ops.choose(device, backend)
    limit = chunk_elements or kernels.chunk_elements
    walks = _walks(kernels, spec, resolved, jobs, limit)
    kernels = ops.choose(device, backend, walks)
    out = {
        key: ops.empty_like(like, (held.base or held.experts[0]).dtype)
        for key, _, held, like in jobs
    }
    bad = run_walks(
        kernels,
        [
            (walk, held, ops.buffer_of(out[key], key))
            for (key, _, held, _), walk in zip(jobs, walks, strict=True)
        ],
        limit,
    )
    for (key, _, held, _), found in zip(jobs, bad, strict=True):
        if found and nan_policy == "error":
            _refuse_nonfinite(key, held)
    return {key: out[key] for key in first}


def _walks(
    kernels: Any,
    spec: MethodSpec,
    params: Params,
    jobs: Sequence[tuple[str, ModelTensor, Operands, Any]],
    limit: int,
) -> list[Walk | Copy]:
    if spec.scope_for(params) is not Scope.MODEL:
        return [resolve(kernels, spec, params, t.context, o, limit) for _, t, o, _ in jobs]

    def visit(
        feed: Callable[[int, Chunk], None], wanted: Mapping[int, Ranges], size: Grain
    ) -> None:
        for t in sorted(wanted):
            held, ranges = jobs[t][2], wanted[t]
            for a, b in ((0, held.n),) if ranges is None else ranges:
                for _, chunk in held.slice(a, b).chunks(size, limit):
                    feed(t, chunk)

    return resolve_model(kernels, spec, [t for _, t, _, _ in jobs], visit)


def _refuse_nonfinite(key: str, held: Operands) -> None:
    labels = (["base"] if held.base else []) + [f"experts[{k}]" for k in range(len(held.experts))]
    for label, buffer in zip(labels, held.operands, strict=True):
        assert isinstance(buffer, Buffer)
        index = first_nonfinite(buffer)
        if index is not None:
            raise NonFiniteError(
                f"{key!r} of {label} holds NaN or infinity at flat index {index}; "
                "mend it or give nan_policy='propagate'"
            )


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
        buffers.append(ops.buffer_of(state[key], f"{key!r} of {label}"))
    ops.one_device(buffers, [f"{key!r} of {label}" for label in labels])
    return buffers


__all__ = ["merge_state_dicts", "merge_tensors"]
