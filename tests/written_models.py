"""Small tensors and models as bytes, for the tests of fastmerge.checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fastmerge.checkpoint import (
    Layout,
    OutputFolder,
    OutputTensor,
)
from fastmerge.dtypes import DType

TENSORS = [
    OutputTensor("model.embed.weight", DType.F32, (5, 3)),
    OutputTensor("model.norm.weight", DType.F32, (3,)),
    OutputTensor("model.empty", DType.F32, (0, 7)),
    OutputTensor("model.scale", DType.F32, ()),
    OutputTensor("lm_head.weight", DType.F32, (5, 3)),
]


def values(tensor: OutputTensor, start: float = 0.0) -> bytes:
    t = torch.arange(tensor.n, dtype=torch.float32) + start
    return t.numpy().tobytes()


def fill(out: OutputFolder, start: float = 0.0) -> None:
    """Write every tensor at its place, last first: order must not matter."""
    for index, shard in enumerate(out.layout.shards):
        for name, info in reversed(shard.tensors.items()):
            tensor = OutputTensor(name, info.dtype, info.shape)
            os.pwrite(out.fd(index), values(tensor, start), info.offset)


def write_model(path: Path, layout: Layout, start: float = 0.0, **options: object) -> None:
    with OutputFolder(path, layout, **options) as out:  # type: ignore[arg-type]
        fill(out, start)
        out.commit({"config.json": b"{}"})


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }
