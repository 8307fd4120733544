"""Matrices of a pack as stored tensors: in a floating type, or in few bits per row.

A matrix [rows, cols] in slot s is one tensor s, or the two tensors s.codes and s.scales. int4 and nf4 are the
shared codecs; int8 has the layout of LLM.int8, a scale per row; int2 is this module's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastmerge.coded_tensors import QuantTensor, dequantize_4bit, quantize_4bit
from fastmerge.coding import Coding, Format, ScaleType, parts_of
from fastmerge.dtypes import BY_TORCH, DType
from fastmerge.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

#: Formats that are a type alone.
DENSE = ("float64", "float32", "bfloat16", "float16")

#: How coded formats lie in memory, where the shared codecs decode them.
_CODINGS = {
    "int8": Coding(Format.INT8, DType.F32),
    "int4": Coding(Format.INT4, DType.F32, ScaleType.F32, 128),
    "nf4": Coding(Format.BNB_NF4, DType.F32, ScaleType.F32, 64),
}

NAMES = (*DENSE, *_CODINGS, "int2")

#: Elements along a row that share a scale in int4 and int2; int4 pads rows with zeros to whole groups.
GROUP = 128

#: Rounds in which int2 fits codes to scales and scales to codes.
_ROUNDS = 8


@dataclass(frozen=True)
class Spec:
    """Type and shape of one stored tensor."""

    dtype: DType
    shape: tuple[int, ...]


def check_format(name: str, what: str) -> None:
    """Raise RecipeError unless there is a format of that name."""
    if name not in NAMES:
        raise RecipeError(f"{what} must be one of {', '.join(NAMES)}, got {name!r}")


def specs(slot: str, format: str, rows: int, cols: int) -> dict[str, Spec]:
    """Return the stored tensors of a matrix."""
    if format in DENSE:
        return {slot: Spec(BY_TORCH[format], (rows, cols))}
    if format == "int2":
        return {
            f"{slot}.codes": Spec(DType.U8, (rows, -(-cols // 4))),
            f"{slot}.scales": Spec(DType.BF16, (rows, -(-cols // GROUP))),
        }
    parts = parts_of(_CODINGS[format], rows, _padded(format, cols))
    return {f"{slot}.{part.slot}": Spec(part.dtype, part.shape) for part in parts}


def encode(slot: str, format: str, values: Tensor) -> dict[str, Tensor]:
    """Return a matrix [rows, cols] as its stored tensors, on the CPU."""
    import torch

    if format in DENSE:
        return {slot: values.to(getattr(torch, format)).cpu().contiguous()}
    x = values.float().cpu().contiguous()
    if format == "int2":
        codes, scales = encode_int2(x)
    elif format == "int8":
        codes, scales = _encode_int8(x)
    else:
        pad = _padded(format, x.shape[1]) - x.shape[1]
        wide = torch.nn.functional.pad(x, (0, pad)) if pad else x
        parts = quantize_4bit(wide, format).parts
        codes, scales = parts["codes"], parts["scales"]
    return {f"{slot}.codes": codes, f"{slot}.scales": scales}


def decode(slot: str, format: str, parts: Mapping[str, Tensor], rows: int, cols: int) -> Tensor:
    """Return the matrix [rows, cols] of its stored tensors: float32, or float64 for float64."""
    import torch

    if format in DENSE:
        found = parts[slot]
        return found if format == "float64" else found.float()
    codes, scales = parts[f"{slot}.codes"], parts[f"{slot}.scales"]
    if format == "int2":
        return decode_int2(codes, scales, cols)
    held = {"codes": codes, "scales": scales}
    coded = QuantTensor(_CODINGS[format], (rows, _padded(format, cols)), held)
    values: Tensor = dequantize_4bit(coded, torch.float32)
    return values[:, :cols]


def _padded(format: str, cols: int) -> int:
    return -(-cols // GROUP) * GROUP if format == "int4" else cols


def _encode_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes rn(127 x / peak) of each row and its peak, of which LLM.int8 is code * peak / 127."""
    import torch

    peak = x.abs().amax(1)
    codes = (x * (127 / peak.masked_fill(peak == 0, 1))[:, None]).round()
    return codes.to(torch.int8), peak


def encode_int2(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x [rows, cols] float32 as int2: codes uint8 [rows, ceil(cols / 4)], scales bfloat16 [rows,
    groups].

    A value is scale * (code - 1.5), code 0 to 3; a row's element j is bits 2 (j % 4) and up of byte j // 4.
    Scales are fitted to least squared error, codes and scales by turns from a scale of 1.25 mean |x|.
    """
    import torch

    rows, cols = x.shape
    groups = -(-cols // GROUP)
    wide = torch.nn.functional.pad(x, (0, groups * GROUP - cols)).reshape(rows, groups, GROUP)
    real = (
        torch.zeros(groups * GROUP).index_fill_(0, torch.arange(cols), 1.0).reshape(groups, GROUP)
    )
    scale = 1.25 * wide.abs().sum(2) / real.sum(1)
    for _ in range(_ROUNDS):
        level = (_codes(wide, scale) - 1.5) * real
        scale = (wide * level).sum(2) / (level * level).sum(2)
    scales = scale.bfloat16()
    codes = _codes(wide, scales.float()).reshape(rows, -1)[:, : -(-cols // 4) * 4]
    codes[:, cols:] = 0
    four = codes.reshape(rows, -1, 4).to(torch.uint8)
    return four[..., 0] | four[..., 1] << 2 | four[..., 2] << 4 | four[..., 3] << 6, scales


def _codes(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale.masked_fill(scale == 0, 1)[..., None]).floor().add_(2).clamp_(0, 3)


def decode_int2(codes: Tensor, scales: Tensor, cols: int) -> Tensor:
    """Return what int2 codes stand for, float32 [rows, cols]."""
    import torch

    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)
    level = ((codes[..., None] >> shifts) & 3).flatten(1)[:, :cols].float() - 1.5
    return level * scales.float().repeat_interleave(GROUP, 1)[:, :cols]
