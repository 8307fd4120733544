"""Hessians of layers in a safetensors file: H = X^T X of a linear module's inputs, by name of its weight."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmerge.checkpoint.files import FileIdentity
from fastmerge.checkpoint.header import TensorInfo, header_digest, read_header
from fastmerge.checkpoint.wording import place, shown
from fastmerge.coding import Coding, Format
from fastmerge.dtypes import DType
from fastmerge.errors import CheckpointError, RecipeError
from fastmerge.quant.modules import module_of

#: Formats of integers, whose codes can be rounded column by column.
ROUNDED = (Format.INT4, Format.GPTQ, Format.AWQ)


@dataclass(frozen=True)
class Hessians:
    """The tensors of one file: name of a weight or of its module -> [cols, cols], float32 or float64."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    identity: FileIdentity

    @classmethod
    def open(cls, path: Path) -> Hessians:
        """Read the file's header. Raises CheckpointError if it is no safetensors file."""
        header = read_header(path)
        return cls(path, header.tensors, header.identity)

    def of(self, name: str, shape: tuple[int, ...], coding: Coding) -> TensorInfo | None:
        """Return a weight's Hessian; None: there is none, or its format has no integers.

        Raises:
            CheckpointError: it is of another type, or of another number of columns.
        """
        info = self.tensors.get(name) or self.tensors.get(module_of(name))
        if info is None or coding.format not in ROUNDED:
            return None
        what = f"{place(self.path)}: tensor {shown(info.name)} has"
        if info.dtype not in (DType.F32, DType.F64):
            raise CheckpointError(
                f"{what} dtype {info.dtype.safetensors}, but a Hessian is F32 or F64; convert it"
            )
        if info.shape != (shape[-1], shape[-1]):
            raise CheckpointError(
                f"{what} shape {shown(list(info.shape))}, but {shown(name)} has {shape[-1]} columns; "
                "give the Hessian of its inputs"
            )
        return info

    def check_used(self, format: str, used: Iterable[TensorInfo]) -> list[str]:
        """Return warnings about tensors that belong to no weight.

        Raises:
            RecipeError: none belongs to any.
        """
        found = {info.name for info in used}
        unused = sorted(set(self.tensors) - found)
        if not found:
            raise RecipeError(
                f"hessians of {self.path} belong to no weight that is coded as {format}; name its tensors as "
                "the weights"
            )
        if not unused:
            return []
        return [
            f"hessians: {len(unused)} tensors belong to no weight that is coded as integers, such as "
            f"{unused[0]!r}"
        ]


def identified(path: Path) -> dict[str, Any]:
    """Return what tells whether a file of Hessians is the same one, as JSON-able data."""
    info = Hessians.open(path).identity
    return {
        "path": os.path.abspath(path),
        "size": info.size,
        "mtime_ns": info.mtime_ns,
        "header": header_digest(path),
    }


def refuse_unless_rounded(format: str, coding: Coding | None) -> None:
    """Raise RecipeError where codes of a format cannot be rounded with Hessians. coding: None for GGUF's."""
    if coding is None or coding.format not in ROUNDED:
        raise RecipeError(
            f"hessians round codes of integers, which {format} has not; choose int4, int4-asym, gptq or awq, "
            "or leave them out"
        )
