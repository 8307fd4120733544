"""Buffers as torch tensors, on whatever device they lie, and back."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from fastmerge.backends import Buffer

if TYPE_CHECKING:
    from torch import Tensor


def tensor_of(buffer: Buffer) -> Tensor:
    """Return the buffer as a flat tensor that shares its memory."""
    import torch

    dtype: torch.dtype = getattr(torch, buffer.dtype.torch)
    if buffer.n == 0:
        return torch.empty(0, dtype=dtype, device=buffer.device)
    if buffer.device == "cpu":
        n_bytes = buffer.n * buffer.dtype.itemsize
        memory = (ctypes.c_uint8 * n_bytes).from_address(buffer.address)
        return torch.frombuffer(memory, dtype=dtype)
    owner: Tensor = buffer.owner
    first = (buffer.address - owner.data_ptr()) // buffer.dtype.itemsize
    return owner.view(-1)[first : first + buffer.n]


def to_host(buffer: Buffer) -> Buffer:
    """Return the buffer, or a copy in host memory of one that lies elsewhere."""
    if buffer.device == "cpu":
        return buffer
    held = tensor_of(buffer).cpu()
    return Buffer(held.data_ptr(), buffer.dtype, buffer.n, held)
