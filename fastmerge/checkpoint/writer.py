"""The crash-safe writer of a model folder.

Everything is written under temporary names and synced; only then do files get their final names,
the one that makes the folder a model last. Until then an earlier model in the folder is untouched,
and afterwards its weights are gone.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from fastmerge.checkpoint.checksum import file_checksum, word_bytes
from fastmerge.checkpoint.destination import (
    check_destination,
    check_space,
    leftovers,
    nearest_folder,
    weight_names,
)
from fastmerge.checkpoint.durable import (
    create,
    disk_errors,
    is_full,
    no_space,
    open_direct,
    reopen,
    reserve,
    sync_folder,
    write_all,
    write_file,
)
from fastmerge.checkpoint.files import opened
from fastmerge.checkpoint.folder import INDEX
from fastmerge.checkpoint.header import TensorInfo
from fastmerge.checkpoint.journal import (
    JOURNAL,
    PARTIAL,
    Binding,
    Journal,
    Record,
    difference,
    read_journal,
)
from fastmerge.checkpoint.layout import Layout
from fastmerge.checkpoint.swap import aside, put_back, undo_swap
from fastmerge.checkpoint.wording import is_inside, place, shown
from fastmerge.errors import CheckpointError, DeviceError, ReadError, WorkerError

#: Errors of a machine, not of what was asked for: another try may do, so what is written stays.
KEPT = (ReadError, DeviceError, WorkerError)

#: Reads in flight while what a killed merge wrote is checked.
CHECKING_THREADS = 4


class OutputFolder:
    """One model folder being written: `with OutputFolder(...) as out: ... out.commit(...)`.

    Entering creates the folder and the shards, at full size, with their headers. Leaving without a
    commit, or with an exception, removes what was created and puts back what was replaced. With a
    journal an interrupt, or an input that cannot be read for now, leaves what a kill would leave.

    Args:
        path:   the folder; created with its parents where they are missing.
        layout: what the shards hold.
        force:  replace a model that is there already; other files stay unless replaced by name.
        inputs: folders of the models that are read: none may be harmed.
        binding: keep a journal, bound to this; see `journal.difference`.
        resume: go on with the merge that a journal in the folder tells of. Without one, start anew.
        direct: offer descriptors that bypass the page cache, where the file system can.
        sync: wait for the disk before files get their final names; without, a power cut may leave
            a folder that looks whole and is not.
    """

    def __init__(
        self,
        path: Path | str,
        layout: Layout,
        *,
        force: bool = False,
        inputs: Sequence[Path] = (),
        binding: Binding | None = None,
        resume: bool = False,
        direct: bool = False,
        sync: bool = True,
    ) -> None:
        self.path = Path(path)
        self.layout = layout
        self.force = force
        self.inputs = tuple(Path(i) for i in inputs)
        self.binding = binding
        self.resume = resume
        self.direct = direct
        self.sync = sync
        self.resumed = False
        self.journal: Journal | None = None
        self._lock = -1
        self._fds: list[int] = []
        self._direct_fds: list[int] = []
        self._created_folders: list[Path] = []  # parents first
        self._partials: list[Path] = []
        self._renamed: list[Path] = []
        self._set_aside: list[Path] = []
        self._done = False

    def check(self) -> None:
        """Raise what entering would raise, without touching anything."""
        self._check_place()
        check_space(self.path, self.layout.disk_bytes)

    def __enter__(self) -> OutputFolder:
        self._check_place()
        try:
            self._create_folders(self.path)
            self._take_lock()
            # Once more under the lock: another merge may have finished since.
            found = self._check_place()
            if found is not None:
                undo_swap(self.path, found)
            self.resumed = found is not None and self.resume and self.binding is not None
            self._clear_leftovers(found)
            check_space(self.path, self.layout.disk_bytes)
            if self.binding is not None:
                with disk_errors(self.path, self.layout.disk_bytes):
                    self._partials.append(self.path / JOURNAL)  # as below
                    binding = {**self.binding, "force": self.force}
                    earlier = found if self.resumed else None
                    self.journal = Journal(self.path, binding, earlier, self.sync)
            for index in range(len(self.layout.shards)):
                self._create_shard(index)
            if found is not None and self.resumed:
                self._verify(found)
        except BaseException as error:
            if self.resumed:
                self._close()
            else:
                self._leave(error)
            raise
        return self

    def _check_place(self) -> Record | None:
        """Check the destination; return the journal of a killed merge that is there."""
        found = read_journal(self.path) if self.path.is_dir() else None
        known: set[str] = set()
        if found is not None and self.binding is not None and self.resume:
            changed = difference(found.binding, self.binding)
            if changed is not None:
                raise CheckpointError(
                    f"the killed merge in {place(self.path)} {changed}; mend that, or start again "
                    "with --force and without --resume"
                )
            self.force = self.force or found.binding.get("force") is True
            known = found.names()
        elif found is not None and not self.force:
            raise CheckpointError(
                f"output {place(self.path)} holds a killed merge; finish it with --resume, or "
                "start again with --force"
            )
        check_destination(self.path, self.inputs, force=self.force, known=known)
        return found

    def _clear_leftovers(self, found: Record | None) -> None:
        kept = {s.file_name + PARTIAL for s in self.layout.shards} | {JOURNAL}
        small = [self._partial(n) for n in (found.files if found else [])]
        for path in (*leftovers(self.path), *small):
            if not (self.resumed and path.name in kept):
                with disk_errors(path, self.layout.disk_bytes):
                    path.unlink(missing_ok=True)

    def _verify(self, found: Record) -> None:
        assert self.journal is not None
        from concurrent.futures import ThreadPoolExecutor  # for resumed merges alone

        journal = self.journal

        def verify(item: tuple[str, tuple[int, TensorInfo]]) -> None:
            name, (shard, info) = item
            path = self.partial_path(shard)
            journal.verify(name, found.parts.get(name, []), info, self._fds[shard], path)

        with ThreadPoolExecutor(
            CHECKING_THREADS
        ) as pool:  # reading and hashing let go of the interpreter
            list(pool.map(verify, self.layout.places().items()))

    def checksums(self) -> dict[str, int]:
        """Return every tensor's checksum, once all are written; needs the journal."""
        assert self.journal is not None
        return {
            name: self.journal.checksum(name, info, self._fds[shard], self.partial_path(shard))
            for name, (shard, info) in self.layout.places().items()
        }

    def holds(self, name: str, start: int, n: int, checksum: int) -> bool:
        """Return whether a part of a tensor that another machine wrote is in its shard as seen from here."""
        shard, info = self.layout.places()[name]
        path = self.partial_path(shard)
        word = word_bytes(info.shape, info.dtype.itemsize)
        # Opened anew: that is when a network file system asks for what others wrote.
        with opened(path) as (fd, _):
            return file_checksum(fd, path, info.offset + start, n, word, start) == checksum

    def fd(self, shard: int) -> int:
        """Return a shard's descriptor, for positional writes at the layout's offsets."""
        return self._fds[shard]

    def direct_fd(self, shard: int) -> int:
        """Return a descriptor of the same shard that bypasses the page cache, or -1."""
        return self._direct_fds[shard]

    def partial_path(self, shard: int) -> Path:
        """Return the temporary path of a shard."""
        return self._partial(self.layout.shards[shard].file_name)

    def commit(
        self,
        small_files: Mapping[str, bytes] | None = None,
        copies: Mapping[str, Path] | None = None,
    ) -> None:
        """Make the folder a model. After this returns a power cut loses nothing.

        small_files: file name -> content. copies: file name -> file to copy; a small file of that
        name wins. Names may have one folder in front (`1_Pooling/config.json`).

        Raises:
            CheckpointError: a file cannot be written, or a sync failed. Nothing is tried twice:
                after a failed sync the kernel may have dropped what it could not write.
        """
        if self._done or not self._fds:
            raise RuntimeError("commit works once, inside the with block")
        files: dict[str, bytes | Path] = {**(copies or {}), **(small_files or {})}
        shards = [s.file_name for s in self.layout.shards]
        for name in files:
            self._check_file_name(name, {*shards, INDEX})
        self._finish_shards()
        if self.journal is not None:
            self.journal.add_names(files=list(files))
        for name, content in files.items():
            self._write_partial(name, content)
        if self.layout.index is not None:
            self._write_partial(INDEX, self.layout.index)
        with disk_errors(self.path / shards[0], self.layout.disk_bytes):
            self._swap(list(files), shards)
        self._done = True
        for old in self._set_aside:
            with suppress(
                OSError
            ):  # the new model is whole; what is left of the old one has another name
                os.unlink(aside(old))
        if self.journal is not None:
            with suppress(OSError):
                self.journal.path.unlink()
                self._sync_folder(self.path)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        full = None
        if isinstance(error, OSError) and is_full(error):
            # Measured before the clean-up frees it.
            full = no_space(self.path, self.layout.disk_bytes, error.errno or 0)
        if self._done:
            self._close()
        else:
            self._leave(error)
        if full is not None:
            raise full from error
        if isinstance(error, KEPT) and self.journal is not None:
            raise type(error)(f"{error}; what is merged is kept, --resume goes on") from error

    def _partial(self, name: str) -> Path:
        return self.path / (name + PARTIAL)

    def _create_folders(self, path: Path) -> None:
        existing = nearest_folder(path)
        missing = [p for p in (path, *path.parents) if p != existing and existing in p.parents]
        for folder in reversed(missing):
            with disk_errors(folder, self.layout.disk_bytes):
                folder.mkdir(exist_ok=True)
            self._created_folders.append(folder)

    def _take_lock(self) -> None:
        with disk_errors(self.path, self.layout.disk_bytes):
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                raise CheckpointError(
                    f"output {place(self.path)} is being written by another merge; wait for it, or "
                    "choose another folder"
                ) from None
            # Other errors: a file system without locks. The check for emptiness has to do.

    def _create_shard(self, index: int) -> None:
        shard = self.layout.shards[index]
        path = self._partial(shard.file_name)
        with disk_errors(path, self.layout.disk_bytes):
            self._partials.append(path)  # before it exists: an interrupt may come between
            fd = reopen(path) if self.resumed else create(path)
            self._fds.append(fd)
            if os.fstat(fd).st_size > shard.size:
                os.ftruncate(fd, shard.size)
            reserve(fd, path, shard.size)
            write_all(fd, shard.header)
            self._direct_fds.append(open_direct(path, os.O_RDWR) if self.direct else -1)

    def _finish_shards(self) -> None:
        for shard, fd in zip(self.layout.shards, self._fds, strict=True):
            path = self._partial(shard.file_name)
            with disk_errors(path, self.layout.disk_bytes):
                size = os.fstat(fd).st_size
                if size != shard.size:
                    raise CheckpointError(
                        f"{place(path)} has {size} bytes instead of {shard.size}; "
                        "something else wrote to it"
                    )
                if self.sync:
                    os.fsync(fd)

    def _check_file_name(self, name: str, taken: set[str]) -> None:
        if not is_inside(name):
            raise CheckpointError(f"output file {shown(name)} must be a name in the output folder")
        if name in taken:
            raise CheckpointError(f"output file {shown(name)} is named as one of the weight files")

    def _write_partial(self, name: str, content: bytes | Path) -> None:
        path = self._partial(name)
        if not path.parent.exists():
            self._create_folders(path.parent)
        with disk_errors(path, self.layout.disk_bytes):
            path.unlink(missing_ok=True)  # a killed run's
        self._partials.append(path)
        write_file(path, content, self.layout.disk_bytes, self.sync)

    def _swap(self, small: Sequence[str], shards: Sequence[str]) -> None:
        """Give every file its final name, the earlier model's files out of the way first.

        The earlier index and weights go before the first new shard comes: equal names of old and
        new shards must never stand side by side under one index, where a crash would leave a mix
        that loads without complaint.
        """
        finals = [*small, *shards] + ([INDEX] if self.layout.index is not None else [])
        old = weight_names(self.path)
        old += [n for n in finals if os.path.lexists(self.path / n) and n not in old]
        if self.journal is not None:
            self.journal.add_names(commit=finals, aside=old)
        for name in old:
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                raise CheckpointError(f"{place(path)} is a folder; remove it")
            self._set_aside.append(path)
            os.rename(path, aside(path))
        if old:
            self._sync_folder(self.path)
        for name in finals:
            if (
                name == finals[-1]
            ):  # makes the folder a model: all other names must be on disk before
                self._sync_folders()
            self._renamed.append(self.path / name)
            os.rename(self._partial(name), self.path / name)
        self._sync_folders()

    def _sync_folders(self) -> None:
        folders = {self.path, *(p.parent for p in self._renamed)}
        folders |= {p.parent for p in self._created_folders}
        for folder in sorted(folders):
            self._sync_folder(folder)

    def _sync_folder(self, folder: Path) -> None:
        if self.sync:
            sync_folder(folder)

    def _close(self) -> None:
        for fd in (*self._fds, *(fd for fd in self._direct_fds if fd >= 0)):
            with suppress(OSError):  # synced already, or being thrown away
                os.close(fd)
        self._fds.clear()
        self._direct_fds.clear()
        if self.journal is not None:
            self.journal.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _leave(self, error: BaseException | None) -> None:
        """Leave without a commit. What can be gone on with stays, else nothing does."""
        put_back(self._renamed, self._set_aside)
        if self.journal is not None and isinstance(error, (KeyboardInterrupt, *KEPT)):
            self._close()
            return
        # Errors pass silently: another is on its way.
        for path in self._partials:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        self._close()
        for folder in reversed(self._created_folders):
            with suppress(OSError):  # not empty: someone else put something there
                folder.rmdir()
        self._created_folders.clear()
