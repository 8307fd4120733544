"""The input files of a merge, opened as their bytes come: mapped, past the page cache, or through it."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from fastmerge import _cpu
from fastmerge.checkpoint import open_direct
from fastmerge.errors import CheckpointError, ReadError, RecipeError

#: Of a file's sampled pages, the share that must be in the page cache for the file to count as warm.
WARM = 0.75
_SAMPLES = 64
_PAGE = 4096


class Io(str, Enum):
    """How tensor bytes move.

    mmap:     inputs are mapped, pages brought in ahead of the kernels; no copy. Best when they are cached.
    direct:   inputs are read past the page cache. Best when they are not.
    buffered: inputs and output go through the page cache, and what was not in it before is dropped again.
    gds:      inputs are read straight into the GPU's memory, by kvikio, where GPUDirect Storage works.
    auto:     mmap if all inputs are in the page cache, else direct for those that are not. For a device:
              through the page cache what is in it, direct what is not; gds where it works and nothing is.
    In all but buffered the output is written past the page cache, where the file system can.
    """

    AUTO = "auto"
    MMAP = "mmap"
    DIRECT = "direct"
    BUFFERED = "buffered"
    GDS = "gds"


@dataclass
class Source:
    """One open input file. direct_fd is -1 where the page cache is not to be, or cannot be, bypassed."""

    path: Path
    fd: int
    size: int
    direct_fd: int = -1
    mapping: _cpu.Mapping | None = None
    drop_behind: bool = False  # its pages were not in the page cache, and should not stay there


def is_warm(path: Path) -> bool:
    """Return whether (nearly) all of a file is in the page cache, by reading sampled bytes that may not wait.

    At random places: a sampled page that was not there is there afterwards, and must not fool the next
    sample.
    """
    flag = getattr(os, "RWF_NOWAIT", None)  # Linux alone
    if flag is None:
        return False
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
        pages = -(-os.fstat(fd).st_size // _PAGE)
        places = [random.randrange(pages) for _ in range(min(_SAMPLES, pages))]
        found = 0
        for page in places:
            try:
                found += os.preadv(fd, [bytearray(1)], page * _PAGE, flag) == 1
            except BlockingIOError:
                pass
            except OSError:  # a file system that cannot say
                return False
        return found >= WARM * len(places)
    finally:
        os.close(fd)


class Sources:
    """All input files, each opened when first asked for, once for the whole merge.

    may_map: whether tensors may be merged where they lie; else auto reads cached files through the cache.
    """

    def __init__(self, files: Iterable[Path], io: Io = Io.AUTO, *, may_map: bool = True) -> None:
        self.io = io
        self._auto = io is Io.AUTO
        if io is Io.GDS and may_map:
            raise RecipeError(
                "io gds reads into a GPU's memory; give --device cuda, or choose auto"
            )
        if io is Io.MMAP and not may_map:
            raise RecipeError(
                "io mmap merges in the files' own memory, which a device does not read; "
                "choose auto, direct or buffered"
            )
        if io is Io.AUTO:
            files = tuple(files)
            warm = may_map and all(map(_is_warm_or_gone, files))
            self.io = Io.MMAP if warm else Io.DIRECT
        self.files = tuple(files)
        self._open: dict[Path, Source] = {}
        self._lost = _cpu.lost_pages()

    @property
    def mapped(self) -> bool:
        """Whether tensors are merged where they lie in the page cache, in memory of their files."""
        return self.io is Io.MMAP

    def source(self, path: Path) -> Source:
        if path not in self._open:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as e:
                raise CheckpointError(f"{path}: cannot be opened: {e.strerror}") from e
            source = self._open[path] = Source(path, fd, os.fstat(fd).st_size)
            self._prepare(source)
        return self._open[path]

    def _prepare(self, source: Source) -> None:
        cold = not is_warm(source.path)
        source.drop_behind = cold and hasattr(os, "posix_fadvise")
        if self.io is Io.MMAP:
            with suppress(RuntimeError):  # cannot be mapped: read it instead
                source.mapping = _cpu.Mapping(source.fd, source.size)
        elif self.io is Io.DIRECT and (cold or not self._auto):
            source.direct_fd = open_direct(source.path, os.O_RDONLY)
            if source.direct_fd >= 0:  # the rest are scattered pages
                os.posix_fadvise(source.fd, 0, 0, os.POSIX_FADV_RANDOM)

    def release(self, source: Source, offset: int, n: int, address: int) -> None:
        """Tell the kernel that bytes [offset, offset + n), merged at `address`, are done with."""
        if source.mapping is not None:
            source.mapping.release(address, n)
        if source.drop_behind and source.direct_fd < 0:
            os.posix_fadvise(source.fd, offset, n, os.POSIX_FADV_DONTNEED)

    def check(self) -> None:
        """Raise if a mapped page was gone when a kernel touched it: zeros were merged instead."""
        if _cpu.lost_pages() == self._lost:
            return
        for source in self._open.values():
            self.check_size(source)
        raise ReadError("an input file could not be read while it was being merged")

    def check_size(self, source: Source) -> None:
        size = os.fstat(source.fd).st_size
        if size < source.size:
            raise truncated(source, size)

    def close(self) -> None:
        for source in self._open.values():
            source.mapping = None
            for fd in (source.fd, source.direct_fd):
                if fd >= 0:
                    os.close(fd)
        self._open.clear()


def _is_warm_or_gone(path: Path) -> bool:
    try:
        return is_warm(path)
    except OSError:  # whoever opens it will say so
        return True


def truncated(source: Source, end: int) -> CheckpointError:
    """Return the error that says where a file ends that should go on."""
    return CheckpointError(
        f"{source.path}: ends at byte {end}, before its tensors do; it was truncated while being read"
    )
