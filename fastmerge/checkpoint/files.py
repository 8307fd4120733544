"""Reading of headers and JSON from input files: regular files only, short reads looped."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmerge.checkpoint.wording import place, reason, shown
from fastmerge.errors import CheckpointError

#: Bytes of the largest header, index or configuration that is read. The format's own limit on
#: headers.
JSON_LIMIT = 100_000_000

#: Levels of the deepest configuration. Real ones have 5; far below what exhausts the stack on
#: writing.
DEPTH_LIMIT = 64


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What tells whether a path still means the same bytes. size: bytes; mtime_ns: nanoseconds."""

    path: Path
    size: int
    mtime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, path: Path, status: os.stat_result) -> FileIdentity:
        return cls(path, status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)

    def check_unchanged(self) -> None:
        """Raise CheckpointError if the file was removed, replaced or written to since."""
        now = identity(self.path)
        if now == self:
            return
        if (now.inode, now.device) != (self.inode, self.device):
            what = "was replaced by another file"
        elif now.size != self.size:
            what = f"changed from {self.size} to {now.size} bytes"
        else:
            what = "was written to"
        raise CheckpointError(
            f"{place(self.path)} {what} while it was being read; start again when it is at rest"
        )


def identity(path: Path) -> FileIdentity:
    """Return the identity of a file as it is now. Raises CheckpointError if there is none."""
    try:
        return FileIdentity.of(path, os.stat(path))
    except OSError as error:
        raise CheckpointError(f"{place(path)} cannot be read: {reason(error)}") from None


@contextmanager
def opened(path: Path) -> Iterator[tuple[int, os.stat_result]]:
    """Open a regular file and yield descriptor and status; anything else is a CheckpointError."""
    try:
        # Looked at first: opening a device may act on it. A pipe must not block us either way.
        _check_regular(path, os.stat(path))
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointError(f"{place(path)} cannot be read: {reason(error)}") from None
    try:
        status = os.fstat(fd)
        _check_regular(path, status)
        yield fd, status
    finally:
        os.close(fd)


def _check_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{place(path)} is not a regular file")


def read_at(fd: int, path: Path, offset: int, n_bytes: int) -> bytes:
    """Return exactly n_bytes from offset. Raises CheckpointError if the file ends before."""
    parts = []
    end = offset + n_bytes
    while offset < end:
        try:
            part = os.pread(fd, end - offset, offset)
        except OSError as error:
            raise CheckpointError(f"{place(path)} cannot be read: {reason(error)}") from None
        if not part:
            raise CheckpointError(f"{place(path)} ends at byte {offset}, before byte {end}")
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


def read_json_object(path: Path, *, strict: bool) -> dict[str, Any]:
    """Return the object that a JSON file of at most 100 MB holds.

    strict refuses repeated keys and NaN. Configurations are read without it: some hold Infinity,
    and whatever else transformers accepts.
    """
    with opened(path) as (fd, status):
        if status.st_size > JSON_LIMIT:
            raise CheckpointError(
                f"{place(path)} has {status.st_size} bytes; {JSON_LIMIT} is the limit"
            )
        data = read_at(fd, path, 0, status.st_size)
    value = parse_json(data, place(path), strict=strict)
    if not isinstance(value, dict):
        raise CheckpointError(f"{place(path)} is not a JSON object but {shown(value)}")
    if _is_deep(value):
        raise CheckpointError(f"{place(path)} is nested too deeply")
    return value


class _RefusedError(ValueError):
    """Legal for Python's parser, but not in these files."""


def parse_json(data: bytes, where: str, *, strict: bool) -> Any:
    """Return the value of UTF-8 JSON text. Every CheckpointError begins with `where`."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where} is not UTF-8 text (byte {error.start})") from None
    try:
        if not strict:
            return json.loads(text)
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
        if "\\ud" in text.lower():  # half of a surrogate pair has no UTF-8 to write it again
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except _RefusedError as error:
        raise CheckpointError(f"{where} {error}") from None
    except (RecursionError, MemoryError):
        raise CheckpointError(f"{where} is nested too deeply") from None
    except UnicodeEncodeError:
        raise CheckpointError(f"{where} holds a lone surrogate, which is not text") from None
    except ValueError as error:
        raise CheckpointError(f"{where} is not valid JSON ({error})") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RefusedError(f"names {shown(key)} twice")
            seen.add(key)
    return out


def _refuse_constant(text: str) -> None:
    raise _RefusedError(f"holds {text}, which is not JSON")


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEPTH_LIMIT):
        children: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                children += item.values()
            elif isinstance(item, list):
                children += item
        level = children
        if not level:
            return False
    return True
