"""The one place that decides where arithmetic runs, and the operations on tensors and arrays.

`BACKENDS` is the ordered dispatch table. Each entry says which kinds of device it serves and answers
with a reason when it cannot run. `backend=` forces one and fails loudly; so does the environment
variable FASTMERGE_BACKEND. Operands off the CPU are torch tensors of one device; kernels run there, on
torch's current stream.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fastmerge.backends import Buffer, Chunk, Coded, Kernels
from fastmerge.dtypes import BY_TORCH, DType
from fastmerge.errors import BackendError, ConflictError
from fastmerge.stages import (
    F64,
    Copy,
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

    from fastmerge.coded_tensors import QuantTensor as QuantTensor
    from fastmerge.coded_tensors import dequantize_4bit as dequantize_4bit
    from fastmerge.coded_tensors import quantize_4bit as quantize_4bit
    from fastmerge.experts import low_rank_sparse as low_rank_sparse
    from fastmerge.experts import merge_experts as merge_experts
    from fastmerge.linalg import factored_svd as factored_svd
    from fastmerge.linalg import polar as polar
    from fastmerge.linalg import spectrum as spectrum
    from fastmerge.linalg import svd as svd
    from fastmerge.linalg import truncated_svd as truncated_svd
    from fastmerge.linalg.tiny import principal as principal
    from fastmerge.tensors import merge_to_4bit as merge_to_4bit


def _why_not_cpu() -> str | None:
    from fastmerge.backends import cpu

    return cpu.UNAVAILABLE


def _why_not_cuda() -> str | None:
    from fastmerge.backends import cuda

    return cuda.why_not()


def _why_not_triton() -> str | None:
    from fastmerge.backends import triton

    return triton.why_not()


def _why_not_reference() -> str | None:
    return None if importlib.util.find_spec("torch") else "torch is not installed"


def _load_cpu(device: str) -> Kernels:
    from fastmerge.backends.cpu import CpuKernels

    return CpuKernels()


def _load_cuda(device: str) -> Kernels:
    from fastmerge.backends.cuda import CudaKernels

    return CudaKernels(device)


def _load_triton(device: str) -> Kernels:
    from fastmerge.backends.triton import TritonKernels

    return TritonKernels(device)


def _load_reference(device: str) -> Kernels:
    from fastmerge.backends.reference import ReferenceKernels
    from fastmerge.backends.through_dense import ThroughDense

    return ThroughDense(ReferenceKernels())


@dataclass(frozen=True)
class Entry:
    """One backend: the kinds of device it serves, why it cannot run (None: it can), its kernels."""

    name: str
    devices: tuple[str, ...]
    about: str
    why_not: Callable[[], str | None]
    load: Callable[[str], Kernels]


#: Triton's interpreter runs on host memory: for tests, and for trying a stage of one's own without a GPU.
_INTERPRETED = ("cpu",) if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0") else ()

#: In order of preference for a device. "cuda" is torch's word for AMD's GPUs as well.
BACKENDS = (
    Entry("cuda", ("cuda",), "C++ for NVIDIA GPUs", _why_not_cuda, _load_cuda),
    Entry("cpu", ("cpu",), "C++, instruction set chosen at run time", _why_not_cpu, _load_cpu),
    Entry("triton", ("cuda", *_INTERPRETED), "compiled at first use; NVIDIA and AMD GPUs", _why_not_triton,
          _load_triton),
    Entry("reference", ("cpu", "cuda"), "torch, one plain operation at a time, on the host",
          _why_not_reference, _load_reference),
)  # fmt: skip


def choose(
    device: str = "cpu", backend: str | None = None, walks: Sequence[Walk | Copy] = ()
) -> Kernels:
    """Return the kernels for `device`: the one that `backend` names, or the first that can run `walks`.

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
            kernels = entry.load(device)
            refusals = (kernels.refuses(w) for w in walks if isinstance(w, Walk))
            reason = next(filter(None, refusals), None)
            if reason is None:
                return kernels
        reasons.append(f"{entry.name}: {reason}")
    raise BackendError(f"no backend can run on {device}: {'; '.join(reasons)}")


# ---- tensors and arrays as buffers ---------------------------------------------------------------

Tensor = Any  # torch.Tensor or numpy.ndarray


def buffer_of(tensor: Tensor, what: str) -> Buffer:
    """Describe a torch tensor's or numpy array's memory, made contiguous when it is strided.

    Raises:
        ConflictError: not a floating type that merges (float64, float32, float16, bfloat16), or on a device
            that no backend serves.
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
    device = tensor.device
    if device.type not in ("cpu", "cuda"):
        raise ConflictError(f"{what} is on {device}; move it to the CPU or to a CUDA device")
    held = tensor.detach().contiguous()
    return Buffer(held.data_ptr(), dtype, held.numel(), held, str(device))


def empty_like(tensor: Tensor, dtype: DType) -> Tensor:
    """Return uninitialised memory of `tensor`'s kind and shape and of `dtype`."""
    if isinstance(tensor, np.ndarray):
        return np.empty(tensor.shape, dtype=dtype.torch)
    import torch

    return torch.empty(tensor.shape, dtype=getattr(torch, dtype.torch), device=tensor.device)


def one_device(buffers: Sequence[Buffer | Coded], labels: Sequence[str]) -> str:
    """Return the device that all buffers are on.

    Raises:
        ConflictError: they are on several; names the first two.
    """
    first = buffers[0].device
    for buffer, label in zip(buffers, labels, strict=True):
        if buffer.device != first:
            raise ConflictError(
                f"{labels[0]} is on {first} but {label} on {buffer.device}; move them to one device"
            )
    return first


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
    one_device(
        everything, [*(f"experts[{k}]" for k in range(len(operands))), "base"][: len(everything)]
    )
    compute = DType.F64 if any(b.dtype is DType.F64 for b in everything) else DType.F32
    n = operands[0].n
    return Chunk(origin, operands, 0, n, max(1, shape[-1]) if shape else 1, compute)


def device_of(chunk: Chunk) -> str:
    """Return the device that a chunk's operands are on."""
    return chunk.experts[0].device if chunk.experts else chunk.base.device if chunk.base else "cpu"


def _run(statistic: Any, chunk: Chunk, backend: str | None) -> Any:
    sweep = choose(device_of(chunk), backend).sweep(
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
) -> Tensor:
    """Return [K, n] uint8: 1 where the keep stages leave expert k's element.

    A numpy array for operands in host memory, else a torch tensor on their device.
    """
    chunk = _chunk(base, experts)
    return choose(device_of(chunk), backend).keep_mask(keep, chunk)


def keep_probability(
    base: Tensor | None, experts: Sequence[Tensor], drop: RankedDrop, *, backend: str | None = None
) -> Tensor:
    """Return [K, n] float64: each element's keep probability under a ranked drop; where, see `keep_mask`."""
    chunk = _chunk(base, experts)
    return choose(device_of(chunk), backend).keep_probability(drop, chunk)


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
    others = [x for x in chunk.experts if isinstance(x, Buffer)]
    one_device([where, *others], ["out", *(f"experts[{k}]" for k in range(len(experts)))])
    choose(device_of(chunk), backend, [walk]).walk(walk, chunk, where)
    return target


def _address(tensor: Tensor) -> int:
    if isinstance(tensor, np.ndarray):
        return int(tensor.ctypes.data)
    held: torch.Tensor = tensor
    return held.data_ptr()


#: Operations that stand on this module, and are found here as well.
_ABOVE = {
    "QuantTensor": "fastmerge.coded_tensors",
    "quantize_4bit": "fastmerge.coded_tensors",
    "dequantize_4bit": "fastmerge.coded_tensors",
    "merge_to_4bit": "fastmerge.tensors",
    "merge_experts": "fastmerge.experts",
    "low_rank_sparse": "fastmerge.experts",
    "factored_svd": "fastmerge.linalg",
    "polar": "fastmerge.linalg",
    "principal": "fastmerge.linalg.tiny",
    "spectrum": "fastmerge.linalg",
    "svd": "fastmerge.linalg",
    "truncated_svd": "fastmerge.linalg",
}


def __getattr__(name: str) -> Any:
    if name in _ABOVE:
        return getattr(importlib.import_module(_ABOVE[name]), name)
    raise AttributeError(f"module 'fastmerge.ops' has no attribute {name!r}")
