"""Codings that codecs are asked for in tests, and their tensors as backends take them."""

from __future__ import annotations

from collections.abc import Iterator

import coded_tensors
import numpy as np
import torch
from coded_tensors import Floats

from fastmerge.backends import Buffer, Coded
from fastmerge.coding import Coding, Format, ScaleType, parts_of
from fastmerge.dtypes import DType

Case = tuple[Coding, int, int]
F32, F16, BF16 = DType.F32, DType.F16, DType.BF16


def name_of(case: Case) -> str:
    c, rows, cols = case
    options = [f"{c.group_rows}x{c.group}", c.scale.name.lower()]
    options += [k for k in ("v1", "other_rule", "nested") if getattr(c, k)]
    options += ["asymmetric"] * (not c.symmetric) + ["rotary"] * bool(c.rotary)
    return "-".join([c.format.name, c.dtype.name, *options, f"{rows}x{cols}"])


def written_cases() -> Iterator[Case]:
    """Yield codings that are written, each with a shape whose ends are ragged where they may be."""
    for f in (Format.BNB_NF4, Format.BNB_FP4):
        for other in (False, True):
            yield Coding(f, BF16, group=64, other_rule=other), 5, 77
            yield Coding(f, F32, group=64, other_rule=other), 1, 1
            yield Coding(f, F16, group=128, other_rule=other), 3, 128
    for dtype, scale in ((BF16, ScaleType.BF16), (F16, ScaleType.F16), (F32, ScaleType.F32)):
        for symmetric in (True, False):
            yield Coding(Format.INT4, dtype, scale, group=32, symmetric=symmetric), 11, 96
            yield Coding(Format.INT4, dtype, scale, group=0, symmetric=symmetric), 9, 77
    for symmetric in (True, False):
        yield Coding(Format.INT4, BF16, ScaleType.BF16, 32, 1, symmetric, other_rule=True), 8, 64
    for dtype in (BF16, F32):
        yield Coding(Format.NVFP4, dtype, ScaleType.E4M3, group=16), 5, 80
        for other in (False, True):
            yield Coding(Format.MXFP4, dtype, ScaleType.E8M0, group=32, other_rule=other), 5, 96
    for symmetric in (True, False):
        for v1 in (True, False):
            yield Coding(Format.GPTQ, BF16, ScaleType.F16, 32, 1, symmetric, v1), 16, 96
        yield Coding(Format.AWQ, F16, ScaleType.F16, 32, symmetric=symmetric), 16, 96
        yield Coding(Format.AWQ, F32, ScaleType.F16, symmetric=symmetric), 8, 64
    for f in (Format.Q4_0, Format.Q4_1, Format.Q8_0, Format.GGUF_MXFP4):
        yield Coding(f, BF16), 5, 96
        yield Coding(f, F32, rotary=4), 8, 64
    for scale in (ScaleType.F32, ScaleType.F16, ScaleType.BF16, ScaleType.E8M0):
        yield Coding(Format.FP8, BF16, scale), 5, 77
        yield Coding(Format.FP8, F32, scale, group=32, group_rows=4), 10, 77
    yield Coding(Format.FP8, BF16, group_rows=0), 5, 77
    yield Coding(Format.DENSE, F16, rotary=4), 8, 33


WRITTEN = list(written_cases())


READ = [
    (Coding(Format.Q4_K), 3, 512),
    (Coding(Format.Q6_K), 3, 512),
    (Coding(Format.GGUF_NVFP4), 3, 192),
    (Coding(Format.INT8), 3, 77),
    (Coding(Format.FP8, group=32, group_rows=4), 9, 77),
    (Coding(Format.MXFP4, scale=ScaleType.E8M0, group=32), 3, 96),
    (Coding(Format.NVFP4, scale=ScaleType.E4M3, group=16), 3, 96),
    (Coding(Format.NVFP4, BF16, ScaleType.E4M3, group=16, other_rule=True), 3, 96),
    (Coding(Format.Q4_K, rotary=4), 8, 256),
]


def viewed(host: coded_tensors.Coded, start: int = 0, stop: int | None = None) -> Coded:
    """Return elements [start, stop) of a tensor in numpy arrays, as backends take them."""
    stop = host.rows * host.cols if stop is None else stop
    specs = parts_of(host.coding, host.rows, host.cols)
    dtypes = {spec.slot: spec.dtype for spec in specs} | {"group_of": DType.I32}
    slots = {}
    for slot, held in host.slots.items():
        dtype = dtypes.get(slot, F32)
        slots[slot] = Buffer(held.ctypes.data, dtype, held.nbytes // dtype.itemsize, held)
    offset = host.fields.get("nested_offset", 0.0)
    scale = host.fields.get("tensor_scale", 1.0)
    return Coded(
        host.coding, host.rows, host.cols, 0, start, stop - start, slots, offset, scale
    )  # fmt: skip


def values_buffer(x: Floats, dtype: DType) -> tuple[Buffer, torch.Tensor]:
    held = torch.from_numpy(np.ascontiguousarray(x)).to(getattr(torch, dtype.torch))
    return Buffer(held.data_ptr(), dtype, held.numel(), held), held
