"""The header of a safetensors file: where each tensor is, and whether the file is what it says.

A file is 8 bytes with the header's length (little-endian), that many bytes of JSON, then the data.
Tensors cover the data exactly: no overlap, no hole, nothing after the last. All of that is checked
before any data is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmerge.checkpoint.checksum import digest
from fastmerge.checkpoint.files import JSON_LIMIT, FileIdentity, opened, parse_json, read_at
from fastmerge.checkpoint.wording import is_clean, place, shown
from fastmerge.dtypes import BY_SAFETENSORS, DType
from fastmerge.errors import CheckpointError

#: Element types that the format has and we do not read, with the reason.
_UNSUPPORTED = {
    "F4": "elements of 4 bits",
    "F6_E2M3": "elements of 6 bits",
    "F6_E3M2": "elements of 6 bits",
    "F8_E4M3FNUZ": "a float8 variant",
    "F8_E5M2FNUZ": "a float8 variant",
    "C64": "complex numbers",
    "C128": "complex numbers",
}
_KEYS = {"dtype", "shape", "data_offsets"}
_METADATA = "__metadata__"
_MOST = 2**63 - 1  # elements or bytes: what a signed 64-bit offset holds
_LFS_POINTER = b"version "  # what a git-lfs pointer begins with, read as a length: 2.3e18


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One stored tensor, row-major. offset and n_bytes are bytes; offset is absolute in `file`."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: Path
    offset: int
    n_bytes: int

    @property
    def n(self) -> int:
        """Number of elements; 1 for a scalar."""
        return self.n_bytes // self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header. tensors are in file order; data_start is the byte where the data begins."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    identity: FileIdentity


def read_header(path: Path) -> Header:
    """Read and check the header of one safetensors file.

    Raises:
        CheckpointError: unreadable, or not what the format allows; names the file, the tensor and
        what is wrong.
    """
    where = place(path)
    with opened(path) as (fd, status):
        if status.st_size < 8:
            raise CheckpointError(f"{where} has {status.st_size} bytes, too short for a header")
        prefix = read_at(fd, path, 0, 8)
        length = int.from_bytes(prefix, "little")
        if prefix == _LFS_POINTER:
            raise CheckpointError(f"{where} is a git-lfs pointer, not weights; run `git lfs pull`")
        if length == 0:
            raise CheckpointError(f"{where} has a header of length 0")
        if length > JSON_LIMIT:
            raise CheckpointError(
                f"{where} claims a header of {length} bytes; {JSON_LIMIT} is the limit"
            )
        data_start = 8 + length
        if data_start > status.st_size:
            raise CheckpointError(
                f"{where} claims a header of {length} bytes, past the end of the file "
                f"({status.st_size} bytes)"
            )
        text = read_at(fd, path, 8, length)
    header = parse_json(text, f"{where}: header", strict=True)
    if not isinstance(header, dict):
        raise CheckpointError(f"{where}: header is not a JSON object but {shown(header)}")
    if text[:1] != b"{":
        raise CheckpointError(f"{where}: header does not begin with '{{'")
    metadata = _check_metadata(header.pop(_METADATA, {}), where)
    n_data = status.st_size - data_start
    found = [_tensor(name, entry, path, data_start, n_data) for name, entry in header.items()]
    found.sort(key=lambda t: (t.offset, t.n_bytes))  # stable: empty tensors keep the header's order
    _check_cover(found, where, data_start, status.st_size)
    return Header({t.name: t for t in found}, metadata, data_start, FileIdentity.of(path, status))


def header_digest(path: Path) -> str:
    """Return a hash of a safetensors file's header, length included: its tensors' names and places.

    Of a JSON file all is hashed, of a GGUF file the beginning, which holds its header.
    """
    with opened(path) as (fd, status):
        if path.suffix == ".json":
            return digest(read_at(fd, path, 0, min(status.st_size, JSON_LIMIT)))
        prefix = read_at(fd, path, 0, 8)
        length = min(int.from_bytes(prefix, "little"), JSON_LIMIT, status.st_size - 8)
        return digest(prefix + read_at(fd, path, 8, length))


def check_name(name: str, where: str) -> None:
    """Raise CheckpointError unless `name` can name a tensor: some text, on one line."""
    if not name:
        raise CheckpointError(f"{where}: a tensor has an empty name")
    if not is_clean(name):
        raise CheckpointError(f"{where}: tensor name {shown(name)} has control characters")
    if name == _METADATA:
        raise CheckpointError(f"{where}: {_METADATA} cannot name a tensor")


def _check_metadata(metadata: Any, where: str) -> dict[str, str]:
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{where}: {_METADATA} is not a map but {shown(metadata)}")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise CheckpointError(
                f"{where}: {_METADATA} must map text to text, got {shown(value)} for {shown(key)}"
            )
    return metadata


def _tensor(name: str, entry: Any, path: Path, data_start: int, n_data: int) -> TensorInfo:
    check_name(name, place(path))
    where = f"{place(path)}: tensor {shown(name)}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where} is not described by an object but by {shown(entry)}")
    for key in sorted(_KEYS - entry.keys()):
        raise CheckpointError(f"{where} has no {key}")
    for key in sorted(entry.keys() - _KEYS):
        raise CheckpointError(f"{where} has an unknown key {shown(key)}")
    dtype = _dtype(entry["dtype"], where)
    shape = _shape(entry["shape"], where)
    start, end = _offsets(entry["data_offsets"], where, n_data)
    n_bytes = dtype.itemsize
    for size in shape:
        n_bytes *= size
    if end - start != n_bytes:
        raise CheckpointError(
            f"{where} has {end - start} bytes, but {dtype.safetensors} of shape "
            f"{shown(list(shape))} needs {n_bytes}"
        )
    return TensorInfo(name, dtype, shape, path, data_start + start, n_bytes)


def _dtype(value: Any, where: str) -> DType:
    if not isinstance(value, str):
        raise CheckpointError(f"{where} has a dtype that is not text but {shown(value)}")
    if value in _UNSUPPORTED:
        raise CheckpointError(
            f"{where} has dtype {value} ({_UNSUPPORTED[value]}), which is not supported; "
            "convert the checkpoint to bfloat16 first"
        )
    if value not in BY_SAFETENSORS:
        raise CheckpointError(f"{where} has an unknown dtype {shown(value)}")
    return BY_SAFETENSORS[value]


def _shape(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise CheckpointError(f"{where} has a shape that is not a list but {shown(value)}")
    n_bytes = 8  # of the widest element, so that bytes cannot overflow either
    for size in value:
        if type(size) is not int:  # bool is an int to Python, and 2.0 equals 2
            raise CheckpointError(f"{where} has a shape with {shown(size)}, not a whole number")
        if size < 0:
            raise CheckpointError(f"{where} has a shape with a negative size, {shown(size)}")
        # An empty dimension does not excuse the others: kernels multiply them in any order.
        n_bytes *= max(size, 1)
        if n_bytes > _MOST:
            raise CheckpointError(f"{where} has a shape of too many elements, {shown(value)}")
    return tuple(value)


def _offsets(value: Any, where: str, n_data: int) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or any(type(v) is not int for v in value):
        raise CheckpointError(
            f"{where} has data_offsets that are not two whole numbers but {shown(value)}"
        )
    start, end = value
    if start < 0 or end < 0:
        raise CheckpointError(f"{where} has negative data_offsets, {shown(value)}")
    if end < start:
        raise CheckpointError(
            f"{where} has data_offsets that end before they start, {shown(value)}"
        )
    if end > n_data:
        raise CheckpointError(
            f"{where} has data_offsets {shown(value)} past the end of the data ({n_data} bytes); "
            "the file may be truncated"
        )
    return start, end


def _check_cover(tensors: list[TensorInfo], where: str, data_start: int, size: int) -> None:
    """Refuse overlaps, holes and trailing bytes; tensors are sorted by offset."""
    end, last = data_start, ""
    for tensor in tensors:
        if tensor.offset < end:
            raise CheckpointError(f"{where}: tensor {shown(tensor.name)} overlaps {shown(last)}")
        if tensor.offset > end:
            raise CheckpointError(
                f"{where}: hole of {tensor.offset - end} bytes before tensor {shown(tensor.name)}"
            )
        end, last = tensor.offset + tensor.n_bytes, tensor.name
    if end != size:
        raise CheckpointError(f"{where} has {size - end} trailing bytes after the last tensor")
