"""A model's folder as the planner sees it: its tensors, whatever they are stored as."""

from __future__ import annotations

from pathlib import Path

from fastmerge.checkpoint import Checkpoint, open_checkpoint, read_adapter, with_adapter
from fastmerge.quant.gguf import is_gguf, open_gguf
from fastmerge.quant.recognise import recognise


def open_model(path: Path | str, adapter: Path | str | None = None) -> Checkpoint:
    """Read a model's headers, and those of an adapter that is added to its weights; no weight is read.

    Raises:
        CheckpointError: a folder or file is missing or broken, or the adapter does not fit the model.
    """
    path = Path(path)
    checkpoint = open_gguf(path) if is_gguf(path) else recognise(open_checkpoint(path))
    if adapter is not None:
        checkpoint = with_adapter(checkpoint, read_adapter(adapter))
    return checkpoint
