"""GGUF files for tests: any bytes, right or wrong, by struct alone, and files by the package gguf."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

STRING, ARRAY, U32, F32 = 8, 9, 4, 6
TYPE_Q4_0, TYPE_F32 = 2, 0


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def key(name: str | bytes, kind: int, content: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + content


def array(of: int, n: int, content: bytes) -> bytes:
    return struct.pack("<IQ", of, n) + content


def entry(
    name: str | bytes, dims: Sequence[int], kind: int, offset: int, n_dims: int | None = None
) -> bytes:
    """dims: fastest first, as in the file."""
    head = text(name) + struct.pack("<I", len(dims) if n_dims is None else n_dims)
    return head + struct.pack(f"<{len(dims)}QIQ", *dims, kind, offset)


@dataclass
class Raw:
    """A file, part by part; `build` puts it together whatever its parts say."""

    values: list[bytes] = field(default_factory=list)
    entries: list[bytes] = field(default_factory=list)
    data: bytes = b""
    magic: bytes = b"GGUF"
    version: int = 3
    n_values: int | None = None
    n_tensors: int | None = None
    alignment: int = 32

    def build(self) -> bytes:
        n_tensors = len(self.entries) if self.n_tensors is None else self.n_tensors
        n_values = len(self.values) if self.n_values is None else self.n_values
        out = self.magic + struct.pack("<IQQ", self.version, n_tensors, n_values)
        out += b"".join(self.values) + b"".join(self.entries)
        return out + bytes(-len(out) % self.alignment) + self.data


def good() -> Raw:
    """A file of two tensors: `a` of float32 [2, 3] and `b` of one block of Q4_0, and a value of each kind."""
    return Raw(
        values=[
            key("general.architecture", STRING, text("toy")),
            key("toy.block_count", U32, struct.pack("<I", 1)),
            key("toy.scale", F32, struct.pack("<f", 0.5)),
            key("toy.names", ARRAY, array(STRING, 2, text("x") + text("yz"))),
            key("toy.numbers", ARRAY, array(U32, 3, struct.pack("<3I", 1, 2, 3))),
            key("toy.flag", 7, b"\1"),
        ],
        entries=[entry("a", [3, 2], TYPE_F32, 0), entry("b", [32], TYPE_Q4_0, 32)],
        data=bytes(range(24)) + bytes(8) + bytes(18) + bytes(14),
    )


def write_by_package(
    path: Path,
    architecture: str,
    values: dict[str, tuple[str, Any]],
    tensors: dict[str, np.ndarray | tuple[np.ndarray, int]],
    alignment: int | None = None,
) -> None:
    """Write a file with gguf.GGUFWriter. values: key -> (its method's name after `add_`, value).

    tensors: name -> elements, or bytes of blocks [rows, bytes] with the number of their type.
    """
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for name, (kind, value) in values.items():
        getattr(writer, f"add_{kind}")(name, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            data, kind = tensor
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType(kind))
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_values(**more: Any) -> dict[str, tuple[str, Any]]:
    return {
        "llama.block_count": ("uint32", 1),
        "llama.context_length": ("uint32", 64),
        "llama.embedding_length": ("uint32", 32),
        "llama.feed_forward_length": ("uint32", 64),
        "llama.attention.head_count": ("uint32", 4),
        "llama.attention.head_count_kv": ("uint32", 2),
        "llama.attention.layer_norm_rms_epsilon": ("float32", 1e-6),
        **more,
    }


def llama_tensors(**more: Any) -> dict[str, Any]:
    """One layer's q of Q8_0 and k of float32, embeddings and a norm."""
    rng = np.random.default_rng(0)
    return {
        "token_embd.weight": rng.standard_normal((50, 32)).astype(np.float16),
        "output_norm.weight": np.ones(32, np.float32),
        "blk.0.attn_q.weight": (rng.integers(0, 256, (32, 34), np.uint8), 8),
        "blk.0.attn_k.weight": rng.standard_normal((16, 32)).astype(np.float32),
        **{name.replace("__", "."): value for name, value in more.items()},
    }


def make(path: Path, values: Any = None, tensors: Any = None, architecture: str = "llama") -> Path:
    write_by_package(path, architecture, values or llama_values(), tensors or llama_tensors())
    return path
