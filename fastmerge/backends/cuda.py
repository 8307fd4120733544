"""The CUDA backend: lowers stages to csrc/core/plan.hpp, in device memory, and launches csrc/cuda.

Kernels run on torch's current stream of the operands' device. Workspaces are torch tensors, so its caching
allocator's rules for streams hold for them; what a recipe needs on the host (cuts, sums) is waited for
when it is asked for, and nothing else is.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmerge.backends import Buffer, Chunk, Coded, Kernels, Sweep
from fastmerge.backends.lowering import (
    given_masks,
    lower_coded,
    lower_keep,
    lower_operands,
    lower_walk,
)
from fastmerge.dtypes import DType
from fastmerge.errors import BackendError
from fastmerge.stages import (
    F64,
    Axis,
    Gram,
    Keep,
    MomentResult,
    Moments,
    OrderStatistic,
    RankedDrop,
    SignBalance,
    Statistic,
    Walk,
)

if TYPE_CHECKING:
    from torch import Tensor


def why_not() -> str | None:
    """Return why this backend cannot run here, or None."""
    try:
        from fastmerge import _cuda
    except ImportError as error:
        missing = "No module named" in str(error) or "cannot import name" in str(error)
        return "not built: nvcc was not found at install" if missing else f"does not load ({error})"
    count, reason = _cuda.device_count()
    if not count:
        return f"built for {_cuda.built_for()}, no driver ({reason})"
    import torch

    if torch.version.cuda is None:
        return "torch is built without CUDA" + (" (for ROCm)" if torch.version.hip else "")
    return None


@dataclasses.dataclass
class _Ranks:
    """What a ranked drop goes by, on the device; or what all keep stages leave, a bit each."""

    kept: int = 0
    stride: int = 0
    rank: int = 0
    low: int = 0
    high: int = 0
    unit: int = 1
    owned: list[Any] = dataclasses.field(default_factory=list)

    @property
    def addresses(self) -> tuple[int, ...]:
        return self.kept, self.stride, self.rank, self.low, self.high, self.unit


class _Queue:
    """One device and its current stream: memory, uploads, launches."""

    def __init__(self, native: Any, device: str) -> None:
        import torch

        self.native = native
        self.device = torch.device(device)
        self._stream = 0
        if self.device.type == "cuda":
            self._stream = torch.cuda.current_stream(self.device).cuda_stream
        self._queue = native.Queue(self.device.index or 0, self._stream)

    def run(self, kernel: str, *arguments: Any) -> None:
        """Launch; raises BackendError with CUDA's reason."""
        try:
            getattr(self.native, kernel)(self._queue, *arguments)
        except RuntimeError as error:
            raise BackendError(f"{kernel} failed on {error}") from None

    def empty(self, *shape: int, dtype: str) -> Tensor:
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)

    def zeros(self, *shape: int, dtype: str) -> Tensor:
        import torch

        return torch.zeros(shape, dtype=getattr(torch, dtype), device=self.device)

    def upload(self, array: Any) -> Tensor:
        """Copy a small host array, without waiting for the stream."""
        import torch

        host = torch.as_tensor(array).contiguous()
        if self.device.type == "cuda":  # a copy from pageable memory would wait
            host = host.pin_memory()
        return host.to(self.device, non_blocking=True)

    def place(self, batch: Any) -> None:
        """Write a batch's image into device memory, which lives as long as the batch."""
        import torch

        pinned = self.device.type == "cuda"  # torch frees it when the stream is done with it
        host = torch.empty(max(1, batch.size()), dtype=torch.uint8, pin_memory=pinned)
        image = self.empty(host.numel(), dtype="uint8")
        batch.fill(host.data_ptr(), image.data_ptr(), image)
        image.copy_(host, non_blocking=True)

    def masks(self, keep: Keep) -> list[Tensor]:
        """Return masks from outside in device memory, [n] uint8 each."""
        import torch

        return [
            torch.as_tensor(m).to(self.device, torch.uint8).contiguous().view(-1)
            for m in given_masks(keep)
        ]


def _is_f64(chunk: Chunk) -> bool:
    return chunk.compute is DType.F64


class CudaKernels(Kernels):
    """`Kernels` in CUDA C++ for one device.

    native: the compiled module; tests pass one that an emulator of the device runs, with device "cpu".
    """

    name = "cuda"
    chunk_elements = 1 << 40  # a tensor at a time, however large

    def __init__(self, device: str, native: Any = None) -> None:
        if native is None:
            from fastmerge import _cuda

            native = _cuda
        self._native, self._device = native, device

    def _queue(self) -> _Queue:
        return _Queue(self._native, self._device)

    # ---- keep stages -----------------------------------------------------------------------------

    def _lower_keep(self, queue: _Queue, keep: Keep, owned: list[Any]) -> Any:
        masks = queue.masks(keep)
        owned.extend(masks)
        return lower_keep(self._native, keep, [m.data_ptr() for m in masks])

    def _keep_batch(
        self, queue: _Queue, keep: Keep, chunk: Chunk, ranks: _Ranks, with_base: bool = True
    ) -> Any:
        """Return a placed batch of one job, for a statistic over a chunk."""
        batch = self._native.Batch()
        batch.add_keep(
            self._lower_keep(queue, keep, ranks.owned),
            lower_operands(self._native, chunk, with_base),
            _is_f64(chunk),
            *ranks.addresses,
        )
        queue.place(batch)
        return batch

    def _ranks(self, queue: _Queue, keep: Keep, chunk: Chunk) -> _Ranks:
        """Find what a ranked drop goes by; nothing for other plans."""
        drop = keep.drop
        ranks = _Ranks()
        if not isinstance(drop, RankedDrop) or not chunk.n:
            return ranks
        k = len(chunk.experts)
        unit = chunk.cols if drop.axis is Axis.ROW else chunk.n
        ranks.unit = unit
        batch = self._keep_batch(queue, Keep(), chunk, _Ranks(owned=ranks.owned))
        if drop.by == "value":
            low, high = (queue.empty(k, chunk.n // unit, dtype="float64") for _ in range(2))
            queue.run("extremes", batch, unit, low.data_ptr(), high.data_ptr())
            ranks.low, ranks.high = low.data_ptr(), high.data_ptr()
            ranks.owned += [low, high]
            return ranks
        if drop.axis is Axis.ROW and not _is_f64(chunk):
            rank = queue.empty(k, chunk.n, dtype="int32")
            scratch = queue.empty(self._native.rank_scratch(queue._queue, batch), dtype="uint8")
            queue.run("rank_rows", batch, rank.data_ptr(), scratch.data_ptr())
            ranks.owned.append(scratch)
        else:
            rank = self._sorted_ranks(queue, batch, chunk, unit)
        ranks.rank = rank.data_ptr()
        ranks.owned.append(rank)
        return ranks

    def _sorted_ranks(self, queue: _Queue, batch: Any, chunk: Chunk, unit: int) -> Tensor:
        """Ranks by torch's stable sort, for units that a block does not sort."""
        import torch

        k = len(chunk.experts)
        keys = self.order_keys(queue, batch, chunk, 0, k)
        units = keys.view(k, chunk.n // unit, unit)
        order = torch.sort(units, dim=-1, stable=True).indices
        places = torch.arange(unit, dtype=torch.int32, device=queue.device).expand_as(order)
        return torch.empty_like(places.contiguous()).scatter_(-1, order, places).view(k, chunk.n)

    def order_keys(self, queue: _Queue, batch: Any, chunk: Chunk, first: int, last: int) -> Tensor:
        """Return [last - first, n] int32 or int64: keys of experts' deltas; of (-1, 0): the variance."""
        dtype = "int64" if _is_f64(chunk) else "int32"
        keys = queue.empty(last - first, chunk.n, dtype=dtype)
        queue.run("order_keys", batch, first, last, keys.data_ptr())
        return keys

    def batch_of(self, queue: _Queue, chunk: Chunk) -> Any:
        """Return a placed batch of a chunk's deltas, all of them kept."""
        return self._keep_batch(queue, Keep(), chunk, _Ranks())

    def _decided(self, queue: _Queue, keep: Keep, chunk: Chunk) -> tuple[Keep, _Ranks]:
        """Return plain keep stages and their ranks: what needs a second look is decided, a bit each."""
        drop = keep.drop
        ranked = isinstance(drop, RankedDrop)
        ranks = self._ranks(queue, keep, chunk)
        if not chunk.n or not (ranked or keep.select or keep.given):
            return keep, ranks
        words = -(-chunk.n // 64)
        bits = queue.empty(len(chunk.experts), words, dtype="int64")
        batch = self._keep_batch(queue, keep, chunk, ranks)
        queue.run("keep_bits", batch, bits.data_ptr(), words)
        kept = _Ranks(bits.data_ptr(), words, owned=[bits, *ranks.owned])
        return Keep(), kept

    # ---- the walk --------------------------------------------------------------------------------

    def walk(self, walk: Walk, chunk: Chunk, out: Buffer | Coded) -> bool:
        return self.walks([(walk, chunk, out)])[0]

    def walks(self, jobs: Sequence[tuple[Walk, Chunk, Buffer | Coded]]) -> list[bool]:
        return self.start_walks(jobs)()

    def start_walks(
        self, jobs: Sequence[tuple[Walk, Chunk, Buffer | Coded]]
    ) -> Callable[[], list[bool]]:
        if not jobs:
            return lambda: []
        queue = self._queue()
        bad = queue.zeros(len(jobs), dtype="int32")
        batch = self._native.Batch()
        owned: list[Any] = []
        residuals: list[tuple[Coded, Tensor]] = []
        for j, (walk, chunk, out) in enumerate(jobs):
            if not chunk.n:
                continue
            lowered = self._lower_walk(queue, walk, chunk, owned)
            place = bad[j:].data_ptr()
            if isinstance(out, Buffer):
                batch.add_walk(*lowered, out.address, out.dtype.code, place)
                continue
            result = self._native.Result(lower_coded(self._native, out), lowered[1])
            scratch = queue.empty(result.scratch_bytes, dtype="uint8")
            cost = queue.zeros(result.tiles if out.residual else 0, 2, dtype="float64")
            result.place(scratch.data_ptr(), cost.data_ptr())
            batch.add_walk_coded(*lowered, result, place)
            owned.append(scratch)
            residuals.append((out, cost))
        queue.place(batch)
        queue.run("walk", batch)

        def flags() -> list[bool]:
            found: list[bool] = (bad != 0).tolist()
            owned.clear()  # only now: the kernels have run
            for coded, cost in residuals:
                if coded.residual:
                    coded.residual.add(*np.asarray(cost.cpu()).sum(axis=0).tolist())
            residuals.clear()
            return found

        return flags

    def _lower_walk(
        self, queue: _Queue, walk: Walk, chunk: Chunk, owned: list[Any]
    ) -> tuple[Any, ...]:
        """Return what a batch takes of a walk: plan, operands, whether in float64, ranks."""
        keep, drop = walk.keep, walk.keep.drop
        rescales = drop is not None and drop.rescale
        if isinstance(drop, RankedDrop) and not rescales and keep.given is None:
            keep, ranks = self._decided(queue, keep, chunk)
        else:
            ranks = self._ranks(queue, keep, chunk)
        owned.append(ranks)
        return (
            lower_walk(self._native, walk, self._lower_keep(queue, keep, ranks.owned)),
            lower_operands(self._native, chunk, walk.takes_base),
            _is_f64(chunk),
            *ranks.addresses,
        )

    def peak(self, walk: Walk, chunk: Chunk, dtype: DType) -> tuple[bool, float]:
        if not chunk.n:
            return False, 0.0
        queue = self._queue()
        found = queue.zeros(2, dtype="int32")  # whether not finite; a float32's bits
        batch = self._native.Batch()
        owned: list[Any] = []
        batch.add_walk_plan(*self._lower_walk(queue, walk, chunk, owned))
        queue.place(batch)
        queue.run("walk_peak", batch, dtype.code, found.data_ptr())
        bad, largest = np.asarray(found.cpu())
        return bool(bad), float(largest.view(np.float32))

    def keep_mask(self, keep: Keep, chunk: Chunk) -> Any:
        queue = self._queue()
        mask = queue.zeros(len(chunk.experts), chunk.n, dtype="uint8")
        if mask.numel():
            ranks = self._ranks(queue, keep, chunk)
            queue.run("keep_mask", self._keep_batch(queue, keep, chunk, ranks), mask.data_ptr())
        return mask

    def keep_probability(self, drop: RankedDrop, chunk: Chunk) -> Any:
        queue = self._queue()
        p = queue.empty(len(chunk.experts), chunk.n, dtype="float64")
        if p.numel():
            keep = Keep(drop=drop)
            ranks = self._ranks(queue, keep, chunk)
            batch = self._keep_batch(queue, keep, chunk, ranks)
            queue.run("keep_probability", batch, p.data_ptr())
        return p

    # ---- statistics ------------------------------------------------------------------------------

    def sweep(
        self, statistic: Statistic, n: int, cols: int, n_experts: int, compute: DType
    ) -> Sweep:
        if isinstance(statistic, OrderStatistic):
            from fastmerge.backends import cuda_order

            return cuda_order.order_sweep(self, statistic, n, cols, n_experts, compute)
        if isinstance(statistic, Moments):
            return _Moments(self, statistic, n, n_experts)
        if isinstance(statistic, Gram):
            return _Gram(self, statistic, n, cols, n_experts)
        return _SignBalance(self, statistic)


class _OnePass(Sweep):
    """A statistic that is fed everything once."""

    def __init__(self, kernels: CudaKernels) -> None:
        self._kernels = kernels
        self._queue = kernels._queue()
        self._carry = self._queue.empty(2, 0, dtype="float64")
        self._fed = 0

    def next_pass(self) -> bool:
        return False

    def _carries(self) -> tuple[int, int]:
        """Where a chunk finds what the last one left unfinished, and where it leaves its own."""
        self._fed += 1
        old, new = self._carry[self._fed % 2], self._carry[1 - self._fed % 2]
        return old.data_ptr(), new.data_ptr()

    def _sum_tree(self, leaves: Tensor, n_units: int, width: int) -> F64:
        """Combine [n_units, leaves, width] into [n_units, width] on the host."""
        queue = self._queue
        n_leaves = leaves.shape[1]
        sums = queue.zeros(n_units, width, dtype="float64")
        if n_leaves and sums.numel():
            groups = n_leaves // self._kernels._native.TREE_GROUP
            nodes = queue.empty(max(1, n_units * groups * width), dtype="float64")
            queue.run(
                "sum_tree",
                leaves.data_ptr(),
                n_units,
                n_leaves,
                width,
                nodes.data_ptr(),
                sums.data_ptr(),
            )
        return np.asarray(sums.cpu().numpy(), np.float64)


class _Moments(_OnePass):
    def __init__(self, kernels: CudaKernels, request: Moments, n: int, k: int) -> None:
        super().__init__(kernels)
        self._request, self._n, self._k = request, n, k
        queue, native = self._queue, kernels._native
        self._keys = queue.zeros(k, 2, dtype="int64")
        self._f64 = False
        self._leaves = queue.empty(1, -(-n // native.SEGMENT), k * 2, dtype="float64")
        self._carry = queue.empty(2, k, 2, native.BLOCK, dtype="float64")

    def feed(self, chunk: Chunk, offset: int = 0) -> None:
        if not chunk.n or not self._k:
            return
        queue, kernels = self._queue, self._kernels
        keep, ranks = kernels._decided(queue, self._request.keep, chunk)
        batch = kernels._keep_batch(queue, keep, chunk, ranks)
        self._f64 = _is_f64(chunk)
        if self._request.of == "max":
            queue.run("largest", batch, self._keys.data_ptr())
            return
        queue.run(
            "moment_leaves",
            batch,
            self._request.of == "square",
            self._n,
            self._leaves.data_ptr(),
            *self._carries(),
        )

    def result(self) -> MomentResult:
        if self._request.of == "max":
            keys = self._keys.cpu().numpy()
            real = keys.view(np.float64) if self._f64 else keys.astype(np.uint32).view(np.float32)
            return MomentResult(*np.asarray(real.reshape(self._k, 2).T, np.float64))
        sums = self._sum_tree(self._leaves, 1, self._k * 2)
        return MomentResult(*sums.reshape(self._k, 2).T)


class _Gram(_OnePass):
    def __init__(self, kernels: CudaKernels, request: Gram, n: int, cols: int, k: int) -> None:
        super().__init__(kernels)
        self._request, self._n, self._k, self._cols = request, n, k, cols
        queue, native = self._queue, kernels._native
        self._pairs = k * (k + 1) // 2
        rows = n // cols if cols else 0
        if request.axis is Axis.COLUMN:
            shape = (1, -(-rows // native.BLOCK), self._pairs * cols)
            carry = (self._pairs, cols)
        else:
            by_row = request.axis is Axis.ROW
            units, unit = (rows, cols) if by_row else (1, n)
            shape = (units, -(-unit // native.SEGMENT), self._pairs)
            carry = (self._pairs, native.BLOCK)
        self._leaves = queue.empty(*shape, dtype="float64")
        self._carry = queue.empty(2, *carry, dtype="float64")

    def feed(self, chunk: Chunk, offset: int = 0) -> None:
        if not chunk.n or not self._k:
            return
        queue, kernels = self._queue, self._kernels
        batch = kernels._keep_batch(queue, Keep(), chunk, _Ranks(), self._request.delta)
        queue.run(
            "gram_leaves",
            batch,
            int(self._request.axis),
            self._n,
            self._leaves.data_ptr(),
            *self._carries(),
        )

    def result(self) -> F64:
        k, column = self._k, self._request.axis is Axis.COLUMN
        sums = self._sum_tree(self._leaves, self._leaves.shape[0], self._leaves.shape[2])
        pairs = sums.reshape(self._pairs, self._cols) if column else sums.T
        full = np.empty((k, k, pairs.shape[1] if k else 1))
        for p, (a, b) in enumerate(itertools.combinations_with_replacement(range(k), 2)):
            full[a, b] = full[b, a] = pairs[p]
        return full


class _SignBalance(_OnePass):
    def __init__(self, kernels: CudaKernels, request: SignBalance) -> None:
        super().__init__(kernels)
        self._request = request
        self._balance = self._queue.zeros(1, dtype="int64")

    def feed(self, chunk: Chunk, offset: int = 0) -> None:
        if not chunk.n:
            return
        queue, kernels, request = self._queue, self._kernels, self._request
        native = kernels._native
        walk = Walk(coefficient=request.coefficient, keep=request.keep, elect=request.elect)
        ranks = kernels._ranks(queue, request.keep, chunk)
        batch = native.Batch()
        batch.add_walk_plan(
            lower_walk(native, walk, kernels._lower_keep(queue, request.keep, ranks.owned)),
            lower_operands(native, chunk),
            _is_f64(chunk),
            *ranks.addresses,
        )
        queue.place(batch)
        queue.run("sign_balance", batch, self._balance.data_ptr())

    def result(self) -> int:
        return int(self._balance.item())


__all__ = ["CudaKernels", "why_not"]
