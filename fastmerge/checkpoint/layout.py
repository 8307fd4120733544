"""The output's files before work starts: shards, headers and every tensor's final offset."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from fastmerge.checkpoint.files import JSON_LIMIT
from fastmerge.checkpoint.folder import SINGLE
from fastmerge.checkpoint.header import TensorInfo, check_name
from fastmerge.checkpoint.wording import shown
from fastmerge.dtypes import DType
from fastmerge.errors import CheckpointError, RecipeError

#: Bytes. Data begins on a page, so that direct and mapped writes of large tensors need no head of
#: their own.
ALIGNMENT = 4096

_SIZE = re.compile(
    r"(?P<number>[0-9]+(\.[0-9]+)?) ?((?P<decimal>[kmgt])b?|(?P<billions>b)|(?P<binary>[kmgt])ib)?",
    re.ASCII | re.IGNORECASE,
)
_DECIMAL = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor to be written. group: neighbours of one group go to one file; empty: it is alone."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    group: str = ""

    @property
    def n(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return self.n * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """One file: its header, size in bytes, and tensors in file order with absolute offsets."""

    file_name: str
    header: bytes
    size: int
    tensors: dict[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class Layout:
    """All files. index: content of the index file if any; total_size: bytes of the tensors."""

    shards: list[ShardLayout]
    index: bytes | None
    total_size: int

    @property
    def disk_bytes(self) -> int:
        """Bytes of all shards with their headers: what the disk must have free."""
        return sum(shard.size for shard in self.shards)

    def places(self) -> dict[str, tuple[int, TensorInfo]]:
        """Return each tensor's shard, as an index into `shards`, and its place there."""
        return {n: (i, t) for i, s in enumerate(self.shards) for n, t in s.tensors.items()}


def plan_layout(
    tensors: Sequence[OutputTensor],
    shard_size: int,
    metadata: Mapping[str, str] | None = None,
) -> Layout:
    """Lay tensors out, in the order given, in files of at most shard_size bytes of tensors each.

    A tensor that would overflow a file starts the next one; a larger tensor has a file of its own.
    metadata defaults to {"format": "pt"}, without which transformers refuses the file.

    Raises:
        CheckpointError: two tensors of one name, or a name that cannot be stored.
    """
    if shard_size <= 0:
        raise CheckpointError(f"shard size must be more than 0 bytes, got {shard_size}")
    seen: set[str] = set()
    groups: list[list[OutputTensor]] = [[]]
    filled = 0
    sizes = _group_sizes(tensors)
    for tensor in tensors:
        check_name(tensor.name, "output")
        if tensor.name in seen:
            raise CheckpointError(f"output: two tensors are named {shown(tensor.name)}")
        seen.add(tensor.name)
        follows = bool(groups[-1] and tensor.group and groups[-1][-1].group == tensor.group)
        size = sizes.get(tensor.group, tensor.n_bytes)
        if filled and size and not follows and filled + size > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.n_bytes
    notes = {"format": "pt"} if metadata is None else dict(metadata)
    names = _file_names(len(groups))
    shards = [_shard(name, group, notes) for name, group in zip(names, groups, strict=True)]
    total_size = sum(t.n_bytes for t in tensors)
    index = None if len(shards) == 1 else _index(shards, total_size, sum(t.n for t in tensors))
    return Layout(shards, index, total_size)


def _group_sizes(tensors: Sequence[OutputTensor]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for tensor in tensors:
        if tensor.group:
            sizes[tensor.group] = sizes.get(tensor.group, 0) + tensor.n_bytes
    return sizes


def parse_size(text: str) -> int:
    """Return the bytes that `text` means: 5000000000, 5B (as in mergekit), 5GB, 500MB, 1.5G, 4GiB.

    k, M, B, G and T are powers of ten, with or without B; KiB, MiB, GiB and TiB powers of two. Any
    case.

    Raises:
        RecipeError: anything else, nothing, or more than 2^63 - 1.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise RecipeError(f"size must look like 5GB, 500M, 4GiB or a number, got {shown(text)}")
    factor = 1
    if match["decimal"]:
        factor = _DECIMAL[match["decimal"].lower()]
    elif match["billions"]:
        factor = 10**9
    elif match["binary"]:
        factor = _BINARY[match["binary"].lower()]
    try:
        size = int(Fraction(match["number"]) * factor)
    except ValueError:  # more digits than Python converts
        size = 2**63
    if not 0 < size < 2**63:
        raise RecipeError(f"size must be more than 0 and less than 2^63 bytes, got {shown(text)}")
    return size


def _file_names(n_shards: int) -> list[str]:
    if n_shards == 1:
        return [SINGLE]
    return [f"model-{i:05d}-of-{n_shards:05d}.safetensors" for i in range(1, n_shards + 1)]


def _shard(file_name: str, group: list[OutputTensor], metadata: dict[str, str]) -> ShardLayout:
    group = _aligned(group)
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    starts = []
    end = 0
    for tensor in group:
        starts.append(end)
        end += tensor.n_bytes
        header[tensor.name] = {
            "dtype": tensor.dtype.safetensors,
            "shape": list(tensor.shape),
            "data_offsets": [starts[-1], end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > JSON_LIMIT:
        raise CheckpointError(
            f"{file_name} would need a header of {len(text)} bytes; {JSON_LIMIT} is the limit; "
            "lower the shard size"
        )
    data_start = 8 + len(text)
    file = Path(file_name)
    tensors = {
        t.name: TensorInfo(t.name, t.dtype, t.shape, file, data_start + start, t.n_bytes)
        for t, start in zip(group, starts, strict=True)
    }
    return ShardLayout(file_name, len(text).to_bytes(8, "little") + text, data_start + end, tensors)


def _aligned(group: list[OutputTensor]) -> list[OutputTensor]:
    """Return the group as it is if every tensor starts on a multiple of its element, else widest
    first.

    Holes are not allowed, and readers that view mapped memory refuse or copy misaligned tensors.
    Only files of mixed types can have any, after an odd number of narrow elements.
    """
    end = 0
    for tensor in group:
        if end % tensor.dtype.itemsize:
            return sorted(group, key=lambda t: -t.dtype.itemsize)
        end += tensor.n_bytes
    return group


def _index(shards: list[ShardLayout], total_size: int, n: int) -> bytes:
    index = {
        "metadata": {"total_size": total_size, "total_parameters": n},
        "weight_map": {name: shard.file_name for shard in shards for name in shard.tensors},
    }
    return (json.dumps(index, ensure_ascii=False, indent=2) + "\n").encode()
