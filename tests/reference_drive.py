"""How the tests of the reference backend feed it tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fastmerge.backends import Buffer, Chunk
from fastmerge.backends.reference import ReferenceKernels
from fastmerge.dtypes import BY_TORCH, DType
from fastmerge.stages import (
    Walk,
)

KERNELS = ReferenceKernels()
END = 2**63 - 1
M32 = 0xFFFFFFFF


def buffer(x: torch.Tensor) -> Buffer:
    return Buffer(x.data_ptr(), BY_TORCH[str(x.dtype).removeprefix("torch.")], x.numel(), x)


def chunk(
    base: torch.Tensor | None,
    experts: Sequence[torch.Tensor],
    cols: int,
    compute: DType = DType.F32,
    start: int = 0,
    stop: int | None = None,
) -> Chunk:
    """Elements [start, stop) of whole tensors."""
    stop = experts[0].numel() if stop is None else stop
    part = [buffer(x).slice(start, stop) for x in experts]
    return Chunk(
        None if base is None else buffer(base).slice(start, stop),
        part,
        start,
        stop - start,
        cols,
        compute,
    )


def sweep(statistic: Any, chunks: Sequence[Chunk], n: int, offsets: Sequence[int] = ()) -> Any:
    first = chunks[0]
    s = KERNELS.sweep(statistic, n, first.cols, len(first.experts), first.compute)
    for c, offset in zip(chunks, offsets or [0] * len(chunks), strict=True):
        s.feed(c, offset)
    assert not s.next_pass()
    return s.result()


def walk(w: Walk, c: Chunk, out: torch.dtype) -> tuple[torch.Tensor, bool]:
    result = torch.empty(c.n, dtype=out)
    bad = KERNELS.walk(w, c, buffer(result))
    return result, bad


def bits_of(x: torch.Tensor) -> torch.Tensor:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def awkward(rng: np.random.Generator, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Few distinct magnitudes of both signs: ties, both zeros, subnormals."""
    pool = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1e-42, -1e-42, 3e-45, 2.0, -2.0, 1.5]
    return torch.tensor(rng.choice(pool, n)).to(dtype)


def sort_key(x: float) -> tuple[bool, float]:
    return (True, 0.0) if math.isnan(x) else (False, abs(x))
