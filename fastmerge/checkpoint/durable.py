"""Disk space and durability: reserve before work, sync before renaming, one error when full."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastmerge.checkpoint.wording import place, reason
from fastmerge.errors import CheckpointError

_FULL = {errno.ENOSPC: "", errno.EDQUOT: " (disk quota reached)"}

#: What says that a file system cannot reserve, as opposed to having no space.
_CANNOT_RESERVE = {errno.EBADF, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}

_COPY_BYTES = 1 << 20


def is_full(error: OSError) -> bool:
    """Return whether an error means that the disk or the quota is exhausted."""
    return error.errno in _FULL


def no_space(folder: Path, needed: int, code: int = errno.ENOSPC) -> CheckpointError:
    """Return the error that says how many bytes the output needs and how many the disk has."""
    free = free_bytes(folder)
    have = "" if free is None else f", only {free} free"
    return CheckpointError(
        f"{place(folder)} needs {needed} bytes{have}{_FULL.get(code, '')}; "
        "free some space or choose another folder"
    )


def free_bytes(folder: Path) -> int | None:
    """Return the bytes a user can still write, None where the file system does not tell."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize if status.f_blocks else None


@contextmanager
def disk_errors(path: Path, needed: int) -> Iterator[None]:
    """Turn an OSError of writing `path` into a CheckpointError; needed: the output's bytes."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise no_space(path.parent, needed, error.errno or 0) from error
        raise CheckpointError(f"{place(path)} cannot be written: {reason(error)}") from error


def create(path: Path) -> int:
    """Return the read-write descriptor of a new file; what is in the way is an OSError."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags, 0o666)


def reopen(path: Path) -> int:
    """Return the read-write descriptor of a file that may be there already; never through a link."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def open_direct(path: Path, flags: int) -> int:
    """Return a descriptor that bypasses the page cache, -1 where there is no such thing."""
    bypass = getattr(os, "O_DIRECT", None)
    if bypass is None:
        return -1
    try:
        return os.open(path, flags | bypass | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # a file system without
        return -1


def reserve(fd: int, path: Path, size: int) -> None:
    """Give an open file `size` bytes on disk where that is cheap, else only that length.

    Raises:
        OSError: no space.
    """
    fallocate = getattr(os, "posix_fallocate", None)  # absent on macOS
    if fallocate is not None:
        # glibc replaces what a file system lacks by a write to every block, which for a network
        # disk takes as long as the merge; in append mode it cannot do so and says EBADF instead.
        appending = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            fallocate(appending, 0, size)
            return
        except OSError as error:
            if error.errno not in _CANNOT_RESERVE:
                raise
        finally:
            os.close(appending)
    os.ftruncate(fd, size)


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data` at the descriptor's position."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def write_at(fd: int, data: bytes, offset: int) -> None:
    """Write all of `data` at a place of a file."""
    view = memoryview(data)
    while view:
        n = os.pwrite(fd, view, offset)
        view, offset = view[n:], offset + n


def write_file(path: Path, content: bytes | Path, needed: int, sync: bool = True) -> None:
    """Create `path` with these bytes, or those of another file, and (sync) wait for the disk."""
    with disk_errors(path, needed):
        fd = create(path)
        try:
            if isinstance(content, bytes):
                write_all(fd, content)
            else:
                _copy(fd, content)
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)


def _copy(fd: int, source: Path) -> None:
    try:
        opened = source.open("rb")
    except OSError as error:
        raise CheckpointError(f"{place(source)} cannot be read: {reason(error)}") from error
    with opened as file:
        while data := file.read(_COPY_BYTES):
            write_all(fd, data)


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the folder's names; until then a power cut may undo a rename."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems have no such thing for folders
            raise
    finally:
        os.close(fd)
