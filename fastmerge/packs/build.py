"""Making packs: models against a base, tensor by tensor; one matrix of each is in memory at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmerge.checkpoint import Checkpoint, parse_size
from fastmerge.checkpoint.wording import shown
from fastmerge.errors import ConflictError
from fastmerge.packs.strategies import Twin, make_strategy, options_of
from fastmerge.packs.terms import Term, change_of
from fastmerge.packs.writing import PackWriter
from fastmerge.stored_tensors import (
    Progress,
    bytes_of,
    change,
    check_device,
    checksum_of,
    info_of,
    open_dense,
    read_tensor,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ModuleReport:
    """One module of a pack. terms: kind, its count and format, in words.

    n_bytes: of its stored tensors; dense_bytes: of the models' own tensors; residual: ||change - stored|| /
    ||change|| over all models.
    """

    name: str
    shape: tuple[int, ...]
    terms: str
    residual: float
    n_bytes: int
    dense_bytes: int

    @property
    def ratio(self) -> float:
        """Stored bytes over those of the models' own tensors."""
        return self.n_bytes / self.dense_bytes


@dataclass(frozen=True)
class PackReport:
    """What packing did. n_bytes: of the pack's files; unchanged: tensors that are the base's in all
    models."""

    out: Path
    modules: Sequence[ModuleReport]
    unchanged: int
    n_bytes: int
    dense_bytes: int
    bytes_read: int
    seconds: float


def pack(
    model: str | Path | Sequence[str | Path],
    base: str | Path,
    out: str | Path,
    *,
    strategy: str,
    overwrite: bool = False,
    shard_size: int | str = "1B",
    device: str = "cpu",
    progress: Progress | None = None,
    **options: Any,
) -> PackReport:
    """Compress what a model changes of its base into the folder `out`; docs/packs.md defines the format.

    Args:
        model: a model's folder; for strategy "smile" one or several.
        base: the folder of what it was made from; for "twin" the shared model.
        strategy: tsv_c, twin, smile, graft or mcsmoe; `options` are its fields in `packs.strategies`.
        overwrite: replace a pack in `out`; anything else there is refused.
        shard_size: bytes of one of the pack's files, of which one is held in memory.
        device: where matrices are decomposed: "cpu", "cuda", ...
        progress: called with (tensor name, bytes done, bytes in all).
    Returns:
        A `PackReport` with residual and compression of each module.
    Raises:
        MergeError: anything the caller can mend, in one line.
    """
    chosen = make_strategy(strategy, options)
    models = [model] if isinstance(model, str | Path) else list(model)
    if not models or (len(models) > 1 and not chosen.several):
        raise ConflictError(
            f"strategy {strategy} packs one model, got {len(models)}; pack each alone"
        )
    weight = chosen.weight if isinstance(chosen, Twin) else 1.0

    def terms(name: str, deltas: Sequence[Tensor], own: str) -> list[Term]:
        return chosen.terms(name, [d.to(device) for d in deltas], own)

    check_device(device)
    return write_pack(
        models,
        base,
        out,
        terms,
        strategy=strategy,
        options=options_of(chosen),
        weight=weight,
        overwrite=overwrite,
        shard_size=shard_size,
        progress=progress,
    )


def write_pack(
    models: Sequence[str | Path],
    base: str | Path,
    out: str | Path,
    terms_of: Callable[[str, Sequence[Tensor], str], list[Term]],
    *,
    strategy: str,
    options: dict[str, Any],
    weight: float,
    overwrite: bool,
    shard_size: int | str,
    progress: Progress | None,
) -> PackReport:
    """Write a pack of what `terms_of` makes of (name, changes of each model, the models' type)."""
    started = time.perf_counter()
    origin, experts = open_dense(base), [open_dense(m) for m in models]
    for expert in experts:
        check_family(origin, expert)
    rows: list[ModuleReport] = []
    total = sum(info_of(c, n).n_bytes for c in (origin, *experts) for n in origin.tensors)
    done = unchanged = 0
    writer = PackWriter(
        out,
        overwrite=overwrite,
        inputs=[origin.path, *(e.path for e in experts)],
        shard_size=parse_size(str(shard_size)),
    )
    with writer as folder:
        for name, base_tensor, tensors in _operands(origin, experts):
            deltas = _changes(name, base_tensor, tensors, experts)
            if deltas:
                terms = terms_of(name, deltas, str(tensors[0].dtype).removeprefix("torch."))
                residual = residual_of(deltas, terms)
                if terms:
                    folder.add(name, base_tensor, checksum_of(base_tensor), residual, terms)
                dense = sum(t.numel() * t.element_size() for t in tensors)
                rows.append(_row(name, base_tensor, terms, residual, dense))
            else:
                unchanged += 1
            done += sum(t.numel() * t.element_size() for t in (base_tensor, *tensors))
            if progress is not None:
                progress(name, done, total)
        for checkpoint in (origin, *experts):
            checkpoint.check_unchanged()
        folder.commit(
            strategy=strategy,
            options=options,
            base_name=origin.path.resolve().name or "base",
            experts=expert_names([e.path for e in experts]),
            weight=weight,
        )
    dense_bytes = sum(info_of(e, n).n_bytes for e in experts for n in e.tensors)
    return PackReport(
        Path(out),
        rows,
        unchanged,
        writer.n_bytes,
        dense_bytes,
        done,
        time.perf_counter() - started,
    )


def _operands(
    base: Checkpoint, experts: Sequence[Checkpoint]
) -> Iterator[tuple[str, Tensor, list[Tensor]]]:
    for name in base.tensors:
        yield (
            name,
            read_tensor(info_of(base, name)),
            [read_tensor(info_of(e, name)) for e in experts],
        )


def _changes(
    name: str, base: Tensor, tensors: Sequence[Tensor], experts: Sequence[Checkpoint]
) -> list[Tensor]:
    """Return what the models change of a tensor; nothing where all have the base's.

    Raises:
        ConflictError: a tensor that is no floating one, which packs do not change, differs.
    """
    if not base.is_floating_point() or base.element_size() == 1:
        for tensor, expert in zip(tensors, experts, strict=True):
            if tensor.dtype != base.dtype or bytes_of(tensor) != bytes_of(base):
                raise ConflictError(
                    f"{shown(name)} is {base.dtype} and differs in {expert}; packs hold changes of "
                    "floating-point tensors alone"
                )
        return []
    if not base.numel():
        return []
    deltas = [change(base, t, name, e) for t, e in zip(tensors, experts, strict=True)]
    return deltas if any(bool(d.any()) for d in deltas) else []


def residual_of(deltas: Sequence[Tensor], terms: Sequence[Term]) -> float:
    """Return ||change - what terms add up to|| / ||change|| over all models."""
    missed = whole = 0.0
    for expert, delta in enumerate(deltas):
        delta = delta.cpu()
        found = change_of(terms, tuple(delta.shape), expert, delta.element_size() == 8)
        missed += float((delta - found).double().square().sum())
        whole += float(delta.double().square().sum())
    return math.sqrt(missed / whole) if whole else 0.0


def _row(
    name: str, base: Tensor, terms: Sequence[Term], residual: float, dense: int
) -> ModuleReport:
    words = list(dict.fromkeys(_words(term) for term in terms)) or ["left out"]
    return ModuleReport(
        name,
        tuple(base.shape),
        ", ".join(words),
        residual,
        sum(term.n_bytes for term in terms),
        dense,
    )


def _words(term: Term) -> str:
    counts = "".join(f" {n}" for name, n in term.info.numbers.items() if name != "experts")
    return f"{term.info.kind}{counts} {term.info.format}"


def expert_names(paths: Sequence[Path]) -> list[str]:
    """Return a name for each model: its folder's, with a number where two have the same."""
    found: list[str] = []
    for path in paths:
        stem = path.resolve().name or "model"
        name, n = stem, 1
        while name in found:
            n += 1
            name = f"{stem}-{n}"
        found.append(name)
    return found


def check_family(base: Checkpoint, model: Checkpoint) -> None:
    """Raise ConflictError unless two models have tensors of the same names, shapes and types."""
    for name in (*base.tensors, *model.tensors):
        if name not in model.tensors or name not in base.tensors:
            has, lacks = (base, model) if name in base.tensors else (model, base)
            raise ConflictError(
                f"{has} has {shown(name)} but {lacks} does not; a pack needs models of one architecture, "
                "with heads tied in both or in neither"
            )
        b, e = base.tensors[name], model.tensors[name]
        if b.shape != e.shape:
            raise ConflictError(
                f"{shown(name)} is {list(b.shape)} in {base} but {list(e.shape)} in {model}; a pack needs "
                "models of one vocabulary and architecture"
            )
        if b.dtype.is_merged != e.dtype.is_merged:
            raise ConflictError(
                f"{shown(name)} is {b.dtype.torch} in {base} but {e.dtype.torch} in {model}; store both in "
                "one type"
            )
