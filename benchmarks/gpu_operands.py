"""Operands on a device and their results back: drawn, placed, walked over, compared bit by bit."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_device import Host

from fastmerge import ops
from fastmerge.backends import Chunk, Kernels
from fastmerge.evaluate import Operands, run_walk
from fastmerge.stages import Walk

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import agreement as agreement
import cases as cases
import coded_merges as coded_merges
import device_merges as device_merges


@dataclass(eq=False)
class Mismatch(Exception):
    """The first element that is wrong, and both values."""

    index: int
    got: Any
    want: Any
    n_wrong: int
    n: int

    def __str__(self) -> str:
        return (
            f"first wrong index {self.index}: {self.got!r}, should be {self.want!r}; "
            f"{self.n_wrong} of {self.n} differ"
        )


# ---- comparing -------------------------------------------------------------------------------------


def compare(got: Any, want: Any) -> None:
    """Raise Mismatch unless both hold the same bits; tensors may lie on a device.

    NaN may have any sign and payload: that it is one is what is defined.
    """
    for a, b in zip(_flat(got), _flat(want), strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise Mismatch(0, (a.dtype, tuple(a.shape)), (b.dtype, tuple(b.shape)), 1, 1)
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        differ = a.view(bits) != b.view(bits)
        if differ.any() and a.is_floating_point():
            differ &= ~(a.isnan() & b.isnan())
        if differ.any():
            wrong = differ.nonzero()
            i = int(wrong[0])
            raise Mismatch(i, a[i].item(), b[i].item(), len(wrong), len(a))


def _flat(result: Any) -> list[torch.Tensor]:
    """Take a result apart into flat tensors on the host."""
    if isinstance(result, torch.Tensor):
        return [result.detach().cpu().contiguous().reshape(-1)]
    if isinstance(result, list | tuple):
        return [t for part in result for t in _flat(part)]
    if hasattr(result, "__dataclass_fields__"):
        return [t for name in result.__dataclass_fields__ for t in _flat(getattr(result, name))]
    return [torch.from_numpy(np.ascontiguousarray(result).reshape(-1).copy())]


# ---- operands on the device ------------------------------------------------------------------------


def place(x: torch.Tensor, where: torch.device, shift: int = 0) -> torch.Tensor:
    """Return `x` on a device, `shift` elements off a 64-byte boundary."""
    size = x.element_size()
    room = torch.empty(x.numel() + 64 + shift, dtype=x.dtype, device=where)
    first = (-room.data_ptr() // size) % (64 // size) + shift
    held = room[first : first + x.numel()].view(x.shape)
    held.copy_(x)
    return held


def place_all(held: cases.Operands, where: torch.device, shift: int = 0) -> cases.Operands:
    base = None if held.base is None else place(held.base, where, shift)
    return cases.Operands(base, [place(e, where, shift) for e in held.experts])


def whole(held: cases.Operands) -> Operands:
    chunk = chunk_of(held)
    return Operands(chunk.base, chunk.experts, chunk.cols, chunk.compute)


def chunk_of(held: cases.Operands) -> Chunk:
    return ops._chunk(held.base, held.experts)


def walked(
    kernels: Kernels, held: cases.Operands, walk: Walk, dtype: torch.dtype, limit: int
) -> Any:
    """Return (output, whether something was not finite) of a walk over operands where they lie."""
    like = held.experts[0]
    out = place(torch.zeros(like.shape, dtype=dtype), like.device)
    bad = run_walk(kernels, walk, whole(held), ops.buffer_of(out, "out"), limit)
    return out, np.array([bad])


def family(
    device: Host, n: int, k: int, seed: int, dtype: torch.dtype = torch.bfloat16
) -> cases.Operands:
    """Return a base and k experts of n elements on the device, as fine-tuned models are.

    Changes are heavy-tailed (Student's t, three degrees of freedom), a fifth of them exactly zero.
    """
    generator = device.generator(seed)

    def normal() -> torch.Tensor:
        return torch.randn(n, generator=generator, device=device.where)

    base = normal() * 0.03
    experts = []
    for _ in range(k):
        spread = normal().square_()
        for _ in range(2):
            spread += normal().square_()
        change = normal() / (spread / 3).sqrt_() * 0.0005
        change[torch.rand(n, generator=generator, device=device.where) < 0.2] = 0
        experts.append((base + change).to(dtype))
    return cases.Operands(base.to(dtype), experts)


def to_host(held: cases.Operands) -> cases.Operands:
    base = None if held.base is None else held.base.cpu()
    return cases.Operands(base, [e.cpu() for e in held.experts])
