"""gpt-oss: experts in MXFP4, [experts, rows, cols / 32, 16] bytes, which are refused.

A merge could walk them, but a dense model holds each expert transposed, [experts, cols, rows], and neither
a dense nor a coded result would be a file that a reader of the model opens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastmerge.checkpoint.wording import place
from fastmerge.errors import CheckpointError
from fastmerge.quant.stored import Found, Stored


def read(stored: Stored, config: Mapping[str, Any]) -> Iterator[Found]:
    raise CheckpointError(
        f"{place(stored.path)} holds experts in gpt-oss' MXFP4, which are not read: they lie transposed; "
        "load the model with transformers' Mxfp4Config(dequantize=True) and save_pretrained() it"
    )
