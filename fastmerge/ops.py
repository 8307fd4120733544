"""The one place that decides where arithmetic runs, and the operations on tensors and arrays.

`BACKENDS` is the ordered dispatch table. Each entry says which devices it serves and answers with
a reason when it
cannot run. `backend=` forces one and fails loudly; so does the environment variable FASTMERGE_BACKEND.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastmerge.backends import Buffer, Chunk, Kernels
from fastmerge.dtypes import BY_TORCH, DType
from fastmerge.errors import BackendError, ConflictError
from fastmerge.stages import (
    F64,
    Cut,
    Gram,
    Keep,
    MomentResult,
    Moments,
    OrderStatistic,
    RankedDrop,
    Walk,
)

if TYPE_CHECKING:
    import torch


def _why_not_cpu() -> str | None:
    from fastmerge.backends import cpu

    return cpu.UNAVAILABLE


def _why_not_reference() -> str | None:
    return None if importlib.util.find_spec("torch") else "torch is not installed"


def _load_cpu() -> Kernels:
    from fastmerge.backends.cpu import CpuKernels

    return CpuKernels()


def _load_reference() -> Kernels:
    from fastmerge.backends.reference import ReferenceKernels

    return ReferenceKernels()


@dataclass(frozen=True)
class Entry:
    """One backend: the devices it serves, why it cannot run (None: it can), and its kernels."""

    name: str
    devices: tuple[str, ...]
    about: str
    why_not: Callable[[], str | None]
    load: Callable[[], Kernels]


#: In order of preference for a device.
BACKENDS = (
    Entry("cpu", ("cpu",), "C++, instruction set chosen at run time", _why_not_cpu, _load_cpu),
    Entry("reference", ("cpu",), "torch, one plain operation at a time", _why_not_reference, _load_reference),
)  # fmt: skip


def choose(device: str = "cpu", backend: str | None = None) -> Kernels:
    """Return the kernels for `device`: the one that `backend` names, or the first that can run.

    Raises:
        BackendError: unknown name, or nothing can run; carries the reason of each.
    """
    wanted = backend or os.environ.get("FASTMERGE_BACKEND") or None
    entries = [e for e in BACKENDS if wanted is None or e.name == wanted]
    if not entries:
        known = ", ".join(e.name for e in BACKENDS)
        raise BackendError(f"backend {wanted!r} is unknown; known: {known}")
    kind = device.split(":")[0]
    reasons = []
    for entry in entries:
        reason = None if kind in entry.devices else f"does not serve {kind}"
        reason = reason or entry.why_not()
        if reason is None:
            return entry.load()
        reasons.append(f"{entry.name}: {reason}")
    raise BackendError(f"no backend can run on {device}: {'; '.join(reasons)}")


# ---- tensors and arrays as buffers ---------------------------------------------------------------

Tensor = Any  # torch.Tensor or numpy.ndarray


def buffer_of(tensor: Tensor, what: str) -> Buffer:
    """Describe a torch tensor's or numpy array's memory, made contiguous when it is strided.

    Raises:
        ConflictError: not a floating type that merges (float64, float32, float16, bfloat16), or not
            in host memory.
    """
    if isinstance(tensor, np.ndarray):
        dtype = BY_TORCH.get(tensor.dtype.name)
        if dtype is None or not dtype.is_merged or not tensor.dtype.isnative:
            raise ConflictError(
                f"{what} is {tensor.dtype}; merge float16, float32 or float64 arrays"
            )
        array = np.ascontiguousarray(tensor)
        return Buffer(array.ctypes.data, dtype, array.size, array)
    name = str(getattr(tensor, "dtype", type(tensor).__name__)).removeprefix("torch.")
    dtype = BY_TORCH.get(name)
    if dtype is None or not dtype.is_merged:
        raise ConflictError(
            f"{what} is {name}; merge float16, bfloat16, float32 or float64 tensors"
        )
    if tensor.device.type != "cpu":
        raise ConflictError(
            f"{what} is on {tensor.device}; only host memory is served so far, use .cpu()"
        )
    held = tensor.detach().contiguous()
    return Buffer(held.data_ptr(), dtype, held.numel(), held)


def empty_like(tensor: Tensor, dtype: DType) -> Tensor:
    """Return uninitialised memory of `tensor`'s kind and shape and of `dtype`."""
    if isinstance(tensor, np.ndarray):
        return np.empty(tensor.shape, dtype=dtype.torch)
    import torch

    return torch.empty(tensor.shape, dtype=getattr(torch, dtype.torch))


def _chunk(base: Tensor | None, experts: Sequence[Tensor]) -> Chunk:
    shape = tuple(experts[0].shape)
    operands = [buffer_of(e, f"experts[{k}]") for k, e in enumerate(experts)]
    for k, e in enumerate(experts):
        if tuple(e.shape) != shape:
            raise ConflictError(f"experts[{k}] is {list(e.shape)} but experts[0] is {list(shape)}")
    origin = buffer_of(base, "base") if base is not None else None
    if base is not None and tuple(base.shape) != shape:
        raise ConflictError(f"base is {list(base.shape)} but experts[0] is {list(shape)}")
    everything = [*operands, *([origin] if origin else [])]
    compute = DType.F64 if any(b.dtype is DType.F64 for b in everything) else DType.F32
    n = operands[0].n
    return Chunk(origin, operands, 0, n, max(1, shape[-1]) if shape else 1, compute)


def _run(statistic: Any, chunk: Chunk, backend: str | None) -> Any:
    sweep = choose("cpu", backend).sweep(
        statistic, chunk.n, chunk.cols, len(chunk.experts), chunk.compute
    )
    sweep.feed(chunk)
    while sweep.next_pass():
        sweep.feed(chunk)
    return sweep.result()


def order_statistic(
    base: Tensor | None,
    experts: Sequence[Tensor],
    request: OrderStatistic,
    *,
    backend: str | None = None,
) -> list[Cut]:
    """Find rank cuts of |expert_k - base|, exactly, ties by lowest index; see `OrderStatistic`.

    Args:
        base: [...] float16, bfloat16, float32 or float64, or None for the experts' own magnitudes.
        experts: n_experts tensors of base's shape.
    Returns:
        One `Cut` per requested rank.
    """
    return list(_run(request, _chunk(base, experts), backend))


def moments(
    base: Tensor | None,
    experts: Sequence[Tensor],
    of: Literal["abs", "square", "max"],
    keep: Keep | None = None,
    *,
    backend: str | None = None,
) -> MomentResult:
    """Sum |d| or d^2, or take the largest |d|, of each delta, before and after `keep`, in float64."""
    result: MomentResult = _run(Moments(of, keep or Keep()), _chunk(base, experts), backend)
    return result


def gram(
    base: Tensor | None,
    experts: Sequence[Tensor],
    request: Gram | None = None,
    *,
    backend: str | None = None,
) -> F64:
    """Return [K, K, units] float64 inner products of the deltas (base None: of the experts)."""
    result: F64 = _run(request or Gram(), _chunk(base, experts), backend)
    return result


def keep_mask(
    base: Tensor | None, experts: Sequence[Tensor], keep: Keep, *, backend: str | None = None
) -> NDArray[np.uint8]:
    """Return [K, n] uint8: 1 where the keep stages leave expert k's element."""
    return choose("cpu", backend).keep_mask(keep, _chunk(base, experts))


def keep_probability(
    base: Tensor | None, experts: Sequence[Tensor], drop: RankedDrop, *, backend: str | None = None
) -> F64:
    """Return [K, n] float64: each element's keep probability under a ranked drop."""
    return choose("cpu", backend).keep_probability(drop, _chunk(base, experts))


def fused_walk(
    base: Tensor | None,
    experts: Sequence[Tensor],
    walk: Walk,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Merge in one pass: base and every expert are read once, the result is written once.

    out = base + lambda * combine_k(coefficient_k * keep(expert_k - base)); see `Walk`.

    Args:
        out: tensor of base's shape and any float type; default: like base (or the first expert).
    """
    chunk = _chunk(base, experts)
    like = experts[0] if base is None else base
    target = empty_like(like, (chunk.base or chunk.experts[0]).dtype) if out is None else out
    if tuple(target.shape) != tuple(like.shape):
        raise ConflictError(f"out is {list(target.shape)} but the operands are {list(like.shape)}")
    where = buffer_of(target, "out")
    if where.address != _address(target):  # a copy was made
        raise ConflictError("out is strided; pass a contiguous tensor")
    choose("cpu", backend).walk(walk, chunk, where)
    return target


def _address(tensor: Tensor) -> int:
    if isinstance(tensor, np.ndarray):
        return int(tensor.ctypes.data)
    held: torch.Tensor = tensor
    return held.data_ptr()
