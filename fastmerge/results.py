"""Where merged tensors go: memory that walks write to, and the places in the files that it is written to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

from fastmerge import packed
from fastmerge.backends import Buffer, Coded, Residual
from fastmerge.checkpoint import TensorInfo, word_bytes
from fastmerge.checkpoint.checksum import checksum
from fastmerge.checkpoint.durable import write_at
from fastmerge.gptq_rounding import Feedback, LastHessian
from fastmerge.jobs import Action, Piece, TensorJob
from fastmerge.streaming.device import Memory
from fastmerge.streaming.ring import Check, Place, Written


class Parts(Protocol):
    """A journal, as far as it is needed here: which parts of tensors are written."""

    def covers(self, name: str, start: int, n: int) -> bool: ...

    def add(self, parts: list[tuple[str, int, int, int]]) -> None: ...


class Output(Protocol):
    """Where results go: a descriptor per shard and, where kept, the journal of what is written."""

    @property
    def journal(self) -> Parts | None: ...

    def fd(self, shard: int) -> int: ...

    def direct_fd(self, shard: int) -> int: ...


class Writing(Protocol):
    """What writes behind the kernels: `ring.Writer`, or `download.Downloader`."""

    @property
    def memory(self) -> Memory: ...

    def reserve(self, place: Place) -> int: ...

    def write(
        self, address: int, place: Place, written: Written | None, check: Check | None = None
    ) -> None: ...


@dataclass
class Result:
    """Where a piece's walk writes, and what is written to which file from there.

    left: elements that are still to come; only results that can but be written whole wait for any.
    """

    buffer: Buffer | Coded
    writes: list[tuple[int, Place, str]]  # address, place, stored tensor
    left: int
    checks: list[Check] = field(default_factory=list)


def is_done(out: Output, piece: Piece) -> bool:
    """Return whether the journal proves that all of a piece is written."""
    # Copies of integers are made again: comparing them may have something to say.
    if out.journal is None or piece.job.action is Action.COPY_EQUAL or not piece.n:
        return False
    covers = out.journal.covers
    return all(covers(name, first, end - first) for name, first, end in piece.needed)


class Results:
    """The results of one run.

    places:    stored tensor -> its shard, and where it is there.
    residuals: is told what coding costs. n_written: bytes queued so far.
    """

    def __init__(
        self,
        out: Output,
        places: Mapping[str, tuple[int, TensorInfo]],
        writer: Writing,
        residuals: dict[str, Residual],
    ) -> None:
        self._out, self._places, self._writer = out, places, writer
        self._residuals = residuals
        self._held: dict[str, Result] = {}  # of tensors that are written whole, begun
        self._last_hessian = LastHessian()
        self.n_written = 0

    def holds(self, name: str) -> bool:
        """Return whether a tensor that is written whole is begun."""
        return name in self._held

    def take(self, piece: Piece, peak: float) -> Result:
        """Take memory for what a piece's walk writes; of a tensor that is written whole, once for all.

        peak: largest magnitude of the tensor, where that decides how it is coded.
        """
        job = piece.job
        if job.name in self._held:
            return _at(self._held[job.name], piece)
        writes = []
        for name, first, end in piece.places:
            place = self._place(name, first, end)
            writes.append((self._writer.reserve(place), place, name))
        memory = self._writer.memory
        if job.stored is None:
            buffer = memory.buffer(writes[0][0], job.out_dtype, piece.n)
            return Result(buffer, writes, piece.n)
        coded = packed.result_of(job, piece, memory, [address for address, _, _ in writes], peak)
        hessian = job.stored.hessian
        coded = replace(
            coded,
            residual=self._residuals.setdefault(job.name, Residual()),
            feedback=Feedback(hessian, self._last_hessian) if hessian else None,
        )
        result = Result(coded, writes, piece.n)
        if job.is_atomic:
            result.left = job.n
            self._held[job.name] = result
            return _at(result, piece)
        return result

    def merged(self, piece: Piece, result: Result, check: Check | None) -> None:
        """A piece's walk is under way: queue what is whole now, and all that follows from it.

        check: called before a byte of it is written; what it raises stops that.
        """
        if check:
            result.checks.append(check)
        result.left -= piece.n
        if result.left > 0:
            return
        self._held.pop(piece.job.name, None)
        if isinstance(result.buffer, Coded):
            addresses = [address for address, _, _ in result.writes]
            late = packed.late(piece.job, result.buffer, self._writer.memory, addresses)
            for name, content in late.items():
                self._write_now(name, content)
        all_checks = partial(_check_all, result.checks) if result.checks else None
        for address, place, name in result.writes:
            self._writer.write(address, place, self._written(name), all_checks)
            self.n_written += place.n

    def write_constants(self, jobs: Sequence[TensorJob]) -> None:
        """Write the stored tensors whose bytes are known before anything is merged."""
        for job in jobs:
            for constant in job.stored.constants if job.stored else ():
                if constant.content is not None:
                    self._write_now(constant.name, constant.content)

    def _write_now(self, name: str, content: bytes) -> None:
        place = self._place(name, 0, len(content))
        write_at(place.fd, content, place.offset)
        written = self._written(name)
        if written is not None:
            written(0, len(content), checksum(content, place.word))
        self.n_written += len(content)

    def _place(self, name: str, first: int, end: int) -> Place:
        """Return the place of bytes [first, end) of a stored tensor."""
        shard, info = self._places[name]
        word = word_bytes(info.shape, info.dtype.itemsize)
        fds = self._out.fd(shard), self._out.direct_fd(shard)
        return Place(*fds, info.offset + first, end - first, word, first)

    def _written(self, name: str) -> Written | None:
        journal = self._out.journal
        if journal is None:
            return None
        return lambda start, n, checksum: journal.add([(name, start, n, checksum)])


def _at(whole: Result, piece: Piece) -> Result:
    """Return a whole tensor's result, with a piece's elements to write to."""
    assert isinstance(whole.buffer, Coded)
    whole.buffer = replace(whole.buffer, start=piece.start, n=piece.n)
    return whole


def _check_all(checks: Sequence[Callable[[], None]]) -> None:
    for check in checks:
        check()
