"""Element types, once: safetensors spelling, torch and YAML spelling, size, and the code kernels take."""

from __future__ import annotations

import enum

from fastmerge.errors import RecipeError


class DType(enum.Enum):
    """One element type of a checkpoint. `code` is csrc/core/types.hpp's DType, -1 where kernels have none."""

    F64 = ("F64", "float64", 8, 0)
    F32 = ("F32", "float32", 4, 1)
    F16 = ("F16", "float16", 2, 2)
    BF16 = ("BF16", "bfloat16", 2, 3)
    F8_E4M3 = ("F8_E4M3", "float8_e4m3fn", 1, -1)
    F8_E5M2 = ("F8_E5M2", "float8_e5m2", 1, -1)
    F8_E8M0 = ("F8_E8M0", "float8_e8m0fnu", 1, -1)  # powers of two: scales
    I64 = ("I64", "int64", 8, -1)
    I32 = ("I32", "int32", 4, -1)
    I16 = ("I16", "int16", 2, -1)
    I8 = ("I8", "int8", 1, -1)
    U64 = ("U64", "uint64", 8, -1)
    U32 = ("U32", "uint32", 4, -1)
    U16 = ("U16", "uint16", 2, -1)
    U8 = ("U8", "uint8", 1, -1)
    BOOL = ("BOOL", "bool", 1, -1)

    def __init__(self, safetensors: str, torch: str, itemsize: int, code: int) -> None:
        self.safetensors = safetensors
        self.torch = torch
        self.itemsize = itemsize
        self.code = code

    @property
    def is_merged(self) -> bool:
        """Whether kernels do arithmetic on this type; everything else is copied."""
        return self.code >= 0


BY_SAFETENSORS = {d.safetensors: d for d in DType}
BY_TORCH = {d.torch: d for d in DType}

#: The names a recipe's `dtype` and `out_dtype` take, as in mergekit.
RECIPE_NAMES = ("float16", "bfloat16", "float32", "float64")


def parse_dtype(text: str, place: str) -> DType:
    """Return the type that a recipe names, with or without the prefix `torch.`."""
    name = text.removeprefix("torch.")
    if name not in RECIPE_NAMES:
        raise RecipeError(f"{place} must be one of {', '.join(RECIPE_NAMES)}, got {text!r}")
    return BY_TORCH[name]


def promote(dtypes: list[DType]) -> DType:
    """Return the type that holds all of `dtypes`, by torch's promotion rule (bf16 with fp16 gives fp32)."""
    kinds = set(dtypes)
    if len(kinds) == 1:
        return dtypes[0]
    return DType.F64 if DType.F64 in kinds else DType.F32
