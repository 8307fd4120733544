"""Tensors of models, one at a time: read from their files as torch tensors, and back to bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fastmerge.checkpoint import Checkpoint, OutputTensor, TensorInfo, plan_layout, word_bytes
from fastmerge.checkpoint.checksum import checksum
from fastmerge.checkpoint.durable import create, disk_errors, write_all, write_at
from fastmerge.checkpoint.files import opened
from fastmerge.checkpoint.wording import place, reason, shown
from fastmerge.dtypes import BY_TORCH, DType
from fastmerge.errors import CheckpointError, DeviceError, NonFiniteError
from fastmerge.quant.opening import open_model

if TYPE_CHECKING:
    from torch import Tensor

#: Called with (tensor name, bytes done, bytes in all).
Progress = Callable[[str, int, int], None]


def open_dense(path: Path | str) -> Checkpoint:
    """Read a model's headers.

    Raises:
        CheckpointError: as `open_model`; or a weight is stored in few bits.
    """
    model = open_model(path)
    for name, info in model.tensors.items():
        if not isinstance(info, TensorInfo):
            raise CheckpointError(
                f"{place(model.path)} stores {shown(name)} in few bits; write it as dense weights with "
                "`fastmerge dequantize` first"
            )
    return model


def info_of(model: Checkpoint, name: str) -> TensorInfo:
    """Return where a dense model's tensor is stored."""
    info = model.tensors[name]
    assert isinstance(info, TensorInfo)
    return info


def read_tensor(info: TensorInfo) -> Tensor:
    """Return a stored tensor in its own type.

    Raises:
        CheckpointError: the file cannot be read, or ends before.
    """
    import torch

    dtype = getattr(torch, info.dtype.torch)
    if not info.n_bytes:
        return torch.empty(info.shape, dtype=dtype)
    held = bytearray(info.n_bytes)
    view, at = memoryview(held), info.offset
    with opened(info.file) as (fd, _):
        while view:
            try:
                n = os.preadv(fd, [view], at)
            except OSError as error:
                raise CheckpointError(
                    f"{place(info.file)} cannot be read: {reason(error)}"
                ) from None
            if not n:
                raise CheckpointError(
                    f"{place(info.file)} ends at byte {at}, within {shown(info.name)}"
                )
            view, at = view[n:], at + n
    return torch.frombuffer(held, dtype=dtype).reshape(info.shape)


def bytes_of(tensor: Tensor) -> bytes:
    """Return a tensor's elements as they are stored."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def checksum_of(tensor: Tensor) -> int:
    """Return the checksum of a tensor's bytes."""
    return checksum(bytes_of(tensor), word_bytes(tuple(tensor.shape), tensor.element_size()))


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in the type that changes are computed in: float32, or float64 for float64."""
    return tensor if tensor.element_size() == 8 else tensor.float()


def change(base: Tensor, expert: Tensor, name: str, model: object) -> Tensor:
    """Return expert - base, computed in float32 or float64.

    Raises:
        NonFiniteError: it holds NaN or infinity.
    """
    import torch

    delta = wide(expert) - wide(base)
    finite = torch.isfinite(delta)
    if not bool(finite.all()):
        index = int(finite.reshape(-1).logical_not().nonzero()[0])
        raise NonFiniteError(
            f"the change of {shown(name)} in {model} holds NaN or infinity at flat index {index}; mend the "
            "model, or its base, first"
        )
    return delta


def narrowed(values: Tensor, dtype: DType) -> Tensor:
    """Return values in a stored type."""
    import torch

    return values.to(getattr(torch, dtype.torch))


def dtype_of(tensor: Tensor) -> DType:
    """Return a tensor's element type."""
    return BY_TORCH[str(tensor.dtype).removeprefix("torch.")]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Create a safetensors file, wait until it is on the disk, and return its bytes.

    Raises:
        CheckpointError: the disk cannot take it.
    """
    outputs = [OutputTensor(n, dtype_of(t), tuple(t.shape)) for n, t in tensors.items()]
    shard = plan_layout(outputs, 2**62, metadata).shards[0]
    with disk_errors(path, shard.size):
        fd = create(path)
        try:
            write_all(fd, shard.header)
            for name, info in shard.tensors.items():
                write_at(fd, bytes_of(tensors[name]), info.offset)
            os.fsync(fd)
        finally:
            os.close(fd)
    return shard.size


def check_device(device: str) -> None:
    """Raise DeviceError unless torch can compute there."""
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise DeviceError(f"device {device!r} cannot be used: {reason}") from None
