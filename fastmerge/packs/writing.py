"""Writing of a pack: into a temporary folder beside the final one, which is renamed when all is on disk."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fastmerge.checkpoint.durable import write_file
from fastmerge.checkpoint.new_folder import NewFolder
from fastmerge.packs.format import FORMAT, PACK, Manifest, Module, StoredTerm, stored_name
from fastmerge.packs.terms import Term
from fastmerge.stored_tensors import checksum_of, dtype_of, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

_FILES = re.compile(rf"{re.escape(PACK)}|pack-\d+\.safetensors")


class PackWriter:
    """One pack being written: `with PackWriter(...) as out: out.add(...); out.commit(...)`.

    Leaving without a commit removes what was written; an earlier pack stays as it was until then.

    Args:
        path: the pack's folder; its parents are created.
        overwrite: replace a pack that is there; anything else is never replaced.
        inputs: folders that are read: none may be the output, or in it.
        shard_size: bytes of stored tensors after which a file is written; they are held in memory until then.
    """

    def __init__(
        self, path: Path | str, *, overwrite: bool, inputs: Sequence[Path], shard_size: int
    ) -> None:
        self.shard_size = shard_size
        self.n_bytes = 0
        self.modules: dict[str, Module] = {}
        self._files: list[str] = []
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._new = NewFolder(
            path, what="a pack", mark=PACK, files=_FILES, overwrite=overwrite, inputs=inputs
        )

    def __enter__(self) -> PackWriter:
        self._new.__enter__()
        return self

    def add(
        self, name: str, like: Tensor, base: int, residual: float, terms: Sequence[Term]
    ) -> None:
        """Add a module.

        like: the base's tensor; base: its checksum; residual: see `format.Module`.
        """
        module = Module(
            tuple(like.shape),
            dtype_of(like),
            base,
            residual,
            [
                StoredTerm(t.info, {slot: checksum_of(x) for slot, x in t.parts.items()})
                for t in terms
            ],
        )
        self.add_module(name, module, terms)

    def add_module(self, name: str, module: Module, terms: Sequence[Term]) -> None:
        """Add a module whose checksums are known; `terms` are what it lists."""
        self.modules[name] = module
        for i, term in enumerate(terms):
            for slot, part in term.parts.items():
                self._held[stored_name(name, i, slot)] = part
            self._held_bytes += term.n_bytes
        if self._held_bytes >= self.shard_size:
            self._flush()

    def commit(
        self,
        *,
        strategy: str,
        options: Mapping[str, Any],
        base_name: str,
        experts: Sequence[str],
        weight: float = 1.0,
    ) -> Manifest:
        """Write what is left and pack.json, and give the folder its name."""
        self._flush()
        manifest = Manifest(
            strategy, options, base_name, experts, weight, self._files, self.modules
        )
        write_file(self._new.hidden / PACK, manifest.text(), 0)
        self._new.commit()
        return manifest

    def _flush(self) -> None:
        """Write the tensors that are held as one file."""
        if not self._held:
            return
        name = f"pack-{len(self._files) + 1:05d}.safetensors"
        self.n_bytes += write_tensors(self._new.hidden / name, self._held, {"format": FORMAT})
        self._files.append(name)
        self._held.clear()
        self._held_bytes = 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._new.__exit__(kind, error, trace)
