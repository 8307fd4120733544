"""What `bench` times of coded tensors: merges into each format, and merges of experts in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmerge.backends import Buffer, Coded, Kernels
from fastmerge.bench_cases import COLS, Case, Run, average, result, ties
from fastmerge.coding import Coding, Format, needs_peak, parts_of
from fastmerge.dtypes import DType
from fastmerge.evaluate import Operands, run_walk
from fastmerge.quant.formats import output_format
from fastmerge.quant.gguf_formats import GGUF_FORMATS
from fastmerge.stages import Walk

#: Formats that are timed: one of each arithmetic and layout.
TIMED = (
    "nf4",
    "fp4",
    "int4",
    "int4-asym",
    "nvfp4",
    "mxfp4",
    "gptq",
    "awq",
    "fp8",
    "q4_0",
    "q4_k",
    "q8_0",
)
READ = ("nf4", "int4", "nvfp4", "q4_k", "fp8")
_K = 4

#: A divisor of NVFP4 for tensors of about these magnitudes.
_SCALE = 2688 / 0.2


def _coding(name: str, n: int) -> Coding:
    what = GGUF_FORMATS.get(name)
    if isinstance(what, Format):
        return Coding(what, DType.BF16)
    return output_format(name).coding(DType.BF16, (n // COLS, COLS))


def empty(name: str, n: int) -> tuple[list[NDArray[np.uint8]], Coded]:
    """Return memory for a coded tensor [n / COLS, COLS], and the tensor."""
    coding, rows = _coding(name, n), n // COLS
    held, slots = [], {}
    for part in parts_of(coding, rows, COLS):
        memory = np.zeros(part.n_bytes, np.uint8)
        held.append(memory)
        slots[part.slot] = Buffer(
            memory.ctypes.data, part.dtype, part.n_bytes // part.dtype.itemsize, memory
        )
    scale = _SCALE if needs_peak(coding) else 1.0
    return held, Coded(coding, rows, COLS, 0, 0, n, slots, tensor_scale=scale)


def _into(name: str, what: str, k: int, walk: Callable[[Kernels, Operands], Walk]) -> Case:
    def prepare(kernels: Kernels, operands: Operands) -> Run:
        built = walk(kernels, operands)
        held, out = empty(name, operands.n)

        def run() -> Any:
            run_walk(kernels, built, operands, out)
            return held

        return run

    return Case(f"{what} {name} K={k}", k, prepare, with_base=what != "quantise")


def _from(name: str, what: str, k: int) -> Case:
    def prepare(kernels: Kernels, operands: Operands) -> Run:
        experts = [_coded(kernels, expert, name) for expert in operands.experts]
        coded = Operands(None, experts, COLS, DType.F32)
        built = average(kernels, coded)
        held, out = result(operands.n)

        def run() -> Any:
            run_walk(kernels, built, coded, out)
            return held

        return run

    return Case(f"{what} {name} K={k}", k, prepare, with_base=False)


def _coded(kernels: Kernels, expert: Buffer | Coded, name: str) -> Coded:
    _, out = empty(name, expert.n)
    one = Operands(None, [expert], COLS, DType.F32)
    run_walk(kernels, average(kernels, one), one, out)
    return out


def coded_cases() -> list[Case]:
    """Return merges and conversions into each format, then merges and conversions out of some."""
    found = [_into(name, "ties to", _K, ties) for name in TIMED]
    found += [_into(name, "quantise", 1, average) for name in TIMED]
    found += [_from(name, "average of", _K) for name in READ]
    return found + [_from(name, "dequantise", 1) for name in READ]
