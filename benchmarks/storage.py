"""The page cache and the disk under a benchmark: files brought in or put out, the rate of direct reads."""

from __future__ import annotations

import itertools
import mmap
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REQUEST = 4 << 20  # bytes of one read
READERS = 8  # reads in flight: a disk needs company to reach its rate


def make_resident(files: Iterable[Path]) -> None:
    """Read files into the page cache: what is not used for a while may have left it."""
    buffer = bytearray(REQUEST)
    for file in files:
        with file.open("rb", buffering=0) as f:
            while f.readinto(buffer):
                pass


def drop_pages(files: Iterable[Path]) -> None:
    """Put files out of the page cache; what is not yet on disk is written first, or it would stay."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def read_bandwidth(file: Path) -> float:
    """Return the bytes per second of reading a file past the page cache, READERS requests in flight."""
    drop_pages([file])
    memory = mmap.mmap(-1, READERS * REQUEST, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)  # a request to small pages is cut into many
    memory.write(bytes(len(memory)))  # touched before the clock starts
    fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
    size = os.fstat(fd).st_size
    offsets = itertools.count(0, REQUEST)

    def read(reader: int) -> None:
        buffer = memoryview(memory)[reader * REQUEST : (reader + 1) * REQUEST]
        while (offset := next(offsets)) < size:
            os.preadv(fd, [buffer], offset)

    try:
        with ThreadPoolExecutor(READERS) as pool:
            start = time.perf_counter()
            list(pool.map(read, range(READERS)))
            return size / (time.perf_counter() - start)
    finally:
        os.close(fd)
