"""Applying packs: a base and the changes of any number of packs, tensor by tensor, into a model folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastmerge.checkpoint import (
    Checkpoint,
    OutputFolder,
    OutputTensor,
    companion_files,
    parse_size,
    plan_layout,
)
from fastmerge.checkpoint.durable import disk_errors, write_at
from fastmerge.checkpoint.folder import CONFIG
from fastmerge.checkpoint.wording import place, shown
from fastmerge.errors import CheckpointError, ConflictError, NonFiniteError, RecipeError
from fastmerge.packs.format import PACK, Module
from fastmerge.packs.reading import Pack, open_pack
from fastmerge.packs.terms import Term, add_term, scaled
from fastmerge.packs.writing import PackWriter
from fastmerge.stored_tensors import (
    Progress,
    bytes_of,
    checksum_of,
    info_of,
    narrowed,
    open_dense,
    read_tensor,
    wide,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ApplyReport:
    """What was written. changed: tensors that a pack changes, of `n_tensors`."""

    out: Path
    n_tensors: int
    changed: int
    bytes_read: int
    bytes_written: int
    seconds: float


@dataclass(frozen=True)
class Share:
    """A pack's part in a sum: weight times the change of one of its models."""

    pack: Pack
    weight: float
    expert: int = 0


def apply_packs(
    base: str | Path,
    packs: Sequence[str | Path] | str | Path,
    out: str | Path,
    weights: Sequence[float | None] | None = None,
    *,
    overwrite: bool = False,
    any_base: bool = False,
    out_shard_size: int | str = "5B",
    progress: Progress | None = None,
) -> ApplyReport:
    """Write base + sum_k weight_k * change_k to the folder `out`, in the base's types.

    Sums are computed in float32 (float64 for float64 tensors) and rounded once. Tensors that no pack changes
    are copied. Configuration and tokenizer are the base's.

    Args:
        base: the model's folder that the packs were made against.
        packs: packs of one model each, one or several.
        weights: one for each pack; None, as a whole or for one: the pack's own, which is 1 but for
            Twin-Merging.
        overwrite: replace a model that is in `out`.
        any_base: apply to a base with other values as well, which is an error else.
        out_shard_size: most bytes of one output file.
        progress: called with (tensor name, bytes done, bytes in all).
    Raises:
        CheckpointError: a pack is damaged, or made against another base. ConflictError: a pack's tensors do
            not fit.
        RecipeError: wrong number of weights. NonFiniteError: a result is not finite.
    """
    folders = [packs] if isinstance(packs, str | Path) else list(packs)
    opened = [open_pack(p) for p in folders]
    given = [None] * len(opened) if weights is None else list(weights)
    if len(given) != len(opened):
        raise RecipeError(f"{len(given)} weights are given for {len(opened)} packs")
    if not opened:
        raise RecipeError("no pack is given; name one at least")
    for pack in opened:
        if len(pack.manifest.experts) > 1:
            raise ConflictError(
                f"{place(pack.path)} holds {len(pack.manifest.experts)} models; restore one of them with "
                "`fastmerge revert`"
            )
    shares = [
        Share(pack, pack.manifest.weight if weight is None else float(weight))
        for pack, weight in zip(opened, given, strict=True)
    ]
    return _write(base, shares, out, overwrite, any_base, out_shard_size, progress)


def revert(
    pack: str | Path,
    model: str | int,
    base: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    any_base: bool = False,
    out_shard_size: int | str = "5B",
    progress: Progress | None = None,
) -> ApplyReport:
    """Restore one of a pack's models: base + its change, to the folder `out`.

    Args:
        model: its name in the pack, or its index. The rest as `apply_packs`.
    Raises:
        As `apply_packs`; CheckpointError also where the pack holds no such model.
    """
    opened = open_pack(pack)
    share = Share(opened, 1.0, opened.expert(model))
    return _write(base, [share], out, overwrite, any_base, out_shard_size, progress)


def sum_packs(
    packs: Sequence[str | Path],
    out: str | Path,
    weights: Sequence[float] | None = None,
    *,
    overwrite: bool = False,
    shard_size: int | str = "1B",
) -> Path:
    """Write one pack whose change is sum_k weight_k * change_k: the terms of all, with their scales
    multiplied.

    Nothing is decoded or rounded; factors of low rank stand side by side.

    Args:
        packs: of one model each, against one base. weights: default 1 each.
    Raises:
        ConflictError: packs of several models, or against different bases.
    """
    opened = [open_pack(p) for p in packs]
    factors = [1.0] * len(opened) if weights is None else [float(w) for w in weights]
    if not opened or len(factors) != len(opened):
        raise RecipeError(f"{len(factors)} weights are given for {len(opened)} packs")
    names = list(dict.fromkeys(name for pack in opened for name in pack.manifest.modules))
    writer = PackWriter(
        out,
        overwrite=overwrite,
        inputs=[p.path for p in opened],
        shard_size=parse_size(str(shard_size)),
    )
    with writer as folder:
        for name in names:
            having = [
                (p, w) for p, w in zip(opened, factors, strict=True) if name in p.manifest.modules
            ]
            first = having[0][0].manifest.modules[name]
            terms: list[Term] = []
            stored = []
            for pack, factor in having:
                _check_summand(pack, name, first)
                read = [scaled(term, factor) for term in pack.terms(name)]
                entries = pack.manifest.modules[name].terms
                terms += read
                stored += [type(s)(t.info, s.checksums) for s, t in zip(entries, read, strict=True)]
            residual = max(p.manifest.modules[name].residual for p, _ in having)
            module = Module(first.shape, first.dtype, first.base, residual, stored)
            folder.add_module(name, module, terms)
        folder.commit(
            strategy="sum",
            options={"packs": [p.path.name for p in opened], "weights": factors},
            base_name=opened[0].manifest.base_name,
            experts=["sum"],
        )
    return Path(out)


def _check_summand(pack: Pack, name: str, first: Module) -> None:
    if len(pack.manifest.experts) > 1:
        raise ConflictError(f"{place(pack.path)} holds several models; packs of one add up")
    module = pack.manifest.modules[name]
    if (module.shape, module.base) != (first.shape, first.base):
        raise ConflictError(
            f"{place(pack.path)} was made against another base than the first pack: {shown(name)} differs"
        )


def _write(
    base: str | Path,
    shares: Sequence[Share],
    out: str | Path,
    overwrite: bool,
    any_base: bool,
    out_shard_size: int | str,
    progress: Progress | None,
) -> ApplyReport:
    started = time.perf_counter()
    origin = open_dense(base)
    for share in shares:
        _check_fits(origin, share.pack)
    tensors = [OutputTensor(n, i.dtype, i.shape) for n, i in origin.tensors.items()]
    layout = plan_layout(tensors, parse_size(str(out_shard_size)))
    inputs = [origin.path, *(share.pack.path for share in shares)]
    done, changed = 0, 0
    total = layout.total_size + sum(share.pack.n_bytes for share in shares)
    with _overwritable(OutputFolder(Path(out), layout, force=overwrite, inputs=inputs)) as folder:
        for name, (shard, place_of) in layout.places().items():
            result, n_read = _result(origin, name, shares, any_base)
            done += n_read
            changed += any(name in s.pack.manifest.modules for s in shares)
            with disk_errors(folder.partial_path(shard), layout.disk_bytes):
                write_at(folder.fd(shard), bytes_of(result), place_of.offset)
            if progress is not None:
                progress(name, done, total)
        origin.check_unchanged()
        copies = companion_files(origin.path)
        if origin.config is not None:
            copies[CONFIG] = origin.path / CONFIG
        folder.commit({}, copies)
    return ApplyReport(
        Path(out),
        len(tensors),
        changed,
        done,
        layout.disk_bytes,
        time.perf_counter() - started,
    )


def _overwritable(folder: OutputFolder) -> OutputFolder:
    """Check the destination first, so that the remedy is in this command's words."""
    try:
        folder.check()
    except CheckpointError as error:
        raise CheckpointError(str(error).replace("--force", "--overwrite")) from None
    return folder


def _check_fits(base: Checkpoint, pack: Pack) -> None:
    for name, module in pack.manifest.modules.items():
        info = base.tensors.get(name)
        if info is None:
            raise ConflictError(
                f"{place(pack.path)} changes {shown(name)}, which {base} does not have; give the base that "
                "the pack was made against"
            )
        if info.shape != module.shape or not info.dtype.is_merged:
            raise ConflictError(
                f"{shown(name)} is {info.dtype.torch} {list(info.shape)} in {base} but {module.dtype.torch} "
                f"{list(module.shape)} in {place(pack.path)}; give the base that the pack was made against"
            )


def _result(
    base: Checkpoint, name: str, shares: Sequence[Share], any_base: bool
) -> tuple[Tensor, int]:
    """Return a tensor of the output, and how many bytes were read for it."""
    import torch

    tensor = read_tensor(info_of(base, name))
    n_read = info_of(base, name).n_bytes
    having = [share for share in shares if name in share.pack.manifest.modules]
    if not having:
        return tensor, n_read
    total = torch.zeros_like(wide(tensor))
    found = checksum_of(tensor)
    for share in having:
        module = share.pack.manifest.modules[name]
        if module.base != found and not any_base:
            named = shown(share.pack.manifest.base_name)
            raise CheckpointError(
                f"{place(share.pack.path)} was made against other values of {shown(name)} than {base} has "
                f"({PACK} calls its base {named}); give that base, or pass --any-base"
            )
        for term in share.pack.terms(name):
            n_read += term.n_bytes
            add_term(term, total, share.expert, share.weight)
    result = narrowed(total.add_(wide(tensor)), info_of(base, name).dtype)
    if not bool(torch.isfinite(result).all()):
        raise NonFiniteError(
            f"{shown(name)} of base and packs is not finite, or is beyond {result.dtype}; check the weights "
            f"and {base}"
        )
    return result, n_read
