"""GPTQ as the paper's plain loop, one row and one column at a time, in numpy float64. Shares no code with the
package."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def nearest(x: float, kind: str) -> float:
    x = np.float32(x)
    if kind == "float16":
        return float(np.float16(x))
    if kind == "bfloat16" and np.isfinite(x):
        ulp = 2.0 ** (max(int(np.frexp(x)[1]), -125) - 8)  # 8 bits of mantissa
        return float(np.rint(float(x) / ulp) * ulp)
    return float(x)


class Grid:
    """The codes -8..7 or 0..15 of one group of one row."""

    def __init__(self, family: str, symmetric: bool, dtype: str, values: Floats):
        f32 = np.float32
        low, high = min(0.0, values.min()), max(0.0, values.max())
        self.family, self.dtype = family, dtype
        if family == "int4":
            low, high = nearest(low, dtype), nearest(high, dtype)
            if symmetric:
                self.scale, self.zero = nearest(f32(max(-low, high)) / f32(7.5), dtype), 0.0
            else:
                width = nearest(f32(high) - f32(low), dtype)
                self.scale = nearest(f32(width) / f32(15), dtype)
                start = nearest(f32(low) / f32(self.scale), dtype) if self.scale else np.nan
                zero = nearest(-8 - start, dtype)
                self.zero = 0.0 if np.isnan(zero) else float(np.rint(np.clip(zero, -8, 7)))
            self.scale = self.read = self.scale or EPSILON[dtype]
            self.first = -8
            return
        low, high = f32(low), f32(high)
        width = f32(2) * max(-low, high) if symmetric else high - low
        self.scale = float(max(width, f32(1e-5)) / f32(15))
        self.read = float(np.float16(self.scale))
        least = 1 if family == "gptq" else 0
        self.zero = 8.0 if symmetric else float(np.rint(np.clip(-low / f32(self.scale), least, 15)))
        self.first = 0

    def code(self, x: float) -> int:
        x, scale, read, zero = map(np.float32, (x, self.scale, self.read, self.zero))
        at = x / read + zero if self.family == "int4" else (x + zero * scale) / read
        return int(np.rint(np.clip(at, self.first, self.first + 15)))

    def value(self, code: int) -> float:
        product = (np.float32(code) - np.float32(self.zero)) * np.float32(self.read)
        return nearest(product, self.dtype) if self.family == "int4" else float(product)


def inverse_factor(h: Floats) -> Floats:
    damped = h + 0.01 * np.mean(np.diag(h)) * np.eye(len(h))
    return np.linalg.cholesky(np.linalg.inv(damped)).T


def gptq(
    w: Floats, h: Floats | None, family: str, symmetric: bool, group: int, dtype: str
) -> tuple[NDArray[np.int64], Floats]:
    """Return codes and values, [rows, cols], of w [rows, cols]; h None: to the nearest."""
    w = np.array(w, np.float64)
    rows, cols = w.shape
    group = group or cols
    u = None if h is None else inverse_factor(h)
    codes, values = np.empty(w.shape, np.int64), np.empty(w.shape)
    for r in range(rows):
        grid = None
        for j in range(cols):
            if j % group == 0:
                grid = Grid(family, symmetric, dtype, w[r, j : j + group].astype(np.float32))
            assert grid is not None
            codes[r, j] = grid.code(w[r, j])
            values[r, j] = grid.value(codes[r, j])
            if u is not None:
                w[r, j:] -= (w[r, j] - values[r, j]) / u[j, j] * u[j, j:]
    return codes, values


def output_error(values: Floats, w: Floats, h: Floats) -> float:
    d = values - w
    return float(np.sqrt(np.trace(d @ h @ d.T) / np.trace(w @ h @ w.T)))
