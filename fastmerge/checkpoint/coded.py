"""A tensor that is stored as codes: several stored tensors that are one tensor of the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastmerge.checkpoint.header import TensorInfo
from fastmerge.coding import Coding
from fastmerge.dtypes import DType


@dataclass(frozen=True)
class LowRank:
    """scale * (B A) of a LoRA adapter, added to what is stored. a: [rank, cols], b: [rows, rank]."""

    a: TensorInfo
    b: TensorInfo
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class CodedInfo:
    """One tensor of the model, as `TensorInfo`, whose elements are codes in other stored tensors.

    dtype:  the type a dense copy of it would have: what the model computes with.
    parts:  slot (see `coding.parts_of`; codes first) -> stored tensor.
    nested_offset, tensor_scale: numbers of the format, read when the checkpoint is opened.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    coding: Coding
    parts: Mapping[str, TensorInfo]
    nested_offset: float = 0.0
    tensor_scale: float = 1.0
    low_rank: LowRank | None = None

    @property
    def file(self) -> Path:
        return self.parts["codes"].file

    @property
    def n(self) -> int:
        return math.prod(self.shape)

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """All that has to be read for it."""
        low = (self.low_rank.a, self.low_rank.b) if self.low_rank else ()
        return (*self.parts.values(), *low)

    @property
    def n_bytes(self) -> int:
        return sum(t.n_bytes for t in self.stored)
