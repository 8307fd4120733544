"""What a merge's bytes depend on: the binding of its journal, and the manifest beside its model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastmerge.checkpoint import OutputFolder, digest, header_digest
from fastmerge.planner import Plan

MANIFEST = "fastmerge_manifest.json"


def installed_version() -> str:
    """Return the version of the package; `unknown` in a tree that is not installed."""
    try:
        return version("fastmerge")
    except PackageNotFoundError:
        return "unknown"


def binding(plan: Plan, nan_policy: str, shard_bytes: int) -> dict[str, Any]:
    """Return what a journal is bound to: everything that decides the output's bytes."""
    assert plan.layout is not None
    inputs = [
        {
            "path": os.path.abspath(known.path),
            "size": known.size,
            "mtime_ns": known.mtime_ns,
            "header": header_digest(known.path),
        }
        for checkpoint in plan.checkpoints
        for known in checkpoint.identities
    ]
    layout = b"".join(s.file_name.encode() + b"\0" + s.header for s in plan.layout.shards)
    return {
        "fastmerge": installed_version(),
        "recipe": plan.recipe.text,
        "options": {
            "seed": plan.seed,
            "allow_missing": plan.allow_missing,
            "nan_policy": nan_policy,
            "out_shard_size": shard_bytes,
            "quantize": plan.quantize.as_dict() if plan.quantize else None,
        },
        "inputs": inputs,
        "layout": digest(layout),
    }


def manifest(
    plan: Plan,
    bound: dict[str, Any],
    folder: OutputFolder,
    joined: Mapping[str, Any] | None = None,
) -> bytes:
    """Return the manifest's text: each tensor's checksum, and what the merge was made from.

    Paths of this machine are left out but those of the recipe and, to find relative ones again, the
    recipe's folder as seen from the output. joined: what a method's tensors told each other.
    """
    assert plan.layout is not None
    sums = folder.checksums()
    tensors = {
        name: {
            "dtype": info.dtype.safetensors,
            "shape": list(info.shape),
            "checksum": f"{sums[name]:016x}",
        }
        for name, (_, info) in sorted(plan.layout.places().items())
    }
    files = iter(bound["inputs"])
    inputs = []
    for checkpoint, model in zip(plan.checkpoints, plan.recipe.inputs, strict=True):
        for known in checkpoint.identities:
            file = next(files)
            entry = {"model": str(model.ref), "file": Path(known.path).name}
            inputs.append({**entry, "size": file["size"], "header": file["header"]})
    document = {
        "fastmerge": bound["fastmerge"],
        "recipe": plan.recipe.text,
        "recipe_hash": digest(plan.recipe.text.encode()),
        "recipe_folder": os.path.relpath(
            os.path.realpath(plan.recipe.folder), os.path.realpath(folder.path)
        ),
        "options": _published(bound["options"], folder.path),
        "inputs": inputs,
        **({"joined": joined} if joined else {}),
        "tensors": tensors,
    }
    return (json.dumps(document, ensure_ascii=False, indent=1) + "\n").encode()


def _published(options: dict[str, Any], out: Path) -> dict[str, Any]:
    """Return the options with the file of Hessians as seen from the output."""
    quantize = options["quantize"]
    if quantize is None or quantize["hessians"] is None:
        return options
    known = quantize["hessians"]
    path = os.path.relpath(os.path.realpath(known["path"]), os.path.realpath(out))
    entry = {"path": path, "size": known["size"], "header": known["header"]}
    return {**options, "quantize": {**quantize, "hessians": entry}}
