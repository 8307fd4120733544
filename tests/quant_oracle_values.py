"""What codes stand for, in plain numpy: the decoding half of tests/quant_oracle.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from quant_oracle import (
    AWQ_ORDER,
    E2M1,
    FP4,
    NF4,
    Bytes,
    Floats,
    Slots,
    dynamic_map,
    e4m3_value,
    f32,
    in_type,
    power_of_two,
)

from fastmerge.coding import Coding, Format, ScaleType
from fastmerge.dtypes import DType


def low_nibble_first(packed: Bytes) -> Bytes:
    return np.stack([packed & 15, packed >> 4], -1).reshape(-1)


def stored_scales(kind: ScaleType, raw: Bytes) -> Floats:
    if kind is ScaleType.F32:
        return raw.view(f32)
    if kind is ScaleType.F16:
        return raw.view(np.float16).astype(f32)
    if kind is ScaleType.BF16:
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(f32)
    if kind is ScaleType.E4M3:
        return e4m3_value(raw)
    return np.array([power_of_two(int(e) - 127) for e in raw], f32)


def decode(c: Coding, rows: int, cols: int, slots: Slots, **given: Any) -> Floats:
    """Values [rows, cols] of all formats but GGUF's, which have a library."""
    f, codes = c.format, slots["codes"]
    r, k = np.arange(rows)[:, None], np.arange(cols)[None, :]
    group = c.group or cols
    g = k // group
    if f in (Format.BNB_NF4, Format.BNB_FP4):
        n = rows * cols
        q = np.stack([codes >> 4, codes & 15], -1).reshape(-1)[:n]
        scales = slots["scales"]
        if c.nested:
            blocks = np.arange(len(scales))
            absmax = dynamic_map()[scales] * slots["nested"].view(f32)[blocks // 256]
            absmax = absmax + f32(given["nested_offset"])
        else:
            absmax = scales.view(f32)
        book = NF4 if f is Format.BNB_NF4 else FP4
        return (book[q] * absmax[np.arange(n) // c.group]).reshape(rows, cols)
    if f in (Format.GPTQ, Format.AWQ):
        words, zeros = codes.view(np.uint32), slots["zeros"].view(np.uint32)
        index = given.get("group_of")
        g = g if index is None else index[None, :]
        t = np.array([AWQ_ORDER.index(i) for i in range(8)]) if f is Format.AWQ else np.arange(8)
        if f is Format.AWQ:
            q = words.reshape(cols, rows // 8)[k, r // 8] >> (4 * t[r % 8]).astype(np.uint32) & 15
        else:
            q = words.reshape(cols // 8, rows)[k // 8, r] >> (4 * t[k % 8]).astype(np.uint32) & 15
        z = zeros.reshape(-1, rows // 8)[g, r // 8] >> (4 * t[r % 8]).astype(np.uint32) & 15
        z = (z + (1 if c.v1 else 0)) & 15
        s = slots["scales"].view(np.float16).astype(f32).reshape(-1, rows)[g, r]
        return (q.astype(f32) - z.astype(f32)) * s
    if f is Format.INT4:
        q = low_nibble_first(codes).reshape(rows, -1)[:, :cols].astype(f32)
        n_groups = -(-cols // group)
        s = stored_scales(c.scale, slots["scales"]).reshape(rows, n_groups)[r, g]
        z = f32(8)
        if not c.symmetric:
            words = slots["zeros"].view(np.uint32).reshape(-1, n_groups)
            z = (words[r // 8, g] >> (4 * (r % 8)).astype(np.uint32) & 15).astype(f32)
        dtypes = {ScaleType.F16: DType.F16, ScaleType.BF16: DType.BF16}
        return in_type((q - z) * s, dtypes.get(c.scale, DType.F32))
    if f in (Format.NVFP4, Format.MXFP4):
        q = low_nibble_first(codes).reshape(rows, cols)
        s = stored_scales(c.scale, slots["scales"]).reshape(rows, -1)[r, g]
        if f is Format.NVFP4:
            s = s / f32(given["tensor_scale"])
        return E2M1[q] * s
    if f is Format.INT8:
        return (
            codes.view(np.int8).reshape(rows, cols).astype(f32)
            * slots["scales"].view(f32)[:, None]
            / f32(127)
        )
    assert f is Format.FP8
    q = e4m3_value(codes).reshape(rows, cols)
    s = stored_scales(c.scale, slots["scales"])
    if c.group_rows == 0:
        return q * s[0]
    return q * s.reshape(-1, -(-cols // group))[r // c.group_rows, g]
