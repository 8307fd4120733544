"""A pack on disk: checked when it is opened, its tensors verified as they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastmerge.checkpoint import TensorInfo, read_header
from fastmerge.checkpoint.files import read_json_object
from fastmerge.checkpoint.wording import place, shown
from fastmerge.errors import CheckpointError
from fastmerge.packs.format import PACK, Manifest, StoredTerm, parse_manifest, stored_name
from fastmerge.packs.terms import Term, part_specs
from fastmerge.stored_tensors import checksum_of, read_tensor

_AGAIN = "the pack is damaged, make or download it again"


@dataclass(frozen=True)
class Pack:
    """An opened pack. tensors: every stored one by its name."""

    path: Path
    manifest: Manifest
    tensors: Mapping[str, TensorInfo]

    def terms(self, module: str) -> list[Term]:
        """Read the terms of a module.

        Raises:
            CheckpointError: a file cannot be read, or is not what the pack's checksums say.
        """
        stored = self.manifest.modules[module].terms
        return [self._term(module, i, term) for i, term in enumerate(stored)]

    def _term(self, module: str, i: int, term: StoredTerm) -> Term:
        parts = {}
        for slot, expected in term.checksums.items():
            info = self.tensors[stored_name(module, i, slot)]
            parts[slot] = read_tensor(info)
            if checksum_of(parts[slot]) != expected:
                raise CheckpointError(
                    f"{place(info.file)}: {shown(info.name)} is not what {PACK} has the checksum of; {_AGAIN}"
                )
        return Term(term.info, parts)

    def expert(self, model: str | int) -> int:
        """Return the index of a model that is named, or given by its index.

        Raises:
            CheckpointError: there is none; names those there are.
        """
        names = self.manifest.experts
        if isinstance(model, str) and model in names:
            return names.index(model)
        index = int(model) if str(model).isdigit() else -1
        if 0 <= index < len(names):
            return index
        raise CheckpointError(
            f"{place(self.path)} holds no model {shown(model)}; it holds {', '.join(names)}, or 0 to "
            f"{len(names) - 1}"
        )

    @property
    def n_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(info.n_bytes for info in self.tensors.values())


def open_pack(path: Path | str) -> Pack:
    """Read pack.json and the headers of a pack's files; no weight is read.

    Raises:
        CheckpointError: no pack is there, or it is damaged; names the file, the key and what is wrong.
    """
    path = Path(path)
    if not (path / PACK).is_file():
        raise CheckpointError(
            f"{place(path)} is not a pack: it has no {PACK}; give a pack's folder"
        )
    manifest = parse_manifest(read_json_object(path / PACK, strict=True), place(path / PACK))
    tensors: dict[str, TensorInfo] = {}
    for file in manifest.files:
        for name, info in read_header(path / file).tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{place(path / file)} holds {shown(name)} a second time; {_AGAIN}"
                )
            tensors[name] = info
    _check_complete(path, manifest, tensors)
    return Pack(path, manifest, tensors)


def _check_complete(path: Path, manifest: Manifest, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse a pack whose stored tensors are not those of its terms, by name, type and shape."""
    listed: set[str] = set()
    for module, entry in manifest.modules.items():
        for i, term in enumerate(entry.terms):
            specs = part_specs(term.info, entry.shape)
            if set(specs) != set(term.checksums):
                raise CheckpointError(
                    f"{place(path / PACK)}: modules[{shown(module)}].terms[{i}] must have checksums of "
                    f"{_words(specs)}, got {_words(term.checksums)}; {_AGAIN}"
                )
            for slot, spec in specs.items():
                name = stored_name(module, i, slot)
                info = tensors.get(name)
                if info is None:
                    raise CheckpointError(f"{place(path)} lacks the tensor {shown(name)}; {_AGAIN}")
                if (info.dtype, info.shape) != (spec.dtype, spec.shape):
                    raise CheckpointError(
                        f"{place(info.file)}: {shown(name)} is {info.dtype.torch} {list(info.shape)} but "
                        f"{PACK} makes it {spec.dtype.torch} {list(spec.shape)}; {_AGAIN}"
                    )
                listed.add(name)
    for name in tensors:
        if name not in listed:
            raise CheckpointError(
                f"{place(tensors[name].file)} holds {shown(name)}, which {PACK} does not list; {_AGAIN}"
            )


def _words(names: Sequence[str] | Mapping[str, object]) -> str:
    return shown(sorted(names))
