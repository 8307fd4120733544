"""Kernels of a device for operands that lie on the host: carried there for each call, results back."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from fastmerge.backends import Buffer, Chunk, Coded, Kernels, Sweep
from fastmerge.coding import Coding
from fastmerge.dtypes import DType
from fastmerge.stages import Statistic, Walk

#: What addresses are alike modulo, on the host and on the device: kernels take other paths off it.
ALIGNED = 64

Part = TypeVar("Part", Buffer, Coded)


def _bytes_at(buffer: Buffer) -> torch.Tensor:
    """Return the bytes of a buffer on the host as a tensor."""
    n = buffer.n * buffer.dtype.itemsize
    memory = (ctypes.c_uint8 * n).from_address(buffer.address)
    return torch.frombuffer(memory, dtype=torch.uint8)


#: What lies on the device already, by address and length on the host.
Placed = dict[tuple[int, int], Buffer]


def placed(x: Part, where: torch.device, held: Placed | None = None) -> Part:
    """Return a copy on a device, as far off a multiple of 64 bytes as the original."""
    if isinstance(x, Coded):
        slots = {slot: placed(part, where, held) for slot, part in x.slots.items()}
        return replace(x, slots=slots)
    if held is not None:
        if (x.address, x.n) not in held:
            held[x.address, x.n] = placed(x, where)
        return held[x.address, x.n]
    n = x.n * x.dtype.itemsize
    room = torch.empty(n + 2 * ALIGNED, dtype=torch.uint8, device=where)
    first = -room.data_ptr() % ALIGNED + x.address % ALIGNED
    run = room[first : first + n]
    if n:
        run.copy_(_bytes_at(x))
    return Buffer(run.data_ptr(), x.dtype, x.n, run, str(where))


def returned(x: Buffer | Coded, to: Buffer | Coded) -> None:
    """Copy what lies on a device back to the host memory that it was placed from."""
    if isinstance(x, Buffer):
        assert isinstance(to, Buffer)
        if x.n:
            _bytes_at(to).copy_(x.owner)
        return
    assert isinstance(to, Coded)
    for slot, part in x.slots.items():
        returned(part, to.slots[slot])


class Ferried(Kernels):
    """A device's kernels as if they worked on host memory."""

    def __init__(self, kernels: Kernels, where: torch.device) -> None:
        self._kernels, self._where = kernels, where
        self.name, self.chunk_elements = kernels.name, kernels.chunk_elements

    def chunk(self, chunk: Chunk) -> Chunk:
        base = chunk.base and placed(chunk.base, self._where)
        return replace(chunk, base=base, experts=[placed(e, self._where) for e in chunk.experts])

    def sweep(
        self, statistic: Statistic, n: int, cols: int, n_experts: int, compute: DType
    ) -> Sweep:
        return _FerriedSweep(self, self._kernels.sweep(statistic, n, cols, n_experts, compute))

    def walk(self, walk: Walk, chunk: Chunk, out: Buffer | Coded) -> bool:
        return self.walks([(walk, chunk, out)])[0]

    def walks(self, jobs: Sequence[tuple[Walk, Chunk, Buffer | Coded]]) -> list[bool]:
        held: Placed = {}  # parts of one result are carried there once, or they overwrite each other's
        there = [(w, self.chunk(chunk), placed(out, self._where, held)) for w, chunk, out in jobs]
        bad = self._kernels.walks(there)
        for (_, _, done), (_, _, out) in zip(there, jobs, strict=True):
            returned(done, out)
        return bad

    def peak(self, walk: Walk, chunk: Chunk, dtype: DType) -> tuple[bool, float]:
        return self._kernels.peak(walk, self.chunk(chunk), dtype)

    def refuses(self, walk: Walk) -> str | None:
        return self._kernels.refuses(walk)

    def refuses_coding(self, coding: Coding) -> str | None:
        return self._kernels.refuses_coding(coding)

    def keep_mask(self, keep: Any, chunk: Chunk) -> Any:
        return torch.as_tensor(self._kernels.keep_mask(keep, self.chunk(chunk))).cpu()

    def keep_probability(self, drop: Any, chunk: Chunk) -> Any:
        return torch.as_tensor(self._kernels.keep_probability(drop, self.chunk(chunk))).cpu()


class _FerriedSweep(Sweep):
    """Keeps what it has carried over until it ends: the device may still read it."""

    def __init__(self, ferry: Ferried, sweep: Sweep) -> None:
        self._ferry, self._sweep = ferry, sweep
        self._held: list[Chunk] = []

    def feed(self, chunk: Chunk, offset: int = 0) -> None:
        there = self._ferry.chunk(chunk)
        self._held.append(there)
        self._sweep.feed(there, offset)

    def next_pass(self) -> bool:
        return self._sweep.next_pass()

    def wanted(self) -> Sequence[tuple[int, int]] | None:
        return self._sweep.wanted()

    def result(self) -> Any:
        return self._sweep.result()
