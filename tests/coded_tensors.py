"""A coded tensor in numpy arrays, for what the codecs are asked in tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastmerge import _cpu
from fastmerge.coding import Coding, Format, parts_of
from fastmerge.dtypes import DType

Floats = NDArray[np.float32]

TORCH = {DType.F16: torch.float16, DType.BF16: torch.bfloat16}
FLAT = (Format.BNB_NF4, Format.BNB_FP4)


def rounded(x: Floats, dtype: DType) -> Floats:
    """Return x, every element rounded to the nearest of `dtype`, as float32."""
    if dtype is DType.F32:
        return x.astype(np.float32)
    return torch.from_numpy(x.astype(np.float32)).to(TORCH[dtype]).float().numpy()


class Coded:
    """One tensor [rows, cols] as bytes by slot; `fields` go to the kernels as they are."""

    def __init__(self, coding: Coding, rows: int, cols: int, fill: int = 0xA5, **fields: Any):
        self.coding, self.rows, self.cols, self.fields = coding, rows, cols, fields
        self.slots = {
            spec.slot: np.full(spec.n_bytes, fill, np.uint8)
            for spec in parts_of(coding, rows, cols)
        }

    def view(self, **fields: Any) -> _cpu.Coded:
        c = self.coding
        places = {slot: a.ctypes.data for slot, a in self.slots.items()}
        given = {
            "format": int(c.format), "type": c.dtype.code, "scale_type": int(c.scale),
            "group": c.group, "group_rows": c.group_rows, "symmetric": c.symmetric, "v1": c.v1,
            "other_rule": c.other_rule, "search": c.search, "rotary": c.rotary,
            "rows": self.rows, "cols": self.cols,
        }  # fmt: skip
        return _cpu.Coded(**{**given, **places, **self.fields, **fields})

    def encode(self, x: Floats) -> Coded:
        """Fill the slots from x [rows, cols], which is of the coding's type already."""
        x = np.ascontiguousarray(x, np.float32)
        assert x.shape == (self.rows, self.cols)
        c = self.coding
        peak = float(np.abs(x).max()) if x.size else 0.0
        scale = _cpu.tensor_scale(self.view(), peak)
        if c.format is Format.NVFP4:
            self.fields["tensor_scale"] = scale
        if c.format is Format.FP8 and c.group_rows == 0:
            self.slots["scales"][:] = np.frombuffer(np.float32(scale).tobytes(), np.uint8)
        if not c.nested:
            _cpu.encode(self.view(), 0, self.rows, x.ctypes.data)
            return self
        blocks = len(self.slots["scales"])
        absmax = np.empty(blocks, np.float32)
        _cpu.encode(self.view(scales=absmax.ctypes.data, nested=0), 0, self.rows, x.ctypes.data)
        offset = float(self.fields.get("nested_offset", absmax.mean(dtype=np.float32)))
        self.fields["nested_offset"] = offset
        codes, nested = self.slots["scales"].ctypes.data, self.slots["nested"].ctypes.data
        _cpu.encode_nested(absmax.ctypes.data, blocks, offset, not c.other_rule, codes, nested)
        return self

    def decode(self, start: int = 0, stop: int | None = None) -> Floats:
        """Return flat elements [start, stop)."""
        stop = self.rows * self.cols if stop is None else stop
        out = np.full(stop - start, np.nan, np.float32)
        _cpu.decode(self.view(first=start), stop - start, out.ctypes.data)
        return out
