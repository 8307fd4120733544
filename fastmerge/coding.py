"""Tensors as codes of a few bits: which format, with which options, and the bytes each part takes.

Pure data, as `stages`: what each format's bytes mean is docs/formats.md, the arithmetic is
csrc/core/four_bit. A coded tensor W is [rows, cols] = [out, in]; `cols` is the contiguous dimension.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from fractions import Fraction

from fastmerge.dtypes import DType


class Format(enum.IntEnum):
    """How codes, scales and zeros lie in memory; csrc/core/four_bit/format.hpp."""

    DENSE = 0  # elements as they are, whose rows may be stored in another order
    BNB_NF4 = 1
    BNB_FP4 = 2
    INT4 = 3  # compressed-tensors pack-quantized
    NVFP4 = 4
    MXFP4 = 5
    GPTQ = 6
    AWQ = 7
    Q4_0 = 8
    Q4_1 = 9
    Q8_0 = 10
    Q4_K = 11
    GGUF_MXFP4 = 12
    GGUF_NVFP4 = 13
    FP8 = 14
    INT8 = 15  # bitsandbytes LLM.int8
    Q6_K = 16


class ScaleType(enum.IntEnum):
    """The type of a scale in memory."""

    F32 = 0
    F16 = 1
    BF16 = 2
    E4M3 = 3
    E8M0 = 4
    U8 = 5  # codes of scales


#: Formats that are decoded and never made.
READ_ONLY = (Format.Q6_K, Format.GGUF_NVFP4, Format.INT8)

#: Elements and bytes of one block of a GGUF type.
GGUF_BLOCKS = {
    Format.Q4_0: (32, 18),
    Format.Q4_1: (32, 20),
    Format.Q8_0: (32, 34),
    Format.Q4_K: (256, 144),
    Format.Q6_K: (256, 210),
    Format.GGUF_MXFP4: (32, 17),
    Format.GGUF_NVFP4: (64, 36),
}


@dataclass(frozen=True)
class Coding:
    """One format with its options.

    dtype:      DENSE: the elements' type. Else what a value is rounded to, nearest even, before it is coded
                (compressed-tensors: also the type of the scales).
    group:      elements along a row that share a scale; 0: all of a row. BNB: of the flattened tensor.
    group_rows: rows that share one; 0: all of the tensor's (with group 0: one scale of the tensor).
    symmetric:  INT4, GPTQ, AWQ: no zero points (GPTQ, AWQ store the constant one).
    v1:         GPTQ: zero points are stored less one.
    other_rule: BNB: the CUDA kernel's rule in exact arithmetic. INT4 in bfloat16: divide in float32. MXFP4:
                the exponent of OCP's specification. NVFP4: ModelOpt's, whose scale of the tensor is a factor
                and not a divisor: a scale of a group is scale * tensor_scale, rounded once.
    nested:     BNB: scales are themselves coded, 8 bits each (double quantisation).
    search:     choose scales by least squared error.
    rotary:     rows of a head whose halves are stored interleaved (GGUF's q and k of Llama); 0: none.
    """

    format: Format
    dtype: DType = DType.F32
    scale: ScaleType = ScaleType.F32
    group: int = 0
    group_rows: int = 1
    symmetric: bool = True
    v1: bool = False
    other_rule: bool = False
    nested: bool = False
    search: bool = False
    rotary: int = 0


@dataclass(frozen=True)
class PartSpec:
    """One part of a coded tensor in memory and on disk: codes, scales, zeros, nested or group_of.

    per_element: bytes per element where the part can be cut along with the tensor; None: it is needed whole.
    step:        bytes that stand for as many elements as share them, even where the last are fewer.
    """

    slot: str
    dtype: DType
    shape: tuple[int, ...]
    per_element: Fraction | None
    step: int = 1

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """Return the bytes [first, end) that hold elements [start, stop), `start` a multiple of the unit."""
        if self.per_element is None:
            return 0, self.n_bytes
        first = math.floor(start * self.per_element)
        end = math.ceil(stop * self.per_element / self.step) * self.step
        return first, min(end, self.n_bytes)


def parts_of(coding: Coding, rows: int, cols: int) -> tuple[PartSpec, ...]:
    """Return the parts of a coded tensor [rows, cols], codes first."""
    f, n = coding.format, rows * cols
    if f is Format.DENSE:
        size = coding.dtype.itemsize
        return (PartSpec("codes", coding.dtype, (rows, cols), Fraction(size)),)
    if f in GGUF_BLOCKS:
        elements, size = GGUF_BLOCKS[f]
        blocks = rows * (cols // elements)
        return (PartSpec("codes", DType.U8, (blocks * size,), Fraction(size, elements)),)
    if f in (Format.BNB_NF4, Format.BNB_FP4):
        blocks = -(-n // coding.group)
        codes = PartSpec("codes", DType.U8, (-(-n // 2), 1), Fraction(1, 2))
        if not coding.nested:
            return (codes, PartSpec("scales", DType.F32, (blocks,), Fraction(4, coding.group), 4))
        return (
            codes,
            PartSpec("scales", DType.U8, (blocks,), Fraction(1, coding.group)),
            PartSpec("nested", DType.F32, (-(-blocks // 256),), None),
        )
    group = coding.group or cols
    groups = -(-cols // group)
    if f in (Format.GPTQ, Format.AWQ):
        shape = (cols // 8, rows) if f is Format.GPTQ else (cols, rows // 8)
        return (
            PartSpec("codes", DType.I32, shape, None),
            PartSpec("scales", DType.F16, (groups, rows), None),
            PartSpec("zeros", DType.I32, (groups, rows // 8), None),
        )
    if f is Format.INT4:
        words = -(-cols // 8)
        parts = [PartSpec("codes", DType.I32, (rows, words), Fraction(4 * words, cols))]
        of = {ScaleType.F32: DType.F32, ScaleType.F16: DType.F16, ScaleType.BF16: DType.BF16}
        scale = of[coding.scale]
        parts.append(
            PartSpec("scales", scale, (rows, groups), Fraction(groups * scale.itemsize, cols))
        )
        if not coding.symmetric:
            packed = (-(-rows // 8), groups)
            per = Fraction(4 * groups, 8 * cols)
            parts.append(PartSpec("zeros", DType.I32, packed, per, 4 * groups))
        return tuple(parts)
    if f in (Format.NVFP4, Format.MXFP4):
        kind = DType.F8_E4M3 if f is Format.NVFP4 else DType.U8
        return (
            PartSpec("codes", DType.U8, (rows, cols // 2), Fraction(1, 2)),
            PartSpec("scales", kind, (rows, groups), Fraction(groups, cols)),
        )
    if f is Format.INT8:
        return (
            PartSpec("codes", DType.I8, (rows, cols), Fraction(1)),
            PartSpec("scales", DType.F32, (rows,), Fraction(4, cols)),
        )
    assert f is Format.FP8
    of = {
        ScaleType.F32: DType.F32,
        ScaleType.F16: DType.F16,
        ScaleType.BF16: DType.BF16,
        ScaleType.E8M0: DType.U8,
    }
    scale = of[coding.scale]
    codes = PartSpec("codes", DType.F8_E4M3, (rows, cols), Fraction(1))
    if coding.group_rows == 0:
        return (codes, PartSpec("scales", scale, (1,), None))
    shape = (-(-rows // coding.group_rows), groups)
    step = groups * scale.itemsize
    per = Fraction(step, coding.group_rows * cols)
    return (codes, PartSpec("scales", scale, shape, per, step))


def unit_rows(coding: Coding, cols: int) -> int:
    """Return how many rows a cut through a coded tensor must be a multiple of; 0: it cannot be cut."""
    f = coding.format
    if f in (Format.BNB_NF4, Format.BNB_FP4):
        block = math.lcm(2, coding.group)
        return block // math.gcd(block, cols)
    if f is Format.GPTQ or f is Format.AWQ:
        return 0
    rows = 8 if f is Format.INT4 and not coding.symmetric else 1
    if f is Format.FP8:
        rows = coding.group_rows or 1
    return math.lcm(rows, coding.rotary or 1)


def result_rows(coding: Coding, cols: int) -> int:
    """Return how many rows what is coded at once must be a multiple of, where the tensor does not end."""
    return unit_rows(coding, cols) or 8  # GPTQ and AWQ pack eight outputs in a word


def is_atomic(coding: Coding) -> bool:
    """Return whether a result can only be written whole: some part depends on all of the tensor."""
    return coding.nested or coding.format in (Format.GPTQ, Format.AWQ)


def needs_peak(coding: Coding) -> bool:
    """Return whether coding starts from the largest magnitude of the whole tensor."""
    return coding.format is Format.NVFP4 or (coding.format is Format.FP8 and not coding.group_rows)
