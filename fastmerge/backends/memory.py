"""Buffers as torch tensors or plain bytes, on whatever device they lie."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmerge.backends import Buffer
from fastmerge.dtypes import BY_TORCH, DType

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
    held = owner.view(-1).view(torch.uint8)
    first = buffer.address - owner.data_ptr()
    run: Tensor = held[first : first + buffer.n * buffer.dtype.itemsize]
    return run.view(dtype)


def buffer_of(tensor: Tensor) -> Buffer:
    """Return a contiguous tensor's memory; the buffer keeps it."""
    held = tensor.detach().contiguous().reshape(-1)
    dtype = BY_TORCH[str(held.dtype).removeprefix("torch.")]
    return Buffer(held.data_ptr(), dtype, held.numel(), held, str(held.device))


def empty(n: int, dtype: DType, device: str) -> Buffer:
    """Take memory for n elements on a device."""
    if device == "cpu":
        array = np.empty(n * dtype.itemsize, np.uint8)
        return Buffer(array.ctypes.data, dtype, n, array)
    import torch

    held = torch.empty(n, dtype=getattr(torch, dtype.torch), device=device)
    return Buffer(held.data_ptr(), dtype, n, held, device)


def to_host(buffer: Buffer) -> Buffer:
    """Return the buffer, or a copy in host memory of one that lies elsewhere."""
    if buffer.device == "cpu":
        return buffer
    held = tensor_of(buffer).cpu()
    return Buffer(held.data_ptr(), buffer.dtype, buffer.n, held)


def bytes_of(buffer: Buffer) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """View a buffer in host memory as uint8 without copying."""
    n_bytes = buffer.n * buffer.dtype.itemsize
    memory = (ctypes.c_uint8 * n_bytes).from_address(buffer.address)
    return np.ctypeslib.as_array(memory) if n_bytes else np.empty(0, np.uint8)


def same_bytes(a: Buffer, b: Buffer) -> bool:
    """Return whether two buffers on one device hold the same bytes."""
    if a.device == "cpu":
        return bool((bytes_of(a) == bytes_of(b)).all())
    import torch

    return torch.equal(tensor_of(a).view(torch.uint8), tensor_of(b).view(torch.uint8))


def copy_bytes(target: Buffer, source: Buffer) -> None:
    """Copy a buffer of the same type and length, from the same device or from the host."""
    if source.device == target.device == "cpu":
        ctypes.memmove(target.address, source.address, source.n * source.dtype.itemsize)
    elif source.n:
        tensor_of(target).copy_(tensor_of(source))
