"""Writing of a pack: into a temporary folder beside the final one, which is renamed when all is on disk."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fastmerge.checkpoint import OutputTensor, plan_layout
from fastmerge.checkpoint.destination import nearest_folder
from fastmerge.checkpoint.durable import (
    create,
    disk_errors,
    sync_folder,
    write_all,
    write_at,
    write_file,
)
from fastmerge.checkpoint.wording import place
from fastmerge.dtypes import BY_TORCH, DType
from fastmerge.errors import CheckpointError
from fastmerge.packs.format import FORMAT, PACK, Manifest, Module, StoredTerm, stored_name
from fastmerge.packs.tensors import bytes_of, checksum_of
from fastmerge.packs.terms import Term

if TYPE_CHECKING:
    from torch import Tensor


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
        self.path = Path(path)
        self.overwrite = overwrite
        self.inputs = inputs
        self.shard_size = shard_size
        self.n_bytes = 0
        self.modules: dict[str, Module] = {}
        self._files: list[str] = []
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._folder: Path | None = None

    def __enter__(self) -> PackWriter:
        self._check_place()
        with disk_errors(self.path, 0):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            hidden = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
            hidden.mkdir()
            self._folder = hidden
        return self

    def _check_place(self) -> None:
        real = os.path.realpath(self.path)
        for folder in self.inputs:
            if os.path.join(os.path.realpath(folder), "").startswith(os.path.join(real, "")):
                raise CheckpointError(
                    f"output {place(self.path)} is or holds the input {place(folder)}; choose another folder"
                )
        if not os.path.lexists(self.path):
            existing = nearest_folder(self.path)
            if not existing.is_dir():
                raise CheckpointError(
                    f"output {place(self.path)} cannot be created: {place(existing)} is a file"
                )
            return
        if not self.path.is_dir() or self.path.is_symlink():
            raise CheckpointError(f"output {place(self.path)} is no folder; choose another name")
        empty = not any(self.path.iterdir())
        if not empty and not (self.path / PACK).is_file():
            raise CheckpointError(
                f"output {place(self.path)} holds something that is not a pack; choose another folder"
            )
        if not empty and not self.overwrite:
            raise CheckpointError(
                f"output {place(self.path)} holds a pack; choose another folder, or pass --overwrite"
            )

    def add(
        self, name: str, like: Tensor, base: int, residual: float, terms: Sequence[Term]
    ) -> None:
        """Add a module.

        like: the base's tensor; base: its checksum; residual: see `format.Module`.
        """
        module = Module(
            tuple(like.shape),
            _dtype(like),
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
        assert self._folder is not None
        self._flush()
        manifest = Manifest(
            strategy, options, base_name, experts, weight, self._files, self.modules
        )
        write_file(self._folder / PACK, manifest.text(), 0)
        with disk_errors(self.path, 0):
            sync_folder(self._folder)
            self._swap(self._folder)
        self._folder = None
        return manifest

    def _swap(self, folder: Path) -> None:
        if not self.path.exists():
            os.rename(folder, self.path)
        else:
            old = folder.with_name(folder.name + ".old")
            os.rename(self.path, old)
            try:
                os.rename(folder, self.path)
            except BaseException:
                os.rename(old, self.path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        sync_folder(self.path.parent)

    def _flush(self) -> None:
        """Write the tensors that are held as one file."""
        if not self._held:
            return
        assert self._folder is not None
        tensors = [OutputTensor(n, _dtype(t), tuple(t.shape)) for n, t in self._held.items()]
        shard = plan_layout(tensors, 2**62, {"format": FORMAT}).shards[0]
        name = f"pack-{len(self._files) + 1:05d}.safetensors"
        path = self._folder / name
        with disk_errors(path, shard.size):
            fd = create(path)
            try:
                write_all(fd, shard.header)
                for stored, info in shard.tensors.items():
                    write_at(fd, bytes_of(self._held[stored]), info.offset)
                os.fsync(fd)
            finally:
                os.close(fd)
        self.n_bytes += shard.size
        self._files.append(name)
        self._held.clear()
        self._held_bytes = 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def _dtype(tensor: Tensor) -> DType:
    return BY_TORCH[str(tensor.dtype).removeprefix("torch.")]
