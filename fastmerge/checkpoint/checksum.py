"""Checksums: of tensor bytes, for journal and manifest, and of texts, for what they are bound to.

A tensor's checksum is a sum over its words (csrc/io/checksum.hpp), so that of a tensor is the sum of those
of its parts, in whatever order they were written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from fastmerge import _cpu
from fastmerge.checkpoint.files import read_at

_BLOCK_BYTES = 8 << 20

MODULUS = 1 << 64


def digest(data: bytes) -> str:
    """Return a 128-bit hash of a text, in hexadecimal."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def word_bytes(shape: Sequence[int], itemsize: int) -> int:
    """Return the bytes of a word of a tensor's checksum: what divides a row, 8 at most.

    Tensors are cut at rows, or at multiples of 4096 elements, which must not cut a word.
    """
    row = max(1, shape[-1] if shape else 1) * itemsize
    return min(8, row & -row)


def checksum(data: bytes, word: int) -> int:
    """Return the checksum of a whole tensor's bytes."""
    return _cpu.checksum(data, word, 0)


def file_checksum(fd: int, path: Path, offset: int, n_bytes: int, word: int, start: int = 0) -> int:
    """Return the checksum of a part of a file, which begins `start` bytes into its tensor.

    Raises:
        CheckpointError: the file cannot be read, or ends before.
    """
    total = 0
    for at in range(0, n_bytes, _BLOCK_BYTES):
        block = read_at(fd, path, offset + at, min(_BLOCK_BYTES, n_bytes - at))
        total += _cpu.checksum(block, word, start + at)
    return total % MODULUS
