"""Checking a merged model: against the manifest beside it, and a sample against its inputs.

Every tensor's bytes are read again and their checksums compared. Where the inputs are still there and
unchanged, some tensors are merged once more, by the reference backend, and compared byte by byte.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastmerge import ops
from fastmerge.checkpoint import (
    Checkpoint,
    Journal,
    TensorInfo,
    file_checksum,
    header_digest,
    open_checkpoint,
    word_bytes,
)
from fastmerge.checkpoint.coded import CodedInfo
from fastmerge.checkpoint.files import opened, read_at, read_json_object
from fastmerge.checkpoint.gguf import read_gguf
from fastmerge.checkpoint.wording import shown
from fastmerge.dtypes import DType
from fastmerge.engine import Engine
from fastmerge.errors import CheckpointError, MergeError
from fastmerge.jobs import Action, stored_names
from fastmerge.planner import Plan, make_plan
from fastmerge.provenance import MANIFEST
from fastmerge.quant.gguf import find_gguf, is_gguf
from fastmerge.quant.gguf_names import AUXILIARY, DENSE_TYPES
from fastmerge.quant.quantize import Quantize
from fastmerge.recipe import load_recipe
from fastmerge.registry import Scope

_COMPARE_BYTES = 8 << 20
_READERS = 4  # tensors that are read and hashed at once; both let go of the interpreter


@dataclass
class Row:
    """One check: what was checked, how much of it, and what is wrong."""

    what: str
    extent: str
    faults: list[str] = field(default_factory=list)
    note: str = ""

    @property
    def state(self) -> str:
        return f"{len(self.faults)} WRONG" if self.faults else self.note or "ok"


@dataclass
class Verification:
    """All checks of one model."""

    rows: list[Row] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not any(row.faults for row in self.rows)

    def table(self) -> str:
        """Return the checks as text, one a line, and every fault below its check."""
        what = max(len(r.what) for r in self.rows)
        extent = max(len(r.extent) for r in self.rows)
        lines = []
        for row in self.rows:
            lines.append(f"{row.what:<{what}}  {row.extent:<{extent}}  {row.state}")
            lines += [f"    {fault}" for fault in row.faults]
        return "\n".join([*lines, "whole" if self.ok else "not whole"])


def verify(out: Path | str, *, sample: int = 8, seed: int = 0) -> Verification:
    """Check the model in `out`.

    Args:
        sample: how many tensors to merge again; 0 for none. seed: of their choice.
    Raises:
        CheckpointError: no manifest, or a file that cannot be read.
    """
    out = Path(out)
    if sample < 0:
        raise CheckpointError(f"sample must be 0 or more, got {sample}")
    if not (out / MANIFEST).is_file():
        raise CheckpointError(f"{out} has no {MANIFEST}; only merges that were finished have one")
    manifest = read_json_object(out / MANIFEST, strict=True)
    try:
        model = _gguf_file(out) if is_gguf(out) else open_checkpoint(out)
        result = Verification([_listing(model, manifest), *_bytes(model, manifest)])
        result.rows.append(_again(model, manifest, sample, seed))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{out / MANIFEST} is not a manifest: {error!r}") from None
    return result


def _gguf_file(out: Path) -> Checkpoint:
    """Return the tensors of a folder's GGUF file as they are stored, under its names."""
    gguf = read_gguf(find_gguf(out))
    tensors: dict[str, TensorInfo | CodedInfo] = {}
    for t in gguf.tensors.values():
        if t.name in AUXILIARY:  # of no input: it is in the header that is laid out
            continue
        dtype, shape = DENSE_TYPES.get(t.type, DType.U8), t.shape
        if t.type not in DENSE_TYPES:
            shape = (t.n_bytes,)
        tensors[t.name] = TensorInfo(t.name, dtype, shape, gguf.path, t.offset, t.n_bytes)
    return Checkpoint(out, tensors, None, [gguf.path], [gguf.identity])


def _listing(model: Checkpoint, manifest: Mapping[str, Any]) -> Row:
    known = manifest["tensors"]
    row = Row("tensors", f"{len(known)} in the manifest")
    for name in sorted(known.keys() | model.tensors.keys()):
        if name not in model.tensors:
            row.faults.append(f"{shown(name)} is missing")
        elif name not in known:
            row.faults.append(f"{shown(name)} is not in the manifest")
        else:
            info = model.tensors[name]
            found = (info.dtype.safetensors, list(info.shape))
            said = (known[name]["dtype"], known[name]["shape"])
            if found != said:
                row.faults.append(f"{shown(name)} is {found}, the manifest says {said}")
    return row


def _bytes(model: Checkpoint, manifest: Mapping[str, Any]) -> list[Row]:
    rows = []
    for file in model.weight_files:
        held = [t for t in model.tensors.values() if t.file == file]
        row = Row(file.name, f"{len(held)} tensors")
        with opened(file) as (fd, _), ThreadPoolExecutor(_READERS) as pool:

            def checksum(info: TensorInfo, fd: int = fd, file: Path = file) -> str:
                word = word_bytes(info.shape, info.dtype.itemsize)
                return f"{file_checksum(fd, file, info.offset, info.n_bytes, word):016x}"

            for info, found in zip(held, pool.map(checksum, held), strict=True):
                entry = manifest["tensors"].get(info.name)
                if entry is not None and entry["checksum"] != found:
                    row.faults.append(
                        f"{shown(info.name)}: checksum {found}, the manifest says "
                        f"{shown(entry['checksum'])}"
                    )
        rows.append(row)
    return rows


# ---- merging again -----------------------------------------------------------------------------------


class Scratch:
    """An output without names: sparse temporary files, one per shard."""

    journal: Journal | None = None

    def __init__(self, n_shards: int) -> None:
        self.files = [tempfile.TemporaryFile() for _ in range(n_shards)]  # noqa: SIM115

    def fd(self, shard: int) -> int:
        return self.files[shard].fileno()

    def direct_fd(self, shard: int) -> int:
        return -1

    def close(self) -> None:
        for file in self.files:
            file.close()


def _again(model: Checkpoint, manifest: Mapping[str, Any], sample: int, seed: int) -> Row:
    row = Row("merged again", "0 tensors")
    if not sample:
        row.note = "not asked for"
        return row
    try:
        plan = _plan(model.path, manifest)
        changed = _changed(plan, manifest)
    except MergeError as error:
        row.note = f"skipped: {error}"
        return row
    if changed:
        row.note = f"skipped: {changed}"
        return row
    names = sorted(
        j.name
        for j in plan.jobs
        # What is decomposed depends on the linear algebra library, to the last bit.
        if j.action is not Action.COPY_EQUAL and j.n and j.scope is not Scope.MATRIX
    )
    chosen = random.Random(seed).sample(names, min(sample, len(names)))
    row.extent = f"{len(chosen)} of {len(names)} tensors"
    assert plan.layout is not None
    scratch = Scratch(len(plan.layout.shards))
    try:
        policy = manifest["options"]["nan_policy"]
        Engine(plan, ops.choose("cpu", "reference"), scratch, only=chosen, nan_policy=policy).run()
        places = plan.layout.places()
        jobs = {j.name: j for j in plan.jobs}
        for name in [s for n in sorted(chosen) for s in stored_names(jobs[n])]:
            shard, want = places[name]
            first = _first_difference(scratch.fd(shard), want, model.tensors.get(name))
            if first is not None:
                row.faults.append(f"{shown(name)} differs from its merge at byte {first}")
    finally:
        scratch.close()
    return row


def _plan(out: Path, manifest: Mapping[str, Any]) -> Plan:
    recipe = load_recipe(manifest["recipe"])
    folder = Path(os.path.realpath(out)) / manifest["recipe_folder"]
    options = manifest["options"]
    quantize = Quantize.from_dict(options.get("quantize"))
    if quantize is not None and quantize.hessians is not None:
        quantize = replace(quantize, hessians=Path(os.path.realpath(out)) / quantize.hessians)
    plan = make_plan(
        replace(recipe, folder=folder),
        out_shard_size=options["out_shard_size"],
        allow_missing=options["allow_missing"],
        seed=options["seed"],
        quantize=quantize,
    )
    plan.raise_conflicts()
    return plan


def _changed(plan: Plan, manifest: Mapping[str, Any]) -> str | None:
    files = [i for c in plan.checkpoints for i in c.identities]
    known = list(manifest["inputs"])
    if plan.storage is not None and plan.storage.hessians is not None:
        files.append(plan.storage.hessians.identity)
        known.append(manifest["options"]["quantize"]["hessians"])
    if len(files) != len(known):
        return f"the inputs have {len(files)} files, had {len(known)}"
    for file, entry in zip(files, known, strict=True):
        if file.size != entry["size"] or header_digest(file.path) != entry["header"]:
            return f"{file.path} has changed since"
    return None


def _first_difference(fd: int, want: TensorInfo, info: TensorInfo | CodedInfo | None) -> int | None:
    """Return the first byte at which the model's tensor and the merge just made differ."""
    if not isinstance(info, TensorInfo) or info.n_bytes != want.n_bytes:
        return 0
    with opened(info.file) as (model, _):
        for at in range(0, info.n_bytes, _COMPARE_BYTES):
            n = min(_COMPARE_BYTES, info.n_bytes - at)
            a = read_at(fd, info.file, want.offset + at, n)
            b = read_at(model, info.file, info.offset + at, n)
            if a != b:
                return at + next(i for i in range(n) if a[i] != b[i])
    return None


__all__ = ["Verification", "verify"]
