"""Coded tensors for kernels on the host that know none: decoded before, coded after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fastmerge.backends import Buffer, Chunk, Coded, Kernels, Sweep
from fastmerge.backends.lowering import lower_coded
from fastmerge.backends.memory import bytes_of
from fastmerge.dtypes import DType
from fastmerge.stages import Statistic, Walk


def decoded(operand: Buffer | Coded | None) -> Buffer | None:
    """Return an operand on the host as numbers: float32 of codes."""
    if not isinstance(operand, Coded):
        return operand
    from fastmerge import _cpu

    values = np.empty(operand.n, np.float32)
    _cpu.decode(lower_coded(_cpu, operand), operand.n, values.ctypes.data)
    return Buffer(values.ctypes.data, DType.F32, operand.n, values)


def dense(chunk: Chunk) -> Chunk:
    """Return the chunk with every coded operand decoded to float32."""
    experts = [e for x in chunk.experts if (e := decoded(x)) is not None]
    return replace(chunk, base=decoded(chunk.base), experts=experts)


def code(out: Coded, values: Buffer) -> None:
    """Code a result's elements, given as `out.coding.dtype`."""
    from fastmerge import _cpu

    n = out.n
    narrow = bytes_of(values)
    if values.dtype is DType.BF16:
        wide = (narrow.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        kind = np.float16 if values.dtype is DType.F16 else np.float32
        wide = np.ascontiguousarray(narrow.view(kind).astype(np.float32))
    row, rows = out.start // out.cols, -(-n // out.cols)
    _cpu.encode(lower_coded(_cpu, out), row, rows, wide.ctypes.data)
    if out.residual is not None:
        found = decoded(replace(out, residual=None))
        assert found is not None
        errors = bytes_of(found).view(np.float32).astype(np.float64) - wide
        out.residual.add(float(errors @ errors), float(wide.astype(np.float64) @ wide))


class _Decoding(Sweep):
    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep

    def feed(self, chunk: Chunk, offset: int = 0) -> None:
        self._sweep.feed(dense(chunk), offset)

    def next_pass(self) -> bool:
        return self._sweep.next_pass()

    def wanted(self) -> Sequence[tuple[int, int]] | None:
        return self._sweep.wanted()

    def result(self) -> Any:
        return self._sweep.result()


class ThroughDense(Kernels):
    """`Kernels` over others that take dense tensors alone."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self.name = kernels.name
        self.chunk_elements = kernels.chunk_elements

    def sweep(
        self, statistic: Statistic, n: int, cols: int, n_experts: int, compute: DType
    ) -> Sweep:
        return _Decoding(self._kernels.sweep(statistic, n, cols, n_experts, compute))

    def walk(self, walk: Walk, chunk: Chunk, out: Buffer | Coded) -> bool:
        if not isinstance(out, Coded):
            return self._kernels.walk(walk, dense(chunk), out)
        dtype = out.coding.dtype
        held = np.empty(chunk.n * dtype.itemsize, np.uint8)
        merged = Buffer(held.ctypes.data, dtype, chunk.n, held)
        bad = self._kernels.walk(walk, dense(chunk), merged)
        code(out, merged)
        return bad

    def refuses(self, walk: Walk) -> str | None:
        return self._kernels.refuses(walk)

    def keep_mask(self, keep: Any, chunk: Chunk) -> Any:
        return self._kernels.keep_mask(keep, dense(chunk))

    def keep_probability(self, drop: Any, chunk: Chunk) -> Any:
        return self._kernels.keep_probability(drop, dense(chunk))
