"""The journal of a merge under way: which bytes of which tensors have been written, and to what it is bound.

Text, one JSON value a line. The first line is the binding: everything that decides the output's bytes. Then
`[tensor, first byte, bytes, checksum]` per part written, `{"files": names}` before the files beside the
weights are written, and `{"commit": names, "aside": names}` when all are there and about to get their final
names, earlier ones out of the way.

Nothing in it is believed: a resumed merge reads the bytes again and compares checksums. A line that a crash
tore, or that a power cut never let reach the disk, costs its part only.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastmerge.checkpoint.checksum import MODULUS, file_checksum, word_bytes
from fastmerge.checkpoint.durable import disk_errors, write_all
from fastmerge.checkpoint.files import opened, read_at
from fastmerge.checkpoint.header import TensorInfo
from fastmerge.checkpoint.wording import is_inside, shown
from fastmerge.errors import CheckpointError

JOURNAL = "fastmerge.journal"

#: A file that is being written, and one of an earlier model while the new one takes its place.
PARTIAL = ".partial"
REPLACED = ".replaced"

#: What a merge is bound to: JSON-able; see `provenance.binding`.
Binding = Mapping[str, Any]

Part = tuple[int, int, int]  # first byte in the tensor, bytes, checksum


@dataclass
class Record:
    """A journal as found: its binding, the parts per tensor, and how far a commit had come."""

    binding: dict[str, Any]
    parts: dict[str, list[Part]]
    n_bytes: int  # of whole lines
    files: list[str] = field(default_factory=list)  # beside the weights; some may be there
    commit: list[str] = field(default_factory=list)  # some may have their final names
    aside: list[str] = field(default_factory=list)  # some may be set aside

    def names(self) -> set[str]:
        """Return the top-level names that the killed run may have left."""
        names = {*self.files, *self.commit, *self.aside}
        return {n.split("/")[0] + tail for n in names for tail in ("", PARTIAL, REPLACED)}


def read_journal(folder: Path) -> Record | None:
    """Return the journal in a folder, None where there is none or not even its first line is whole."""
    path = folder / JOURNAL
    if not path.is_file() or path.is_symlink():
        return None
    with opened(path) as (fd, status):
        data = read_at(fd, path, 0, status.st_size)
    data = data[: data.rfind(b"\n") + 1]
    lines = data.split(b"\n")
    first = _value(lines[0])
    if not isinstance(first, dict) or "fastmerge" not in first:
        return None
    record = Record(first, {}, len(data))
    for line in lines[1:]:
        value = _value(line)
        if isinstance(value, list) and len(value) == 4:
            name, start, n, text = value
            if isinstance(name, str) and type(start) is int and type(n) is int:
                with suppress(ValueError, TypeError):
                    record.parts.setdefault(name, []).append((start, n, int(text, 16)))
        elif isinstance(value, dict):
            for key in ("files", "commit", "aside"):
                if isinstance(names := value.get(key), list):
                    setattr(record, key, [n for n in names if isinstance(n, str) and is_inside(n)])
    return record


def _value(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


class Journal:
    """A journal that is being written, and what its parts prove. Threads may add while others ask."""

    def __init__(
        self, folder: Path, binding: Binding, found: Record | None, sync: bool = True
    ) -> None:
        self.path = folder / JOURNAL
        self._sync = sync
        self._parts: dict[str, dict[int, tuple[int, int]]] = {}  # tensor -> start -> (bytes, sum)
        self._found: set[str] = set()  # tensors of which a killed run had written a part
        self._lock = threading.RLock()
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        if found is None:
            self._fd = os.open(self.path, flags | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                write_all(self._fd, _line(binding))
            except BaseException:
                self.close()
                raise
        else:
            self._fd = os.open(self.path, flags)
            os.ftruncate(self._fd, found.n_bytes)

    def verify(self, name: str, parts: list[Part], info: TensorInfo, fd: int, path: Path) -> None:
        """Believe those of a tensor's parts whose bytes in the file have the journal's checksum.

        Several threads may call it, for a tensor each.
        """
        word = word_bytes(info.shape, info.dtype.itemsize)
        for start, n, known in dict.fromkeys(reversed(parts)):
            inside = min(start, n) >= 0 and start + n <= info.n_bytes
            if not inside or start % word or n % word or self.covers(name, start, n):
                continue
            with suppress(CheckpointError):  # unreadable is unproven
                if file_checksum(fd, path, info.offset + start, n, word, start) == known:
                    self._parts.setdefault(name, {})[start] = (n, known)
                    self._found.add(name)

    def add(self, parts: list[tuple[str, int, int, int]]) -> None:
        """Note parts (tensor, first byte, bytes, checksum) whose bytes are in the file."""
        lines = b"".join(_line([*p[:3], f"{p[3]:016x}"]) for p in parts)
        with self._lock:
            for name, start, n, checksum in parts:
                self._parts.setdefault(name, {})[start] = (n, checksum)
            with disk_errors(self.path, len(lines)):
                write_all(self._fd, lines)

    def add_names(self, **names: list[str]) -> None:
        """Note `files`, or `commit` and `aside`; on disk before the files move."""
        with disk_errors(self.path, 0):
            write_all(self._fd, _line(names))
            if self._sync:
                os.fsync(self._fd)

    def covers(self, name: str, start: int, n: int) -> bool:
        """Return whether bytes [start, start + n) of a tensor were proven when a killed run was resumed."""
        return is_covered(self.proven(name), start, n)

    def proven(self, name: str) -> list[Part]:
        """Return the parts of a tensor that `covers` goes by, in their order."""
        if name not in self._found:
            return []
        with self._lock:
            parts = sorted(self._parts.get(name, {}).items())
        return [(start, *part) for start, part in parts]

    def checksum(self, name: str, info: TensorInfo, fd: int, path: Path) -> int:
        """Return a tensor's checksum: its parts' sum if they tile it, else from the file."""
        parts = self._parts.get(name, {})
        at = total = 0
        while at < info.n_bytes and at in parts and parts[at][0]:
            total += parts[at][1]
            at += parts[at][0]
        if at == info.n_bytes:
            return total % MODULUS
        word = word_bytes(info.shape, info.dtype.itemsize)
        return file_checksum(fd, path, info.offset, info.n_bytes, word)

    def close(self) -> None:
        os.close(self._fd)


def is_covered(parts: Sequence[Part], start: int, n: int) -> bool:
    """Return whether bytes [start, start + n) lie in parts, which are in their order."""
    at, end = start, start + n
    for first, size, _ in parts:
        if first > at:
            break
        at = max(at, first + size)
    return at >= end


def _line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"


def difference(found: Binding, now: Binding) -> str | None:
    """Return what a journal is bound to and this merge is not, None if nothing differs."""
    if found.get("fastmerge") != now["fastmerge"]:
        return f"was begun by fastmerge {found.get('fastmerge')}, this is {now['fastmerge']}"
    if found.get("recipe") != now["recipe"]:
        return "is of another recipe"
    theirs = found.get("options", {})
    for key, value in now["options"].items():
        if theirs.get(key) != value:
            return f"was begun with {key} {shown(theirs.get(key))}, not {shown(value)}"
    old, new = found.get("inputs", []), now["inputs"]
    if len(old) != len(new):
        return f"reads {len(old)} files, not {len(new)}"
    for was, file in zip(old, new, strict=True):
        for key, what in (("size", "size"), ("mtime_ns", "time of change"), ("header", "header")):
            if was.get(key) != file[key]:
                return f"is of other inputs: the {what} of {file['path']} changed"
    return None if found.get("layout") == now["layout"] else "lays its output out otherwise"
