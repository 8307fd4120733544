"""A model folder: which files hold its weights, what tensors they hold, and its config.json."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastmerge.checkpoint.coded import CodedInfo
from fastmerge.checkpoint.files import FileIdentity, read_json_object
from fastmerge.checkpoint.header import TensorInfo, read_header
from fastmerge.checkpoint.wording import is_plain_name, place, reason, shown
from fastmerge.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

#: Names under which an output head may be tied to an embedding, nearest first.
HEAD = "lm_head.weight"
EMBEDDINGS = (
    "model.embed_tokens.weight",
    "transformer.wte.weight",
    "gpt_neox.embed_in.weight",
    "model.decoder.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "transformer.word_embeddings.weight",
)

_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<i>\d{1,6})-of-(?P<n>\d{1,6})\.safetensors", re.ASCII)

#: Other kinds of weights: how to spot them, what they are, how to get safetensors from them.
_OTHER_KINDS = (
    (
        re.compile(r"adapter_model.*\.(safetensors|bin)"),
        "an adapter",
        "which belongs to a base; give both, as BASE+ADAPTER",
    ),
    (
        re.compile(r"(pytorch_model|model|consolidated).*\.(bin|pt|pth)"),
        "torch weights",
        "not supported yet; load it with transformers and save_pretrained() it to get safetensors",
    ),
    (
        re.compile(r".+\.gguf"),
        "GGUF weights",
        "not supported yet; load it with transformers' from_pretrained(..., gguf_file=...) and "
        "save_pretrained() it",
    ),
)


@dataclass(frozen=True)
class Checkpoint:
    """One model folder with every header checked. tensors are ordered by file, then by offset.

    config is the content of config.json, None where there is none. identities are of all files that
    its weights depend on. dropped: stored tensors that are not the model's but a format's own -> why.
    warnings are for the user. adapter is the folder of the adapter that was added to the weights.
    """

    path: Path
    tensors: dict[str, TensorInfo | CodedInfo]
    config: dict[str, Any] | None
    weight_files: list[Path]
    identities: list[FileIdentity] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    adapter: Path | None = None

    def __str__(self) -> str:
        return str(self.path) if self.adapter is None else f"{self.path}+{self.adapter}"

    def check_unchanged(self) -> None:
        """Raise CheckpointError if one of these files was replaced or written to since opening."""
        for known in self.identities:
            known.check_unchanged()


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Find a folder's weights and read their headers; no weight is read.

    model.safetensors wins over an index, as in transformers; without either, all *.safetensors
    files.

    Raises:
        CheckpointError: no such folder, no weights that are supported, or a file that is broken or
            does not fit the others; names the file and what is wrong.
    """
    path = Path(path)
    names = list_folder(path)
    weight_map: dict[str, str] | None = None
    if SINGLE in names:
        files = [SINGLE]
    elif INDEX in names:
        weight_map = _read_index(path / INDEX)
        files = sorted(set(weight_map.values()))
        for file in files:
            if file not in names:
                raise CheckpointError(
                    f"{place(path / file)} is missing, but {INDEX} names it; download it again"
                )
    else:
        files = _unindexed(path, names)
    config = read_json_object(path / CONFIG, strict=False) if CONFIG in names else None
    headers = [read_header(path / file) for file in files]
    tensors: dict[str, TensorInfo | CodedInfo] = {}
    for header in headers:
        for name, info in header.tensors.items():
            if weight_map is not None:
                _check_assigned(info, weight_map.get(name), path)
            if name in tensors:
                other = place(Path(tensors[name].file.name))
                raise CheckpointError(
                    f"{place(info.file)} holds tensor {shown(name)}, which {other} holds too; "
                    "remove the file that does not belong to the model"
                )
            tensors[name] = info
    for name, file in (weight_map or {}).items():
        if name not in tensors:
            raise CheckpointError(
                f"{place(path / INDEX)} says that {file} holds tensor {shown(name)}, "
                "but it does not"
            )
    return Checkpoint(
        path, tensors, config, [path / f for f in files], [h.identity for h in headers]
    )


def list_folder(path: Path) -> set[str]:
    """Return the names in a folder but hidden ones, such as macOS' `._model.safetensors`."""
    try:
        if path.is_file():
            raise CheckpointError(f"{place(path)} is a file; give the folder that holds it")
        return {name for name in os.listdir(path) if not name.startswith(".")}
    except FileNotFoundError:
        raise CheckpointError(f"{place(path)} does not exist; give a model's folder") from None
    except NotADirectoryError:
        raise CheckpointError(f"{place(path)} is not a folder") from None
    except OSError as error:
        raise CheckpointError(f"{place(path)} cannot be read: {reason(error)}") from None
    except ValueError:  # NUL or a character that the file system's encoding lacks
        raise CheckpointError(f"{shown(str(path))} cannot be a path") from None


def _unindexed(path: Path, names: set[str]) -> list[str]:
    found = sorted(
        n for n in names if n.endswith(".safetensors") and not n.startswith("adapter_model")
    )
    if any(n.startswith("model") for n in found):
        # The same weights once more, in their authors' own naming.
        found = [n for n in found if not n.startswith("consolidated")]
    if not found:
        raise CheckpointError(_no_weights(path, names))
    for name in found:
        if match := _NUMBERED.fullmatch(name):
            width, n = len(match["i"]), int(match["n"])
            for i in range(1, n + 1):
                wanted = f"{match['stem']}-{i:0{width}d}-of-{match['n']}.safetensors"
                if wanted not in names:
                    raise CheckpointError(
                        f"{place(path / wanted)} is missing: {place(Path(name))} is one of {n} "
                        "shards; download it again"
                    )
    return found


def _no_weights(path: Path, names: set[str]) -> str:
    for pattern, kind, remedy in _OTHER_KINDS:
        for name in sorted(names):
            if pattern.fullmatch(name):
                return f"{place(path)} holds only {kind} ({shown(name)}), {remedy}"
    return f"{place(path)} holds no weights: neither {SINGLE} nor any other *.safetensors file"


def _read_index(path: Path) -> dict[str, str]:
    where = place(path)
    index = read_json_object(path, strict=True)
    if "weight_map" not in index:
        raise CheckpointError(f"{where} has no weight_map")
    weight_map = index["weight_map"]
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{where}: weight_map is not a map but {shown(weight_map)}")
    if not weight_map:
        raise CheckpointError(f"{where}: weight_map is empty")
    for name, file in weight_map.items():
        what = f"{where}: weight_map sends {shown(name)} to {shown(file)}"
        if not isinstance(file, str):
            raise CheckpointError(f"{what}, which is not text")
        if not is_plain_name(file):
            raise CheckpointError(f"{what}, which is not a plain file name in the same folder")
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{what}, which is not a .safetensors file")
    return weight_map


def _check_assigned(info: TensorInfo, file: str | None, path: Path) -> None:
    if file == info.file.name:
        return
    what = "does not name" if file is None else f"assigns to {file}"
    raise CheckpointError(
        f"{place(info.file)} holds tensor {shown(info.name)}, which {INDEX} {what}; remove "
        f"{place(path / INDEX)} to use the shards as they are"
    )
