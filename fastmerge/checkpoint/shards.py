"""Shards that another process created, opened to be written to: what a worker has of an output folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from fastmerge.checkpoint.durable import disk_errors, open_direct
from fastmerge.checkpoint.files import read_at
from fastmerge.checkpoint.journal import PARTIAL, Part, is_covered
from fastmerge.checkpoint.layout import Layout
from fastmerge.checkpoint.wording import place
from fastmerge.errors import CheckpointError


class RemoteJournal:
    """A journal that someone else keeps: it tells what was proven there, and hands on what is written here.

    Args:
        proven: parts of each tensor, in their order.
        note: called with parts (tensor, first byte, bytes, checksum) whose bytes are in the file.
    """

    def __init__(
        self,
        proven: Mapping[str, Sequence[Part]],
        note: Callable[[list[tuple[str, int, int, int]]], None],
    ) -> None:
        self._proven = proven
        self.add = note

    def covers(self, name: str, start: int, n: int) -> bool:
        """Return whether bytes [start, start + n) of a tensor are written and proven."""
        return is_covered(self._proven.get(name, ()), start, n)


class PartialShards:
    """Some shards of an `OutputFolder` that another process holds; nothing is created, named or removed.

    Args:
        path, layout, direct: as of the folder.
        shards: indices of those that are written to.
        flush: wait until what was written is where other machines find it, before leaving.
    """

    def __init__(
        self,
        path: Path,
        layout: Layout,
        shards: Collection[int],
        journal: RemoteJournal,
        *,
        direct: bool = False,
        flush: bool = False,
    ) -> None:
        self.path, self.layout, self.journal = path, layout, journal
        self._shards, self._direct, self._flush = sorted(shards), direct, flush
        self._fds: dict[int, int] = {}
        self._direct_fds: dict[int, int] = {}

    def __enter__(self) -> PartialShards:
        try:
            for index in self._shards:
                self._open(index)
        except BaseException:
            self._close()
            raise
        return self

    def _open(self, index: int) -> None:
        shard = self.layout.shards[index]
        path = self.path / (shard.file_name + PARTIAL)
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            raise CheckpointError(f"{place(path)} is not there") from None
        except OSError as error:
            raise CheckpointError(f"{place(path)} cannot be written: {error.strerror}") from None
        self._fds[index] = fd
        header = b""
        if os.fstat(fd).st_size == shard.size:
            header = read_at(fd, path, 0, len(shard.header))
        if header != shard.header:
            raise CheckpointError(f"{place(path)} is a shard of another merge")
        self._direct_fds[index] = open_direct(path, os.O_RDWR) if self._direct else -1

    def fd(self, shard: int) -> int:
        """Return a shard's descriptor, for positional writes at the layout's offsets."""
        return self._fds[shard]

    def direct_fd(self, shard: int) -> int:
        """Return a descriptor of the same shard that bypasses the page cache, or -1."""
        return self._direct_fds[shard]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self._flush and error is None:
                for index, fd in self._fds.items():
                    path = self.path / (self.layout.shards[index].file_name + PARTIAL)
                    with disk_errors(path, self.layout.disk_bytes):
                        os.fsync(fd)
        finally:
            self._close()

    def _close(self) -> None:
        for fd in (*self._fds.values(), *self._direct_fds.values()):
            if fd >= 0:
                os.close(fd)
        self._fds.clear()
        self._direct_fds.clear()
