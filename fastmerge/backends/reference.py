"""The plain backend: docs/numerics.md in torch, on any machine, at any cost in time and memory.

Every other backend is tested against it for equality of bits; `reference_arithmetic` has the rules
that make that possible. `torch.set_flush_denormal` must be off.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmerge.backends import Buffer, Chunk, Coded, Kernels, Sweep, refuses_transform
from fastmerge.backends.memory import tensor_of
from fastmerge.backends.reference_arithmetic import (
    draws,
    key_of,
    nonzero_cut,
    ordered_sum,
    rank_cut,
    ranks_of,
    real_of,
    rounded,
    sum_columns,
    sum_units,
    variance,
)
from fastmerge.dtypes import DType
from fastmerge.stages import (
    F64,
    Axis,
    Combine,
    Cut,
    Drop,
    Elect,
    Gram,
    Keep,
    MomentResult,
    Moments,
    OrderStatistic,
    RankedDrop,
    SignBalance,
    Statistic,
    Transform,
    Walk,
)

_TORCH = {
    DType.F64: torch.float64,
    DType.F32: torch.float32,
    DType.F16: torch.float16,
    DType.BF16: torch.bfloat16,
}


# ---- values --------------------------------------------------------------------------------------


def _view(buffer: Buffer | Coded) -> Tensor:
    """Return the buffer as a host tensor: its own memory, or a copy of what lies on a device."""
    assert isinstance(buffer, Buffer)  # `ThroughDense` has decoded the others
    return tensor_of(buffer).cpu()


@dataclass(frozen=True)
class _Tile:
    """Elements [start, start + n) of one tensor. delta: [K, n] in the compute type."""

    delta: Tensor
    start: int
    cols: int

    @property
    def real(self) -> torch.dtype:
        return self.delta.dtype

    @property
    def n(self) -> int:
        return self.delta.shape[1]

    @property
    def index(self) -> Tensor:
        return torch.arange(self.start, self.start + self.n)

    def spread(self, values: Any, axis: Axis) -> Tensor:
        """Return [K, n] float64 or int64: the entry of [K, U] `values` for each element's unit."""
        if axis is Axis.ROW:
            unit = self.index // self.cols
        elif axis is Axis.COLUMN:
            unit = self.index % self.cols
        else:
            unit = torch.zeros_like(self.index)
        return torch.tensor(np.asarray(values))[:, unit]


def _tile(chunk: Chunk, use_base: bool = True) -> _Tile:
    real = _TORCH[chunk.compute]
    delta = torch.empty((len(chunk.experts), chunk.n), dtype=real)
    for k, expert in enumerate(chunk.experts):
        delta[k] = _view(expert).to(real)
    if use_base and chunk.base is not None:
        delta = delta - _view(chunk.base).to(real)
    return _Tile(delta, chunk.start, chunk.cols)


# ---- keep ----------------------------------------------------------------------------------------


def _above(x: Tensor, cut: Cut, tile: _Tile) -> Tensor:
    """Return [K, n] bool: which of the [K, n] values lie above their unit's cut."""
    value = tile.spread(np.asarray(cut.value, np.float64), cut.axis)
    last_tie = tile.spread(np.asarray(cut.last_tie, np.int64), cut.axis)
    key, at = key_of(x), key_of(value.to(x.dtype))
    return (value < 0) | (key > at) | ((key == at) & (tile.index <= last_tie))


def _ranked_probability(drop: RankedDrop, tile: _Tile) -> Tensor:
    """Return [K, n] float64: low + (high - low) * q, q by rank or value within the unit."""
    length = tile.cols if drop.axis is Axis.ROW else tile.n
    units = tile.delta.reshape(len(tile.delta), tile.n // max(length, 1), length)
    if drop.by == "rank":
        q = ranks_of(key_of(units)).to(torch.float64)
        q = q / torch.full_like(q, length - 1) if length > 1 else torch.full_like(q, 0.5)
    else:
        size = units.abs().to(torch.float64)
        order = torch.sort(key_of(units), dim=-1).indices
        low_size, high_size = size.gather(-1, order[..., :1]), size.gather(-1, order[..., -1:])
        q = (size - low_size) / ((high_size - low_size) + torch.tensor(1e-7, dtype=torch.float64))
    low = torch.tensor(drop.low, dtype=torch.float64)[:, None]
    high = torch.tensor(drop.high, dtype=torch.float64)[:, None]
    return low + (high - low) * q.reshape(tile.delta.shape)


def _uniform_keep(drop: Drop, k: int, tile: _Tile, given: bool) -> tuple[Tensor, float]:
    """Return [n] bool and the rescale factor of expert k."""
    p = float(drop.keep_probability[k])
    if not 0 < p < 1:
        return torch.full((tile.n,), p >= 1), 1.0
    bits = 32 if p < 0.005 or p > 0.995 else 16
    full = 2**bits
    threshold = min(max(math.floor(p * full + 0.5), 1), full - 1)
    kept = draws(drop.key[k], tile.index, bits) < threshold
    return kept, 1 / p if given else full / threshold


def _ranked_keep(
    drop: RankedDrop, k: int, tile: _Tile, p: Tensor, given: bool
) -> tuple[Tensor, Tensor | float]:
    """Return [n] bool and the rescale factors of expert k. p: [n] float64."""
    if drop.low[k] >= 1 or not drop.high[k] > 0:
        return torch.full((tile.n,), drop.low[k] >= 1), 1.0
    # NaN or infinity within a unit can make p NaN; such an element counts as dropped.
    threshold = torch.floor(p * 65536 + 0.5).clamp(0, 65536).nan_to_num(0)
    kept = draws(drop.key[k], tile.index, 16) < threshold
    if given:
        return kept, torch.ones_like(p) / p
    scale = torch.full_like(p, 65536) / threshold
    return kept, torch.where(threshold == 0, torch.zeros_like(p), scale)


def _keep(keep: Keep, tile: _Tile) -> tuple[Tensor, Tensor | None]:
    """Return [K, n] bool, which coordinates survive, and [K, n] factors if a drop rescales."""
    kept = torch.ones(tile.delta.shape, dtype=torch.bool)
    if keep.trim is not None:
        kept &= _above(tile.delta, keep.trim.keep, tile)
        if keep.trim.remove is not None:
            kept &= ~_above(tile.delta, keep.trim.remove, tile)
    if keep.select is not None and len(tile.delta):
        kept &= _above(variance(tile.delta), keep.select.cut, tile)
    given, drop = keep.given, keep.drop
    if given is not None:
        for k, mask in enumerate(given.masks):
            kept[k] &= torch.as_tensor(mask).cpu().reshape(-1) != 0
    if drop is None:
        return kept, None
    inverse = torch.empty_like(tile.delta)
    ranked = _ranked_probability(drop, tile) if isinstance(drop, RankedDrop) else None
    for k in range(len(tile.delta)):
        drawn: Tensor
        scale: Tensor | float
        if isinstance(drop, Drop):
            drawn, scale = _uniform_keep(drop, k, tile, given is not None)
        else:
            assert ranked is not None
            drawn, scale = _ranked_keep(drop, k, tile, ranked[k], given is not None)
        if given is None:
            kept[k] &= drawn
        inverse[k] = torch.as_tensor(scale, dtype=torch.float64).to(tile.real)
    return kept, inverse if drop.rescale else None


def _kept_values(keep: Keep, tile: _Tile) -> Tensor:
    """Return [K, n]: the deltas that survive, rescaled, and +0 elsewhere."""
    kept, inverse = _keep(keep, tile)
    v = tile.delta if inverse is None else tile.delta * inverse
    return torch.where(kept, v, torch.zeros_like(v))


# ---- walk ----------------------------------------------------------------------------------------


def _vote(elect: Elect, v: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the total vote ([n]; only its sign counts) and both camps ([K, n] bool)."""
    scale = real_of([1.0] * len(v) if elect.vote_scale is None else elect.vote_scale, v.dtype)
    if elect.by == "mass":
        vote = value
    elif elect.by == "count":
        one = torch.ones_like(v)
        vote = torch.where(v > 0, one, torch.where(v < 0, -one, v))
    elif elect.by == "normmass":
        vote = (v * v.abs()) * scale[:, None]
    else:
        vote = v
    plus, minus = vote > 0, (vote < 0) | vote.isnan()
    if elect.by == "normfrac":
        best, total = torch.zeros_like(v[0]), torch.zeros_like(v[0])
        for k in range(len(v)):
            score = (v[k] * v[k]) * scale[k]
            better = score > best
            best = torch.where(better, score, best)
            total = torch.where(better, v[k], total)
        return total, plus, minus
    return _camp_sum(vote, plus) + _camp_sum(vote, minus), plus, minus


def _camp_sum(x: Tensor, camp: Tensor) -> Tensor:
    """Return [n]: the members' entries of [K, n], added in order from +0."""
    total = torch.zeros_like(x[0])
    for k in range(len(x)):
        total = torch.where(camp[k], total + x[k], total)
    return total


def _camp_max(x: Tensor, camp: Tensor) -> Tensor:
    """Return [n]: the member's entry of largest key, the first among equals, or else +0."""
    largest = torch.zeros_like(x[0])
    for k in range(len(x)):
        better = camp[k] & (key_of(x[k]) > key_of(largest))
        largest = torch.where(better, x[k], largest)
    return largest


def _max(x: Tensor) -> Tensor:
    """Return [n]: the entry of [K, n] of largest key, the first among equals."""
    largest = x[0]
    for row in x[1:]:
        largest = torch.where(key_of(row) > key_of(largest), row, largest)
    return largest


def _combined(combine: Combine, value: Tensor, camp: Tensor | None, nobody: Tensor) -> Tensor:
    """Return [n]: merged = lambda * (sum or max of the elected values) / divisor.

    camp is None without an election; `nobody` marks coordinates that a zero vote leaves at +0.
    """
    real = value.dtype
    if combine.by == "max":
        merged = _max(value) if camp is None else _camp_max(value, camp)
    else:
        merged = ordered_sum(value) if camp is None else _camp_sum(value, camp)
    quotient = merged
    if combine.divide_by == "constant":
        quotient = merged / real_of(combine.divisor, real).expand_as(merged)
    elif combine.divide_by == "weight" and camp is not None:
        weights = [1.0] * len(value) if combine.divisor_weight is None else combine.divisor_weight
        total = _camp_sum(real_of(weights, real)[:, None].expand_as(value), camp)
        floor = real_of(combine.floor, real)
        if floor > 0:
            total = torch.maximum(total, floor)
        else:
            total = torch.where(total == 0, torch.ones_like(total), total)
        quotient = merged / total
    merged = torch.where(nobody, torch.zeros_like(merged), quotient)
    return merged if combine.lambda_ == 1 else merged * real_of(combine.lambda_, real)


def _transformed(transform: Transform, v: Tensor, base: Tensor | None, tile: _Tile) -> Tensor:
    """Return [K, n]: what a method's own stage makes of the kept values."""
    assert transform.reference is not None
    origin = torch.zeros_like(v[0]) if base is None else base
    arguments = [real_of(row, v.dtype) for row in transform.arguments]
    experts = [
        transform.reference(v[k], origin, tile.index, *(row[k] for row in arguments))
        for k in range(len(v))
    ]
    return torch.stack(experts)


def _merged(walk: Walk, tile: _Tile, base: Tensor | None) -> Tensor:
    v = _kept_values(walk.keep, tile)
    if walk.transform is not None:
        v = _transformed(walk.transform, v, base, tile)
    value = v * tile.spread(np.asarray(walk.coefficient, np.float64), walk.axis).to(tile.real)
    nobody = torch.zeros(tile.n, dtype=torch.bool)
    if walk.elect is None:
        return _combined(walk.combine, value, None, nobody)
    total, plus, minus = _vote(walk.elect, v, value)
    if walk.elect.on_zero == "none":
        nobody = total == 0
    elect_plus = total >= 0 if walk.elect.on_zero == "plus" else total > 0
    return _combined(walk.combine, value, torch.where(elect_plus, plus, minus), nobody)


# ---- statistics ----------------------------------------------------------------------------------


class _StoredSweep(Sweep):
    """Keeps all deltas and computes the statistic at the end, so that chunks cannot matter.

    Each tile comes with its tensor's offset in the model. `use_base` off keeps values, not deltas.
    """

    def __init__(
        self, compute: Callable[[list[tuple[int, _Tile]]], Any], use_base: bool = True
    ) -> None:
        self._compute = compute
        self._use_base = use_base
        self._fed: list[tuple[int, _Tile]] = []

    def feed(self, chunk: Chunk, offset: int = 0) -> None:
        if chunk.n:
            self._fed.append((offset, _tile(chunk, self._use_base)))

    def next_pass(self) -> bool:
        return False

    def result(self) -> Any:
        return self._compute(self._fed)


def _whole(fed: list[tuple[int, _Tile]], n_experts: int, real: torch.dtype) -> _Tile:
    """Return the one tensor that a sweep was fed."""
    if not fed:
        return _Tile(torch.empty((n_experts, 0), dtype=real), 0, 1)
    first = fed[0][1]
    return _Tile(torch.cat([tile.delta for _, tile in fed], 1), first.start, first.cols)


def _cuts(
    request: OrderStatistic,
    fed: list[tuple[int, _Tile]],
    unit: int,
    n_units: int,
    n_experts: int,
    real: torch.dtype,
) -> list[Cut]:
    of_variance, fraction = request.of == "variance", request.fraction_of_nonzero
    n_keys = 1 if of_variance else n_experts
    keys = torch.empty((n_keys, 0), dtype=torch.int64)
    index = torch.empty(0, dtype=torch.int64)
    for offset, tile in fed:
        x = variance(tile.delta) if of_variance else tile.delta
        keys = torch.cat([keys, key_of(x)], 1)
        index = torch.cat([index, offset + tile.index])
    cuts = []
    for r in range(len(request.ranks[0]) if fraction is None else 1):
        value = np.empty((n_keys, n_units))
        last_tie = np.empty((n_keys, n_units), np.int64)
        for k in range(n_keys):
            for u in range(n_units):
                run = slice(u * unit, (u + 1) * unit)
                if fraction is None:
                    rank = request.ranks[k][r]
                    cut = rank_cut(keys[k, run], index[run], rank, real, request.all_ties)
                else:
                    cut = nonzero_cut(keys[k, run], index[run], fraction, real, request.all_ties)
                value[k, u], last_tie[k, u] = cut
        cuts.append(Cut(value, last_tie, Axis.ROW if request.scope == "row" else Axis.TENSOR))
    return cuts


def _moments(request: Moments, tile: _Tile) -> MomentResult:
    kept, _ = _keep(request.keep, tile)
    raw = tile.delta.to(torch.float64)
    left = torch.where(kept, raw, torch.zeros_like(raw))
    if request.of == "max":
        # NaN is the largest magnitude of all, as among keys. The zeros stand for an empty tensor.
        zero = torch.zeros((len(raw), 1), dtype=torch.float64)
        return MomentResult(*(torch.cat([zero, x.abs()], 1).amax(1).numpy() for x in (raw, left)))
    terms = (x.abs() if request.of == "abs" else x * x for x in (raw, left))
    return MomentResult(*(sum_units(t).numpy() for t in terms))


def _gram(request: Gram, tile: _Tile, rows: int, cols: int) -> F64:
    x = tile.delta.to(torch.float64)
    add = sum_columns if request.axis is Axis.COLUMN else sum_units
    shape = (1, tile.n) if request.axis is Axis.TENSOR else (rows, cols)
    n_units = {Axis.TENSOR: 1, Axis.ROW: rows, Axis.COLUMN: cols}[request.axis]
    out = np.empty((len(x), len(x), n_units))
    for j in range(len(x)):
        for k in range(len(x)):
            out[j, k] = add((x[j] * x[k]).reshape(shape)).numpy()
    return out


def _sign_balance(request: SignBalance, tile: _Tile) -> int:
    v = _kept_values(request.keep, tile)
    total, _, _ = _vote(request.elect, v, v * real_of(request.coefficient, v.dtype))
    n_minus = int(torch.count_nonzero((total < 0) | total.isnan()))
    return int(torch.count_nonzero(total > 0)) - n_minus


# ---- the backend ---------------------------------------------------------------------------------


class ReferenceKernels(Kernels):
    """`Kernels` in plain torch on any machine: slow, and what `numerics.md` says to the bit."""

    name = "reference"

    def sweep(
        self, statistic: Statistic, n: int, cols: int, n_experts: int, compute: DType
    ) -> Sweep:
        real = _TORCH[compute]
        rows = n // cols if cols else 0
        if isinstance(statistic, OrderStatistic):
            unit, n_units = (cols, rows) if statistic.scope == "row" else (n, 1)
            return _StoredSweep(lambda fed: _cuts(statistic, fed, unit, n_units, n_experts, real))
        if isinstance(statistic, Moments):
            return _StoredSweep(lambda fed: _moments(statistic, _whole(fed, n_experts, real)))
        if isinstance(statistic, Gram):
            return _StoredSweep(
                lambda fed: _gram(statistic, _whole(fed, n_experts, real), rows, cols),
                use_base=statistic.delta,
            )
        return _StoredSweep(lambda fed: _sign_balance(statistic, _whole(fed, n_experts, real)))

    def walk(self, walk: Walk, chunk: Chunk, out: Buffer | Coded) -> bool:
        if chunk.n == 0:
            return False
        tile = _tile(chunk, walk.takes_base)
        base = None if chunk.base is None else _view(chunk.base).to(tile.real)
        if walk.takes_base and base is None:
            raise ValueError("walk: no base to add to or to take deltas from")
        if not chunk.experts:
            if base is None:
                raise ValueError("walk: neither experts nor a base")
            result = base
        else:
            merged = _merged(walk, tile, base if walk.takes_base else None)
            result = base + merged if walk.add_base and base is not None else merged
        # Looked at before the store: `out` may be the base's own memory.
        operands = [chunk.base, *chunk.experts]
        bad = any(not _view(x).isfinite().all() for x in operands if x is not None)
        assert isinstance(out, Buffer)
        tensor_of(out).copy_(rounded(result, _TORCH[out.dtype]))
        return bad

    def refuses(self, walk: Walk) -> str | None:
        has_twin = walk.transform is None or walk.transform.reference is not None
        return None if has_twin else refuses_transform(walk)

    def keep_mask(self, keep: Keep, chunk: Chunk) -> Any:
        kept, _ = _keep(keep, _tile(chunk))
        return _as_operands(kept.to(torch.uint8), chunk)

    def keep_probability(self, drop: RankedDrop, chunk: Chunk) -> Any:
        return _as_operands(_ranked_probability(drop, _tile(chunk)), chunk)


def _as_operands(x: Tensor, chunk: Chunk) -> Any:
    """Return a numpy array for operands in host memory, else the tensor, moved to them."""
    device = chunk.experts[0].device if chunk.experts else "cpu"
    return x.numpy() if device == "cpu" else x.to(device)
