"""GGUF's types as output formats: one file holds the whole model."""

from __future__ import annotations

from fastmerge.coding import Format
from fastmerge.dtypes import DType

#: As `--quantize` takes them.
GGUF_FORMATS: dict[str, Format | DType] = {
    "q4_0": Format.Q4_0,
    "q4_1": Format.Q4_1,
    "q4_k": Format.Q4_K,
    "q8_0": Format.Q8_0,
    "gguf-mxfp4": Format.GGUF_MXFP4,
    "gguf-f16": DType.F16,
    "gguf-bf16": DType.BF16,
}
