"""GPTQ: columns are rounded in order, and what each loses is made up for by those that are still to come.

With H = X^T X of the layer's inputs, damped, and U upper with U^T U = H^-1: the error of column j over
U[j][j], times U[j, j+1:], is taken from the columns after it (arXiv:2210.17323). A group's scale is chosen
when its first column is reached, from what the weights are by then. All is float64, so that neither tiles of
rows nor the device show in the codes; scales and codes follow the rules of csrc/core/four_bit in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastmerge.backends import Buffer, Coded
from fastmerge.backends.memory import tensor_of
from fastmerge.checkpoint.files import opened, read_at
from fastmerge.checkpoint.header import TensorInfo
from fastmerge.checkpoint.wording import place, shown
from fastmerge.coding import Coding, Format
from fastmerge.dtypes import DType
from fastmerge.errors import CheckpointError
from fastmerge.linalg import cholesky

if TYPE_CHECKING:
    from torch import Tensor

#: Share of the mean of H's diagonal that is added to it.
DAMP = 0.01

#: Columns whose errors are passed on together.
BLOCK = 128

#: Columns up to which each passes its error on to the next ones alone.
LEAF = 8

#: Elements that are rounded at once, and the bytes that each takes meanwhile.
TILE, TILE_ON_DEVICE = 1 << 21, 1 << 24
_TILE_BYTES = 56

#: What torch takes in a process that needs it for this alone (measured: 280 MiB).
TORCH_BYTES = 280 << 20

#: What |H - H^T| may reach, of H's largest diagonal element.
_ASYMMETRY = 1e-3

#: Where the outputs of a word of AWQ lie, from the lowest nibble.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def scratch_bytes(cols: int, n: int, device: str) -> int:
    """Bound the memory that rounding n elements at once takes, H and its factors included.

    They are [cols, cols], one of float32 and four of float64 while H is factored.
    """
    tile = TILE if device == "cpu" else TILE_ON_DEVICE
    rows = max(8, tile // cols)
    held = min(n, rows * cols) * _TILE_BYTES + 4 * n
    return 36 * cols * cols + held + (TORCH_BYTES if device == "cpu" else 0)


# ---- Hessians -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hessian:
    """H, float32 [cols, cols], and U, float64, upper: U^T U is the inverse of H, damped."""

    h: Tensor
    u: Tensor


def factored(h: Tensor) -> Tensor:
    """Return U of a symmetric H [cols, cols], float64.

    Raises:
        ValueError: H is not positive definite, even with the damping. The text begins with a verb.
    """
    import torch

    damp = DAMP * h.diagonal().mean()
    if not bool(damp > 0):
        raise ValueError("has no positive diagonal")
    # With J, which reverses order: J H J = L L^T, so H = R R^T with R = J L J, upper, and U is R's inverse.
    reverse = h.flip(0, 1)
    reverse.diagonal().add_(damp)
    lower = cholesky(reverse)
    del reverse
    if lower is None:
        raise ValueError(f"is not positive definite, even with {DAMP} of its mean diagonal added")
    upper = lower.flip(0, 1)
    del lower
    eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
    u: Tensor = torch.linalg.solve_triangular(upper, eye, upper=True)
    return u


def read_hessian(info: TensorInfo, device: str = "cpu") -> Hessian:
    """Read a Hessian, check and factor it.

    Raises:
        CheckpointError: it holds NaN or infinity, is not symmetric, or not positive definite.
    """
    import torch

    with opened(info.file) as (fd, _):
        data = bytearray(read_at(fd, info.file, info.offset, info.n_bytes))
    values = np.frombuffer(data, "<f4" if info.dtype is DType.F32 else "<f8").reshape(info.shape)
    h = torch.from_numpy(values).to(device, torch.float64)
    try:
        _check_symmetric(h)
        return Hessian(h.float(), factored(h))
    except ValueError as error:
        raise CheckpointError(
            f"{place(info.file)}: Hessian {shown(info.name)} {error}; it must be X^T X of a layer's inputs"
        ) from None


def _check_symmetric(h: Tensor) -> None:
    most = h.diagonal().abs().max() * _ASYMMETRY if len(h) else 0
    for a in range(0, len(h), 1024):
        rows, columns = h[a : a + 1024], h[:, a : a + 1024].T
        if not bool(rows.isfinite().all()):
            raise ValueError("holds NaN or infinity")
        if bool(((rows - columns).abs() > most).any()):
            raise ValueError("is not symmetric")


class LastHessian:
    """The Hessian that was asked for last: tensors come one after another, and it may take gigabytes."""

    def __init__(self) -> None:
        self._known: tuple[TensorInfo, str] | None = None
        self._hessian: Hessian | None = None

    def get(self, info: TensorInfo, device: str) -> Hessian:
        if self._known != (info, device) or self._hessian is None:
            self._hessian = None  # before there is another
            self._hessian = read_hessian(info, device)
            self._known = (info, device)
        return self._hessian


# ---- scales and codes of a group ----------------------------------------------------------------


def _rounded(x: Tensor, dtype: DType) -> Tensor:
    """Return float32 x, rounded to the nearest of `dtype`."""
    import torch

    return x if dtype is DType.F32 else x.to(getattr(torch, dtype.torch)).float()


@dataclass(frozen=True)
class _Scale:
    """Scale and zero of a group in each row: float32 [rows]. stored: what the scale is when read again."""

    coding: Coding
    scale: Tensor
    stored: Tensor
    zero: Tensor

    def codes(self, x: Tensor) -> Tensor:
        """Return the codes of x, float32 [..., rows], as whole float32: -8..7 of int4, 0..15 of words."""
        if self.coding.format is Format.INT4:
            return (x / self.stored + self.zero).clamp(-8, 7).round()
        return ((x + self.zero * self.scale) / self.stored).clamp(0, 15).round()

    def values(self, codes: Tensor) -> Tensor:
        """Return what codes are read as."""
        product = (codes - self.zero) * self.stored
        return (
            _rounded(product, self.coding.dtype) if self.coding.format is Format.INT4 else product
        )


_EPSILON = {DType.BF16: 0.0078125, DType.F16: 0.0009765625, DType.F32: 1.1920929e-07}


def _scale(coding: Coding, low: Tensor, high: Tensor) -> _Scale:
    """Return the scale of groups whose values, and 0, lie in [low, high]; float32 [rows]."""
    peak = (-low).maximum(high)
    if coding.format is not Format.INT4:
        span = 2 * peak if coding.symmetric else high - low
        scale = span.clamp(min=1e-5) / span.new_tensor(15)
        least = 1 if coding.format is Format.GPTQ else 0
        zero = (-low / scale).clamp(least, 15).round()
        return _Scale(
            coding,
            scale,
            _rounded(scale, DType.F16),
            zero.new_full(zero.shape, 8) if coding.symmetric else zero,
        )
    dtype = coding.dtype
    if coding.symmetric:
        scale = _rounded(peak / peak.new_tensor(7.5), dtype)
        zero = scale.new_zeros(scale.shape)
    else:
        scale = _rounded(_rounded(high - low, dtype) / low.new_tensor(15), dtype)
        zero = _rounded(-8 - _rounded(low / scale, dtype), dtype)
        zero = zero.nan_to_num(0.0, 7.0, -8.0).clamp(-8, 7).round()
    scale = scale.masked_fill(scale == 0, _EPSILON[dtype])
    return _Scale(coding, scale, scale, zero)


def _scale_of(coding: Coding, x: Tensor) -> _Scale:
    """Return the scale of a group x, float32 [group, rows], by its range or the best of 13 parts of it."""
    import torch

    low, high = x.amin(0).clamp(max=0), x.amax(0).clamp(min=0)

    def clipped(part: float) -> _Scale:
        dtype = coding.dtype if coding.format is Format.INT4 else DType.F32
        factor = low.new_tensor(part)
        return _scale(coding, _rounded(low * factor, dtype), _rounded(high * factor, dtype))

    best = clipped(1.0)
    if not coding.search:
        return best

    def error(s: _Scale) -> Tensor:
        return (s.values(s.codes(x)) - x).double().square().sum(0)

    least = error(best)
    for k in range(28, 41):
        found = clipped(k / 40)
        e = error(found)
        better = e < least
        least = e.minimum(least)
        picked = (
            torch.where(better, getattr(found, part), getattr(best, part))
            for part in ("scale", "stored", "zero")
        )
        best = _Scale(coding, *picked)
    return best


# ---- rounding -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rounded:
    """Rows that are rounded, column by column: codes and values [cols, rows], scales and zeros
    [groups, rows]. Codes and zeros are 0..15 as words hold them, values float32 as they are read again."""

    codes: Tensor
    values: Tensor
    scales: Tensor
    zeros: Tensor


def round_columns(w: Tensor, coding: Coding, u: Tensor | None) -> Rounded:
    """Round weights w, [cols, rows] (one column of the weight after another), float64; w is used up.

    u: see `Hessian`; None: every column to the nearest, none makes up for another.
    """
    import torch

    columns = _Columns(w, coding)
    if u is None:
        columns.round_to_nearest()
    else:
        for first in range(0, len(w), columns.step):
            columns.round(first, min(len(w), first + columns.step), u)
    scales = columns.scales
    less = 1 if coding.v1 and coding.format is Format.GPTQ else 0
    zeros = (torch.stack([s.zero for s in scales]) + columns.shift - less).to(torch.uint8)
    return Rounded(columns.codes, columns.values, torch.stack([s.stored for s in scales]), zeros)


class _Columns:
    """Weights on their way: what is rounded of them, and what is left."""

    def __init__(self, w: Tensor, coding: Coding) -> None:
        import torch

        self.w, self.coding = w, coding
        self.codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
        self.values = torch.empty(w.shape, dtype=torch.float32, device=w.device)
        self.scales: list[_Scale] = []
        cols = len(w)
        self.group = coding.group or cols
        self.step = max(1, BLOCK // self.group) * self.group if self.group < cols else BLOCK
        self.errors = torch.zeros_like(w[: self.step])  # of the step's columns, each over U[j][j]
        self.shift = 8 if coding.format is Format.INT4 else 0

    def round_to_nearest(self) -> None:
        for first in range(0, len(self.w), self.group):
            of = slice(first, first + self.group)
            self.scales.append(_scale_of(self.coding, self.w[of].float()))
            self._write(of, self.w[of])

    def _write(self, of: slice | int, w: Tensor) -> None:
        """Write the codes of columns of the last group."""
        q = self.scales[-1].codes(w.float())
        self.codes[of] = q + self.shift
        self.values[of] = self.scales[-1].values(q)

    def round(self, first: int, stop: int, u: Tensor) -> None:
        """Round a step's columns, and pass on what they lost to all that follow."""
        self._round(first, stop, first, u)
        self._pass_on(first, stop, len(self.w), first, u)

    def _round(self, first: int, stop: int, step: int, u: Tensor) -> None:
        """Round columns of the step that begins at `step`: one half, and when that is passed on the other."""
        n = stop - first
        if n <= LEAF:
            for j in range(first, stop):
                self._round_one(j, stop, step, u)
            return
        # No group is begun before all of it knows what was lost.
        middle = first + (n // self.group // 2 * self.group if n > self.group else n // 2)
        self._round(first, middle, step, u)
        self._pass_on(first, middle, stop, step, u)
        self._round(middle, stop, step, u)

    def _round_one(self, j: int, stop: int, step: int, u: Tensor) -> None:
        w = self.w
        if j % self.group == 0:
            self.scales.append(_scale_of(self.coding, w[j : j + self.group].float()))
        self._write(j, w[j])
        error = self.errors[j - step]
        error.copy_(w[j]).sub_(self.values[j]).div_(u[j, j])
        w[j + 1 : stop] -= u[j, j + 1 : stop, None] * error

    def _pass_on(self, first: int, middle: int, stop: int, step: int, u: Tensor) -> None:
        """Take what columns [first, middle) lost from columns [middle, stop)."""
        if middle < stop:
            lost = self.errors[first - step : middle - step]
            self.w[middle:stop] -= u[first:middle, middle:stop].T @ lost


# ---- where formats keep them --------------------------------------------------------------------


def _words(nibbles: Tensor, dim: int, order: Sequence[int] = range(8)) -> Tensor:
    """Pack eights along `dim` into int32 words, lowest nibble first; order: which of the eight goes where."""
    import torch

    shape = (*nibbles.shape[:dim], -1, 8, *nibbles.shape[dim + 1 :])
    eights = nibbles.reshape(shape).movedim(dim + 1, -1)
    words = torch.zeros(eights.shape[:-1], dtype=torch.int64, device=nibbles.device)
    for at, i in enumerate(order):
        words |= eights[..., i].long() << 4 * at
    return words.to(torch.int32)


def pack(rounded: Rounded, out: Coded, row: int) -> None:
    """Write rows from `row` of the tensor on to the parts of a result.

    The first row and their number are multiples of 8 where the format packs rows.
    """
    import torch

    rows = rounded.codes.shape[1]
    parts = {slot: tensor_of(buffer) for slot, buffer in out.slots.items()}
    groups = len(rounded.scales)
    if out.coding.format is Format.INT4:
        at = slice(row - out.origin // out.cols, row - out.origin // out.cols + rows)
        padded = torch.nn.functional.pad(rounded.codes.T, (0, -out.cols % 8))
        codes = _words(padded, 1)
        parts["codes"].view(-1, codes.shape[1])[at] = codes
        parts["scales"].view(-1, groups)[at] = rounded.scales.T.to(parts["scales"].dtype)
        if not out.coding.symmetric:
            words = slice(at.start // 8, -(-at.stop // 8))
            parts["zeros"].view(-1, groups)[words] = _words(rounded.zeros.T, 0)
        return
    at, words = slice(row, row + rows), slice(row // 8, (row + rows) // 8)
    order = _AWQ_ORDER if out.coding.format is Format.AWQ else range(8)
    if out.coding.format is Format.AWQ:
        parts["codes"].view(out.cols, -1)[:, words] = _words(rounded.codes, 1, order)
    else:
        parts["codes"].view(out.cols // 8, -1)[:, at] = _words(rounded.codes, 0)
    parts["scales"].view(groups, -1)[:, at] = rounded.scales.half()
    parts["zeros"].view(groups, -1)[:, words] = _words(rounded.zeros, 1, order)


@dataclass(frozen=True)
class Feedback:
    """Rounds results with the Hessian `info`; see `backends.Feedback`."""

    info: TensorInfo
    last: LastHessian

    def code(self, out: Coded, values: Buffer) -> bool:
        merged = tensor_of(values).view(-1, out.cols)
        if not bool(merged.isfinite().all()):
            return False
        hessian = self.last.get(self.info, out.device)
        tile = TILE if out.device == "cpu" else TILE_ON_DEVICE
        step = max(8, tile // out.cols // 8 * 8)
        for a in range(0, len(merged), step):
            w = merged[a : a + step].T.float().contiguous()
            rounded = round_columns(w.double(), out.coding, hessian.u)
            pack(rounded, out, out.start // out.cols + a)
            if out.residual is None:
                continue
            lost = rounded.values - w
            out.residual.add(_sum_of_squares(lost), _sum_of_squares(w))
            nearest = round_columns(w.double(), out.coding, None).values - w
            out.residual.add_output(*(_through(d, hessian.h) for d in (lost, nearest, w)))
        return True


def _sum_of_squares(x: Tensor) -> float:
    return float(x.double().square().sum())


def _through(d: Tensor, h: Tensor) -> float:
    """Return tr(D^T H D), the sum of squares of X D; D is [cols, rows]."""
    import torch

    return float((h @ d).mul_(d).sum(dtype=torch.float64))


__all__ = ["Feedback", "LastHessian", "Rounded", "factored", "pack", "round_columns"]
