"""What a recognised weight decodes to, in plain numpy from the stored bytes alone."""

from __future__ import annotations

import numpy as np

from fastmerge.checkpoint.coded import CodedInfo
from fastmerge.coding import Coding, Format

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)


def raw(info: CodedInfo, slot: str, dtype: str) -> np.ndarray:
    part = info.parts[slot]
    with part.file.open("rb") as f:
        f.seek(part.offset)
        return np.frombuffer(f.read(part.n_bytes), dtype)


def scales(info: CodedInfo) -> np.ndarray:
    """The scales as float32, flat."""
    kind = info.coding.scale.name
    if kind == "F32":
        return raw(info, "scales", "<f4")
    if kind == "F16":
        return raw(info, "scales", "<f2").astype(np.float32)
    if kind == "BF16":
        return (raw(info, "scales", "<u2").astype(np.uint32) << 16).view(np.float32)
    if kind == "E4M3":
        return e4m3(raw(info, "scales", "u1"))
    return np.exp2(raw(info, "scales", "u1").astype(np.float32) - 127)


def e4m3(codes: np.ndarray) -> np.ndarray:
    exponent, mantissa = (codes >> 3 & 15).astype(np.int32), (codes & 7).astype(np.float32)
    small = mantissa * np.float32(2**-9)
    large = (1 + mantissa / 8) * np.exp2(exponent.astype(np.float32) - 7)
    value = np.where(exponent == 0, small, large).astype(np.float32)
    return np.where(codes & 128, -value, value)


def nibbles(codes: np.ndarray, *, high_first: bool = False) -> np.ndarray:
    pair = np.stack([codes & 15, codes >> 4], -1)
    return (pair[..., ::-1] if high_first else pair).reshape(*codes.shape[:-1], -1)


def words(codes: np.ndarray, axis: int) -> np.ndarray:
    """Eight nibbles of each int32, along `axis`."""
    w = np.moveaxis(codes.view(np.uint32), axis, -1)
    out = (w[..., None] >> (4 * np.arange(8, dtype=np.uint32))) & 15
    return np.moveaxis(out.reshape(*w.shape[:-1], -1), -1, axis).astype(np.float32)


def decode(info: CodedInfo, quant_map: np.ndarray | None = None) -> np.ndarray:
    """Return [rows, cols] float32. quant_map: of the file, for bitsandbytes."""
    c, (rows, cols) = info.coding, info.shape
    f = c.format
    if f in (Format.BNB_NF4, Format.BNB_FP4):
        assert quant_map is not None
        code = nibbles(raw(info, "codes", "u1"), high_first=True)[: rows * cols]
        peaks = scales(info) if not c.nested else _nested(info)
        return (quant_map[code] * np.repeat(peaks, c.group)[: rows * cols]).reshape(rows, cols)
    if f is Format.INT8:
        q = raw(info, "codes", "i1").reshape(rows, cols).astype(np.float32)
        return q * scales(info)[:, None] / np.float32(127)
    if f is Format.FP8:
        w = e4m3(raw(info, "codes", "u1")).reshape(rows, cols)
        return w * _spread(scales(info), c, rows, cols)
    if f is Format.INT4:
        q = words(raw(info, "codes", "<i4").reshape(rows, -1), 1)[:, :cols]
        zero: np.ndarray | float = 8
        if not c.symmetric:
            packed = raw(info, "zeros", "<i4").reshape(-(-rows // 8), -1)
            zero = _spread(words(packed, 0)[:rows], c, rows, cols)
        return (q - zero) * _spread(scales(info), c, rows, cols)
    if f in (Format.MXFP4, Format.NVFP4):
        code = nibbles(raw(info, "codes", "u1").reshape(rows, -1))
        value = np.where(code & 8, -E2M1[code & 7], E2M1[code & 7])
        scale = scales(info)
        if f is Format.NVFP4:
            tensor = np.float32(info.tensor_scale)
            scale = scale * tensor if c.other_rule else scale / tensor
        return value * _spread(scale, c, rows, cols)
    return _by_columns(info)


def _nested(info: CodedInfo) -> np.ndarray:
    from bitsandbytes.functional import create_dynamic_map

    over = np.repeat(raw(info, "nested", "<f4"), 256)
    codes = raw(info, "scales", "u1")
    table = create_dynamic_map().numpy()
    return table[codes] * over[: len(codes)] + np.float32(info.nested_offset)


def _spread(scale: np.ndarray, c: Coding, rows: int, cols: int) -> np.ndarray:
    group, group_rows = c.group or cols, c.group_rows or rows
    grid = scale.reshape(-(-rows // group_rows), -(-cols // group))
    return np.repeat(np.repeat(grid, group_rows, 0), group, 1)[:rows, :cols]


def _by_columns(info: CodedInfo) -> np.ndarray:
    """GPTQ and AWQ, whose first dimension is that of inputs."""
    c, (rows, cols) = info.coding, info.shape
    group = np.arange(cols) // (c.group or cols)
    if "group_of" in info.parts:
        group = raw(info, "group_of", "<i4")
    scale = scales(info).reshape(-1, rows)[group]
    codes, zeros = raw(info, "codes", "<i4"), raw(info, "zeros", "<i4").reshape(-1, rows // 8)
    if c.format is Format.GPTQ:
        q, zero = words(codes.reshape(-1, rows), 0), words(zeros, 1)[group] + (1 if c.v1 else 0)
    else:
        at = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # nibble of each output

        def outputs(w: np.ndarray) -> np.ndarray:
            return words(w, 1).reshape(len(w), -1, 8)[:, :, at].reshape(len(w), -1)

        q, zero = outputs(codes.reshape(cols, -1)), outputs(zeros)[group]
    return np.ascontiguousarray(((q - zero) * scale).T)
