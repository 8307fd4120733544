"""A folder that appears whole or not at all: made beside its place under a hidden name, then renamed."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from fastmerge.checkpoint.destination import nearest_folder
from fastmerge.checkpoint.durable import disk_errors, sync_folder
from fastmerge.checkpoint.journal import PARTIAL
from fastmerge.checkpoint.wording import place, shown
from fastmerge.errors import CheckpointError


class NewFolder:
    """`with NewFolder(...) as new:` write into `new.hidden`, then `new.commit()`.

    Leaving without a commit removes what was written; an earlier folder stays as it was until then. What a
    killed run left under the hidden name is removed by the next one to the same place, which also gives an
    earlier folder its name again where the run was killed before it gave it to the new one.

    Args:
        path: the folder; its parents are created.
        what: what it will be, as in "a pack".
        mark: the file that says that a folder is one.
        files: names of all files that one may hold: a folder with others is never replaced.
        overwrite: replace one that is there.
        inputs: folders that are read: none may be the output, or in it.
    Raises:
        CheckpointError: on entering, where the place is taken or is an input.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        what: str,
        mark: str,
        files: re.Pattern[str],
        overwrite: bool,
        inputs: Sequence[Path],
    ) -> None:
        self.path = Path(path)
        self.what = what
        self.mark = mark
        self.files = files
        self.overwrite = overwrite
        self.inputs = inputs
        whole = Path(os.path.abspath(self.path))
        self.hidden = whole.with_name(f".{whole.name}{PARTIAL}")
        self._aside = whole.with_name(f"{self.hidden.name}.old")
        self._lock = -1

    def __enter__(self) -> NewFolder:
        self._check_place()
        try:
            with disk_errors(self.path, 0):
                self._make()
        except BaseException:
            self._unlock()
            raise
        return self

    def _make(self) -> None:
        self.hidden.parent.mkdir(parents=True, exist_ok=True)
        self.hidden.mkdir(exist_ok=True)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        self._lock = os.open(self.hidden, flags)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.fstat(self._lock), os.stat(self.hidden))
        except (BlockingIOError, FileNotFoundError):
            ours = False
        except OSError:  # a file system without locks
            ours = True
        if not ours:  # or it was, and has got its own name since
            raise CheckpointError(
                f"output {place(self.path)} is being written by another run; wait for it, or choose "
                "another folder"
            )
        for left in self.hidden.iterdir():  # a killed run's
            left.unlink()
        if os.path.lexists(self._aside):
            self._settle()

    def _settle(self) -> None:
        """Undo, or end, a killed run's swap of an earlier folder for a new one."""
        if os.path.lexists(self.path):
            shutil.rmtree(self._aside)
            return
        os.rename(self._aside, self.path)
        try:
            self._check_place()
        except CheckpointError:
            shutil.rmtree(self.hidden, ignore_errors=True)
            raise

    def _check_place(self) -> None:
        where = place(self.path)
        if "\0" in str(self.path):
            raise CheckpointError(f"{shown(str(self.path))} cannot be a path")
        real = os.path.realpath(self.path)
        for folder in self.inputs:
            if os.path.join(os.path.realpath(folder), "").startswith(os.path.join(real, "")):
                raise CheckpointError(
                    f"output {where} is or holds the input {place(folder)}; choose another folder"
                )
        if not os.path.lexists(self.path):
            existing = nearest_folder(self.path)
            if not existing.is_dir():
                raise CheckpointError(
                    f"output {where} cannot be created: {place(existing)} is a file"
                )
            return
        if not self.path.is_dir() or self.path.is_symlink():
            raise CheckpointError(f"output {where} is no folder; choose another name")
        names = sorted(os.listdir(self.path))
        if not names:
            return
        if self.mark not in names:
            raise CheckpointError(
                f"output {where} holds something that is not {self.what}; choose another folder"
            )
        if not self.overwrite:
            raise CheckpointError(
                f"output {where} holds {self.what}; choose another folder, or pass --overwrite"
            )
        for name in names:
            if not self.files.fullmatch(name):
                raise CheckpointError(
                    f"output {where} holds {shown(name)}, which is no part of {self.what} and would be lost; "
                    "choose another folder"
                )

    def commit(self) -> None:
        """Give the folder its name."""
        with disk_errors(self.path, 0):
            sync_folder(self.hidden)
            if os.path.lexists(self.path):
                os.rename(self.path, self._aside)
                try:
                    os.rename(self.hidden, self.path)
                except BaseException:
                    os.rename(self._aside, self.path)
                    raise
                shutil.rmtree(self._aside, ignore_errors=True)
            else:
                os.rename(self.hidden, self.path)
            sync_folder(self.path.parent)
        self._unlock()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lock >= 0:
            shutil.rmtree(self.hidden, ignore_errors=True)
            self._unlock()

    def _unlock(self) -> None:
        with suppress(OSError):
            os.close(self._lock)
        self._lock = -1
