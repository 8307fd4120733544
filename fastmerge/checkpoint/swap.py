"""Undoing a half-done swap of an earlier model for a new one: by the run itself, or by the next."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fastmerge.checkpoint.journal import PARTIAL, REPLACED, Record


def aside(path: Path) -> Path:
    """Return the name of an earlier model's file while the new one takes its place."""
    return path.with_name(path.name + REPLACED)


def partial(path: Path) -> Path:
    """Return the name of a file while it is written."""
    return path.with_name(path.name + PARTIAL)


def put_back(renamed: Sequence[Path], set_aside: Sequence[Path]) -> None:
    """Give new files their temporary names again and earlier ones their own.

    Errors pass silently: what could not be put back keeps its other name.
    """
    for path in renamed:
        with suppress(OSError):
            os.rename(path, partial(path))
    for path in reversed(set_aside):
        with suppress(OSError):
            if not os.path.lexists(path):
                os.rename(aside(path), path)


def undo_swap(folder: Path, record: Record) -> None:
    """Undo what a killed run's swap had done. All its files were there under temporary names then."""
    finals = [folder / name for name in record.commit]
    put_back(
        [path for path in finals if not os.path.lexists(partial(path))],
        [folder / name for name in record.aside],
    )
