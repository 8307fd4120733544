"""A GGUF file's metadata and the places of its tensors: read and checked before any data is, or laid out.

A file is `GGUF`, a version, how many tensors and values there are, the values, an entry per tensor, and
from the next multiple of the alignment on the data. All numbers are little-endian; an entry's dimensions
begin with the fastest. What the bytes of a tensor mean is not known here, only how many there are.
"""

from __future__ import annotations

import enum
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastmerge.checkpoint.files import JSON_LIMIT, FileIdentity, opened, read_at
from fastmerge.checkpoint.header import check_name
from fastmerge.checkpoint.wording import is_clean, place, shown
from fastmerge.errors import CheckpointError

MAGIC = b"GGUF"
ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"

#: Bytes before the data, as for safetensors. The largest vocabularies take about 20 MB.
HEADER_LIMIT = JSON_LIMIT
#: Elements of all arrays together, for each is an object here. The largest vocabularies have 1.5 million.
ELEMENT_LIMIT = 4_000_000
#: Bytes of the longest key, and of the longest tensor's name that llama.cpp loads.
KEY_LIMIT, NAME_LIMIT = 65535, 63
DIMENSIONS = 4

_WINDOW = 2**20  # bytes read at a time
_MOST = 2**63 - 1
_PREFIX = 24  # bytes of magic, version and the two counts
_LEAST_VALUE, _LEAST_TENSOR = (
    14,
    25,
)  # bytes of the smallest key with a value, and of the smallest entry
_LFS_POINTER = b"vers"
_OLDER = (b"ggjt", b"ggmf", b"ggml", b"tjgg", b"fmgg", b"lmgg")


class ValueType(enum.IntEnum):
    """The type of a value of the metadata, by its number in the file."""

    U8 = 0
    I8 = 1
    U16 = 2
    I16 = 3
    U32 = 4
    I32 = 5
    F32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    U64 = 10
    I64 = 11
    F64 = 12


#: struct's letter for each type of one size.
_CODES: dict[ValueType, str] = dict(
    zip(
        (t for t in ValueType if t not in (ValueType.STRING, ValueType.ARRAY)),
        "BbHhIifBQqd",
        strict=True,
    )
)


class BlockType(NamedTuple):
    """A type of tensor. Rows are runs of blocks of so many elements and bytes."""

    name: str
    elements: int
    n_bytes: int


#: By number in the file, all that are in use: sizes must be checked before a type can be refused by name.
BLOCK_TYPES = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    9: BlockType("Q8_1", 32, 40),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    15: BlockType("Q8_K", 256, 292),
    16: BlockType("IQ2_XXS", 256, 66),
    17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98),
    19: BlockType("IQ1_S", 256, 50),
    20: BlockType("IQ4_NL", 32, 18),
    21: BlockType("IQ3_S", 256, 110),
    22: BlockType("IQ2_S", 256, 82),
    23: BlockType("IQ4_XS", 256, 136),
    24: BlockType("I8", 1, 1),
    25: BlockType("I16", 1, 2),
    26: BlockType("I32", 1, 4),
    27: BlockType("I64", 1, 8),
    28: BlockType("F64", 1, 8),
    29: BlockType("IQ1_M", 256, 56),
    30: BlockType("BF16", 1, 2),
    34: BlockType("TQ1_0", 256, 54),
    35: BlockType("TQ2_0", 256, 66),
    39: BlockType("MXFP4", 32, 17),
    40: BlockType("NVFP4", 64, 36),
    41: BlockType("Q1_0", 128, 18),
}


@dataclass(frozen=True, slots=True)
class GgufValue:
    """One value of the metadata. of: the type of an array's elements, None where it is not an array."""

    type: ValueType
    value: Any
    of: ValueType | None = None


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One stored tensor, row-major; type: a key of BLOCK_TYPES; offset is absolute."""

    name: str
    type: int
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A checked header. metadata is in the file's order, tensors in that of their data."""

    metadata: dict[str, GgufValue]
    tensors: dict[str, GgufTensor]
    alignment: int
    identity: FileIdentity

    @property
    def path(self) -> Path:
        return self.identity.path

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value without its type."""
        found = self.metadata.get(key)
        return default if found is None else found.value


def read_gguf(path: Path | str) -> GgufFile:
    """Read and check the header of one GGUF file of version 2 or 3.

    Raises:
        CheckpointError: unreadable, or not what the format allows; names the file, the value or tensor
            and what is wrong.
    """
    path = Path(path)
    where = place(path)
    with opened(path) as (fd, status):
        cursor = _Cursor(fd, path, status.st_size)
        n_tensors, n_values = _counts(cursor)
        metadata = _metadata(cursor, n_values)
        alignment = _alignment(metadata, where)
        entries = [_entry(cursor, i, n_tensors) for i in range(n_tensors)]
    data_start = padded(cursor.at, alignment)
    found: dict[str, GgufTensor] = {}
    for name, kind, shape, offset in entries:
        if name in found:
            raise CheckpointError(f"{where} names tensor {shown(name)} twice")
        found[name] = _placed(
            name, kind, shape, offset, where, alignment, data_start, status.st_size
        )
    ordered = sorted(found.values(), key=lambda t: (t.offset, t.n_bytes))
    _check_overlaps(ordered, where)
    identity = FileIdentity.of(path, status)
    return GgufFile(metadata, {t.name: t for t in ordered}, alignment, identity)


def padded(n: int, alignment: int) -> int:
    """Return the next multiple of alignment from n on."""
    return -(-n // alignment) * alignment


def byte_count(kind: int, shape: tuple[int, ...], where: str) -> int:
    """Return the bytes of a tensor. Raises CheckpointError if its rows are not whole blocks, or too many."""
    block = BLOCK_TYPES[kind]
    if math.prod(max(size, 1) for size in shape) > _MOST // 8:
        raise CheckpointError(f"{where} has a shape of too many elements, {shown(list(shape))}")
    row = shape[-1] if shape else 1
    if row % block.elements:
        raise CheckpointError(
            f"{where} has rows of {row} elements, but {block.name} takes a multiple of {block.elements}"
        )
    return math.prod(shape) // block.elements * block.n_bytes


class _Cursor:
    """Reads a file forwards in large pieces; whatever a file claims, no byte past its end is asked for."""

    def __init__(self, fd: int, path: Path, size: int) -> None:
        self.fd, self.path, self.size = fd, path, size
        self.where = place(path)
        self.at = 0
        self.elements = 0
        self._window, self._window_at = b"", 0

    @property
    def left(self) -> int:
        return min(self.size, HEADER_LIMIT) - self.at

    def take(self, n: int, what: str) -> bytes:
        if n > self.left:
            if n <= self.size - self.at:
                raise CheckpointError(
                    f"{self.where} has a header of more than {HEADER_LIMIT} bytes in {what}"
                )
            raise CheckpointError(f"{self.where} ends within {what}; the file may be truncated")
        start = self.at - self._window_at
        if start + n > len(self._window):
            self._window = read_at(self.fd, self.path, self.at, min(max(n, _WINDOW), self.left))
            self._window_at, start = self.at, 0
        self.at += n
        return self._window[start : start + n]

    def number(self, code: str, what: str) -> Any:
        (value,) = struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))
        return value

    def text(self, what: str) -> str:
        data = self.take(self.number("Q", what), what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self.where}: {what} is not UTF-8 text (byte {error.start})"
            ) from None


def _counts(cursor: _Cursor) -> tuple[int, int]:
    """Check what a file begins with; return its numbers of tensors and of values."""
    where = cursor.where
    if cursor.size < _PREFIX:
        raise CheckpointError(f"{where} has {cursor.size} bytes, too short for a GGUF file")
    magic = cursor.take(4, "its first bytes")
    if magic == _LFS_POINTER:
        raise CheckpointError(f"{where} is a git-lfs pointer, not weights; run `git lfs pull`")
    if magic in _OLDER:
        raise CheckpointError(
            f"{where} is of a format older than GGUF; convert the original model again"
        )
    if magic != MAGIC:
        raise CheckpointError(f"{where} is not a GGUF file: it begins with {shown(magic)}")
    version = cursor.number("I", "its version")
    if version & 0xFFFF == 0 and version:
        raise CheckpointError(
            f"{where} is big-endian; convert it with gguf-convert-endian of the package gguf"
        )
    if version == 1:
        raise CheckpointError(
            f"{where} is GGUF version 1, which nothing reads any more; convert the model again"
        )
    if version not in (2, 3):
        raise CheckpointError(f"{where} is GGUF version {version}; 2 and 3 are known")
    n_tensors, n_values = cursor.number("Q", "its counts"), cursor.number("Q", "its counts")
    for n, what, least in (
        (n_values, "values", _LEAST_VALUE),
        (n_tensors, "tensors", _LEAST_TENSOR),
    ):
        if n > (cursor.size - cursor.at) // least:
            raise CheckpointError(
                f"{where} claims {n} {what}, more than its {cursor.size} bytes can hold"
            )
    return n_tensors, n_values


def _metadata(cursor: _Cursor, n_values: int) -> dict[str, GgufValue]:
    metadata: dict[str, GgufValue] = {}
    for i in range(n_values):
        what = f"key {i + 1} of {n_values}"
        length = cursor.number("Q", what)
        if length > KEY_LIMIT:
            raise CheckpointError(
                f"{cursor.where}: {what} claims {length} bytes; {KEY_LIMIT} is the limit"
            )
        data = cursor.take(length, what)
        key = data.decode(errors="replace")
        if not key or not is_clean(key) or key.encode() != data:
            raise CheckpointError(f"{cursor.where}: {what} is {shown(data)}, not a name")
        if key in metadata:
            raise CheckpointError(f"{cursor.where} has key {shown(key)} twice")
        metadata[key] = _value(cursor, f"key {shown(key)}")
    return metadata


def _value(cursor: _Cursor, what: str) -> GgufValue:
    kind = _value_type(cursor, what)
    if kind is not ValueType.ARRAY:
        return GgufValue(kind, _scalar(cursor, kind, what))
    of = _value_type(cursor, what)
    n = cursor.number("Q", what)
    if of is ValueType.ARRAY:
        raise CheckpointError(
            f"{cursor.where}: {what} is an array of arrays, which is not supported"
        )
    width = 8 if of is ValueType.STRING else struct.calcsize("<" + _CODES[of])
    if n > cursor.left // width:
        raise CheckpointError(
            f"{cursor.where}: {what} claims {n} elements, more than the file can hold"
        )
    cursor.elements += n
    if cursor.elements > ELEMENT_LIMIT:
        raise CheckpointError(
            f"{cursor.where}: {what} makes it {cursor.elements} elements of arrays; "
            f"{ELEMENT_LIMIT} is the limit"
        )
    values: list[Any]
    if of is ValueType.STRING:
        values = [cursor.text(what) for _ in range(n)]
    else:
        values = list(struct.unpack(f"<{n}{_CODES[of]}", cursor.take(n * width, what)))
        if of is ValueType.BOOL:
            values = [_truth(v, cursor, what) for v in values]
    return GgufValue(kind, values, of)


def _value_type(cursor: _Cursor, what: str) -> ValueType:
    number = cursor.number("I", what)
    if number > max(ValueType):
        raise CheckpointError(f"{cursor.where}: {what} has a value of unknown type {number}")
    return ValueType(number)


def _scalar(cursor: _Cursor, kind: ValueType, what: str) -> Any:
    if kind is ValueType.STRING:
        return cursor.text(what)
    value = cursor.number(_CODES[kind], what)
    return _truth(value, cursor, what) if kind is ValueType.BOOL else value


def _truth(value: int, cursor: _Cursor, what: str) -> bool:
    if value > 1:
        raise CheckpointError(f"{cursor.where}: {what} is {value}, neither true nor false")
    return value == 1


def _alignment(metadata: dict[str, GgufValue], where: str) -> int:
    found = metadata.get(ALIGNMENT_KEY, GgufValue(ValueType.U32, ALIGNMENT))
    value = found.value
    if found.type is not ValueType.U32 or value < 1 or value & (value - 1):
        raise CheckpointError(f"{where}: {ALIGNMENT_KEY} is {shown(value)}, not a power of two")
    return int(value)


def _entry(cursor: _Cursor, i: int, n: int) -> tuple[str, int, tuple[int, ...], int]:
    """Return one tensor's name, type, row-major shape and offset from the start of the data."""
    what = f"tensor {i + 1} of {n}"
    length = cursor.number("Q", what)
    if length > KEY_LIMIT:
        raise CheckpointError(
            f"{cursor.where}: {what} claims a name of {length} bytes; {KEY_LIMIT} is the limit"
        )
    try:
        name = cursor.take(length, what).decode()
    except UnicodeDecodeError:
        raise CheckpointError(f"{cursor.where}: the name of {what} is not UTF-8 text") from None
    check_name(name, cursor.where)
    what = f"tensor {shown(name)}"
    n_dims = cursor.number("I", what)
    if n_dims > DIMENSIONS:
        raise CheckpointError(
            f"{cursor.where}: {what} has {n_dims} dimensions; {DIMENSIONS} is the limit"
        )
    dims = struct.unpack(f"<{n_dims}Q", cursor.take(8 * n_dims, what))
    kind = cursor.number("I", what)
    if kind not in BLOCK_TYPES:
        raise CheckpointError(
            f"{cursor.where}: {what} has unknown type {kind}; the file may be newer"
        )
    return name, kind, tuple(reversed(dims)), cursor.number("Q", what)


def _placed(
    name: str,
    kind: int,
    shape: tuple[int, ...],
    offset: int,
    where: str,
    alignment: int,
    data_start: int,
    size: int,
) -> GgufTensor:
    what = f"{where}: tensor {shown(name)}"
    n_bytes = byte_count(kind, shape, what)
    if offset % alignment:
        raise CheckpointError(f"{what} has offset {offset}, which is not a multiple of {alignment}")
    if data_start + offset + n_bytes > size:
        raise CheckpointError(
            f"{what} ends at byte {data_start + offset + n_bytes}, past the end of the file ({size} bytes); "
            "the file may be truncated"
        )
    return GgufTensor(name, kind, shape, data_start + offset, n_bytes)


def _check_overlaps(tensors: Sequence[GgufTensor], where: str) -> None:
    """Refuse overlaps; tensors are sorted by offset. Holes are padding."""
    end, last = 0, ""
    for tensor in tensors:
        if tensor.offset < end:
            raise CheckpointError(f"{where}: tensor {shown(tensor.name)} overlaps {shown(last)}")
        end, last = tensor.offset + tensor.n_bytes, tensor.name


def lay_out_gguf(
    metadata: Mapping[str, GgufValue],
    tensors: Sequence[tuple[str, int, tuple[int, ...]]],
    file_name: str,
) -> tuple[bytes, list[GgufTensor], int]:
    """Lay out a file of version 3: tensors (name, type, row-major shape) one after another, each aligned.

    Returns the bytes up to the data, every tensor's place, and the size of the file.

    Raises:
        CheckpointError: a name that is taken or that llama.cpp would refuse, rows that are not whole
            blocks, or a value that does not fit its type; names the file and what is wrong.
    """
    alignment = _alignment(dict(metadata), file_name)
    parts = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    parts += [
        _text(key) + _encoded(value, f"{file_name}: key {shown(key)}")
        for key, value in metadata.items()
    ]
    end, seen, starts = 0, set(), []
    for name, kind, shape in tensors:
        what = f"{file_name}: tensor {shown(name)}"
        check_name(name, file_name)
        if name in seen:
            raise CheckpointError(f"{file_name}: two tensors are named {shown(name)}")
        seen.add(name)
        if len(name.encode()) > NAME_LIMIT or len(shape) > DIMENSIONS:
            raise CheckpointError(
                f"{what} is too much for llama.cpp: {NAME_LIMIT} bytes of name and {DIMENSIONS} dimensions "
                "are its limits"
            )
        n_bytes = byte_count(kind, shape, what)
        parts.append(_text(name) + struct.pack("<I", len(shape)))
        parts.append(struct.pack(f"<{len(shape)}QIQ", *reversed(shape), kind, end))
        starts.append((end, n_bytes))
        end = padded(end + n_bytes, alignment)
    header = b"".join(parts)
    header += bytes(padded(len(header), alignment) - len(header))
    places = [
        GgufTensor(name, kind, shape, len(header) + start, n_bytes)
        for (name, kind, shape), (start, n_bytes) in zip(tensors, starts, strict=True)
    ]
    return header, places, len(header) + end


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _encoded(value: GgufValue, what: str) -> bytes:
    """Return a value as it stands in the file, its type before it."""
    try:
        if value.type is ValueType.STRING:
            return struct.pack("<I", value.type) + _text(value.value)
        if value.of is None:
            return struct.pack("<I" + _CODES[value.type], value.type, value.value)
        head = struct.pack("<IIQ", value.type, value.of, len(value.value))
        if value.of is ValueType.STRING:
            return head + b"".join(map(_text, value.value))
        return head + struct.pack(f"<{len(value.value)}{_CODES[value.of]}", *value.value)
    except (struct.error, OverflowError, UnicodeEncodeError):
        kind = value.type.name if value.of is None else f"array of {value.of.name}"
        raise CheckpointError(f"{what} is {shown(value.value)}, which no {kind} holds") from None
