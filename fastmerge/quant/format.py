"""What an output format is: which tensors it holds, under which names, and what tells readers so.

One file per format (or tight family) implements `OutFormat` and, where checkpoints come in it, a reader. The
arithmetic is not here but in csrc/core/four_bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fastmerge.coding import Coding
from fastmerge.dtypes import DType


@dataclass(frozen=True)
class Part:
    """One stored tensor of a coded one; `slot` is of `coding.parts_of`, whose bytes it holds."""

    slot: str
    name: str
    dtype: DType
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Constant:
    """A stored tensor whose bytes are known before the merge, or from the tensor's scales alone.

    content: its bytes; None: they depend on the merge, `OutFormat.late` gives them.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    content: bytes | None

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Scales:
    """What is known of a coded tensor once it is coded. peak: its largest magnitude."""

    peak: float = 0.0
    tensor_scale: float = 1.0
    nested_offset: float = 0.0


@dataclass(frozen=True)
class Quantised:
    """What `OutFormat.config` needs: the coded tensors and those that were left in 16 bit.

    coded: module weight name (`model.layers.0.mlp.up_proj.weight`) -> its coding. kept: names of
    two-dimensional weights of linear modules that stay dense. config: the model's own config.json.
    dtype: of dense tensors.
    """

    coded: Mapping[str, Coding]
    kept: Sequence[str]
    config: Mapping[str, Any]
    dtype: DType


class OutFormat(Protocol):
    """A way to store a whole model."""

    @property
    def name(self) -> str:
        """As `--quantize` takes it."""
        ...

    @property
    def family(self) -> str:
        """Formats of one family can be mixed in one folder."""
        ...

    def coding(self, dtype: DType, shape: tuple[int, ...]) -> Coding:
        """Return how a weight [out, in] is coded; dtype: what values are rounded to first."""
        ...

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """Return why a weight of this shape cannot be held, or None."""
        ...

    def parts(self, name: str, shape: tuple[int, ...], coding: Coding) -> Sequence[Part]:
        """Return the stored tensors of `<module>.weight` that the merge fills, codes first."""
        ...

    def constants(self, name: str, shape: tuple[int, ...], coding: Coding) -> Sequence[Constant]:
        """Return the stored tensors beside them."""
        ...

    def late(self, name: str, shape: tuple[int, ...], coding: Coding, scales: Scales) -> bytes:
        """Return the bytes of the constant `name` that has no content, once the weight is coded."""
        ...

    def config(self, model: Quantised) -> Mapping[str, Any]:
        """Return `quantization_config`."""
        ...

    def files(self, model: Quantised) -> Mapping[str, bytes]:
        """Return small files that belong to the format, such as quantize_config.json."""
        ...
