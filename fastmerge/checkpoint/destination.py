"""Whether an output folder may be written: nothing is overwritten unasked, no input ever."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from fastmerge.checkpoint.durable import free_bytes, no_space
from fastmerge.checkpoint.journal import JOURNAL
from fastmerge.checkpoint.wording import place, reason, shown
from fastmerge.errors import CheckpointError

#: What a killed run leaves of a model's weights, and a journal that says nothing: removed without asking.
_LEFTOVER = re.compile(
    r"model(.*\.safetensors(\.index\.json)?|\.gguf)\.partial|" + re.escape(JOURNAL)
)

#: An earlier model's weights and what describes their codes: it would be loaded along with ours, or instead.
_WEIGHTS = re.compile(
    r"(model.*\.safetensors|pytorch_model.*\.bin)(\.index\.json)?|model\.gguf"
    r"|(quantize|quant|hf_quant)_config\.json"
)


def leftovers(folder: Path) -> list[Path]:
    """Return the partial weight files and the journal that a killed run left in an existing folder."""
    return [folder / n for n in sorted(os.listdir(folder)) if _LEFTOVER.fullmatch(n)]


def weight_names(folder: Path) -> list[str]:
    """Return the names of weight files and indices in a folder, indices first."""
    found = [n for n in os.listdir(folder) if _WEIGHTS.fullmatch(n)]
    found = [n for n in found if not (folder / n).is_dir()]
    return sorted(found, key=lambda n: (not n.endswith(".json"), n))


def nearest_folder(path: Path) -> Path:
    """Return the deepest existing ancestor of `path`, or itself."""
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    return path


def check_destination(
    path: Path, inputs: Sequence[Path], *, force: bool, known: Collection[str] = ()
) -> None:
    """Refuse an output folder that holds something, unless forced, and any that holds an input.

    known: names that may be there, for a killed merge that is resumed left them.

    Raises:
        CheckpointError: names the folder and the remedy.
    """
    where = place(path)
    if "\0" in str(path):
        raise CheckpointError(f"{shown(str(path))} cannot be a path")
    existing = nearest_folder(path)
    if not existing.is_dir():
        what = "is a file" if existing.is_file() else "is not a folder"
        if existing == path:
            raise CheckpointError(f"output {where} {what}; give a folder")
        raise CheckpointError(f"output {where} cannot be created: {place(existing)} {what}")
    real = os.path.realpath(path)
    for model in inputs:
        _check_input(path, real, model, force=force)
    if existing != path:
        return
    try:
        ours = {p.name for p in leftovers(path)}.union(known)
        others = sorted(set(os.listdir(path)) - ours)
    except OSError as error:
        raise CheckpointError(f"output {where} cannot be read: {reason(error)}") from None
    if others and not force:
        raise CheckpointError(
            f"output {where} is not empty (it holds {shown(others[0])}); choose another folder, or "
            "pass --force to replace the model in it"
        )


def _check_input(path: Path, real: str, model: Path, *, force: bool) -> None:
    if os.path.realpath(model) == real or (path.exists() and _same(path, model)):
        raise CheckpointError(f"output {place(path)} is an input; choose another folder")
    if not force:
        return
    # Replacing an earlier model deletes files in the output folder; an input may link to them.
    held = [model]
    if model.is_dir():
        held += [
            model / n for n in os.listdir(model) if n.endswith((".safetensors", ".bin", ".gguf"))
        ]
    for file in held:
        if os.path.realpath(file).startswith(os.path.join(real, "")):
            raise CheckpointError(
                f"output {place(path)} holds {place(file)} of an input, which --force might "
                "delete; choose another folder"
            )


def _same(path: Path, model: Path) -> bool:
    """Return whether two existing paths are one folder (another spelling, a bind mount)."""
    return model.exists() and os.path.samefile(path, model)


def check_space(path: Path, needed: int) -> None:
    """Raise CheckpointError unless the disk has `needed` bytes; leftovers count as free."""
    folder = nearest_folder(path)
    free = free_bytes(folder)
    if free is None:
        return
    if folder == path:
        free += sum(os.lstat(p).st_blocks * 512 for p in leftovers(path))
    if free < needed:
        raise no_space(folder, needed)
