"""How the results of a merge are stored: coded or dense, under which names, in which files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastmerge.checkpoint import Checkpoint, Layout, OutputTensor, plan_layout
from fastmerge.checkpoint.gguf import read_gguf
from fastmerge.coding import Coding, Format, needs_peak
from fastmerge.dtypes import DType
from fastmerge.errors import RecipeError
from fastmerge.jobs import Action, Stored, TensorJob
from fastmerge.quant.format import Constant, OutFormat, Part, Quantised
from fastmerge.quant.formats import FORMATS, output_format
from fastmerge.quant.gguf import find_gguf, is_gguf
from fastmerge.quant.gguf_formats import GGUF_FORMATS
from fastmerge.quant.gguf_tokenizer import tokenizer_metadata
from fastmerge.quant.gguf_writer import (
    GgufTarget,
    copied_metadata,
    gguf_constants,
    gguf_layout,
    gguf_metadata,
    gguf_targets,
)
from fastmerge.quant.hessians import Hessians, refuse_unless_rounded
from fastmerge.quant.modules import shares_scale
from fastmerge.quant.policy import choose
from fastmerge.quant.quantize import Quantize


@dataclass(frozen=True)
class Storage:
    """How a merge's jobs are stored, and where.

    model:    what the format's configuration is made from; None for GGUF and for dense models.
    warnings: for the user. hessians: that weights are rounded with.
    """

    jobs: list[TensorJob]
    layout: Layout
    format: OutFormat | None = None
    model: Quantised | None = None
    warnings: tuple[str, ...] = ()
    hessians: Hessians | None = None


def store(
    jobs: Sequence[TensorJob], donor: Checkpoint, shard_size: int, quantize: Quantize | None
) -> Storage:
    """Decide how each job is stored and lay the files out.

    Raises:
        RecipeError: an unknown format, or rules that no folder can hold.
        CheckpointError: a model that the format's container cannot describe.
    """
    if quantize is None:
        return Storage(list(jobs), _layout(jobs, shard_size))
    if quantize.is_gguf:
        return _store_gguf(jobs, donor, quantize)
    if quantize.format not in FORMATS:
        known = ", ".join([*FORMATS, *GGUF_FORMATS])
        raise RecipeError(f"no format is called {quantize.format!r}; known are {known}")
    return _store_coded(jobs, donor, shard_size, quantize)


def _store_coded(
    jobs: Sequence[TensorJob], donor: Checkpoint, shard_size: int, quantize: Quantize
) -> Storage:
    format = output_format(quantize.format)
    config = donor.config or {}
    shapes = {j.name: j.shape for j in jobs if j.action is not Action.COPY_EQUAL}
    choice = choose(shapes, config, format, quantize.rules)
    hessians = None
    if quantize.hessians is not None:
        refuse_unless_rounded(format.name, format.coding(DType.F32, (128, 128)))
        hessians = Hessians.open(Path(quantize.hessians))
    stored = [_coded(job, choice.formats.get(job.name), quantize, hessians) for job in jobs]
    coded = {j.name: j.stored.coding for j in stored if j.stored}
    if not coded:
        raise RecipeError(
            f"no weight is left to be stored as {format.name}; every matrix is kept or does not fit"
        )
    dense = [j.out_dtype for j in jobs if j.out_dtype.is_merged]
    model = Quantised(coded, choice.kept, config, max(set(dense), key=dense.count))
    layout = _layout(stored, shard_size)
    warnings = list(choice.warnings)
    if hessians is not None:
        used = [j.stored.hessian for j in stored if j.stored and j.stored.hessian]
        warnings += hessians.check_used(format.name, used)
    return Storage(stored, layout, format, model, tuple(warnings), hessians)


def _coded(
    job: TensorJob, format: OutFormat | None, quantize: Quantize, hessians: Hessians | None
) -> TensorJob:
    if format is None:
        return job
    dtype = _rounded_to(job, quantize)
    coding = quantize.adapted(format.coding(dtype, job.shape))
    stored = Stored(
        format,
        coding,
        tuple(format.parts(job.name, job.shape, coding)),
        tuple(format.constants(job.name, job.shape, coding)),
        shares_scale(job.name) if needs_peak(coding) and coding.format is Format.NVFP4 else None,
        hessians.of(job.name, job.shape, coding) if hessians else None,
    )
    return replace(job, stored=stored)


def _rounded_to(job: TensorJob, quantize: Quantize) -> DType:
    """Return what values are rounded to first: float64 has no codes of its own."""
    dtype = quantize.dtype or job.out_dtype
    return DType.F32 if dtype is DType.F64 else dtype


def _layout(jobs: Sequence[TensorJob], shard_size: int) -> Layout:
    tensors = []
    for job in jobs:
        if job.stored is None:
            tensors.append(OutputTensor(job.name, job.out_dtype, job.shape))
            continue
        held: Sequence[Part | Constant] = [*job.stored.parts, *job.stored.constants]
        tensors += [OutputTensor(t.name, t.dtype, t.shape, group=job.name) for t in held]
    return plan_layout(tensors, shard_size)


# ---- GGUF --------------------------------------------------------------------------------------------


def _store_gguf(jobs: Sequence[TensorJob], donor: Checkpoint, quantize: Quantize) -> Storage:
    what = GGUF_FORMATS[quantize.format]
    if quantize.hessians is not None:
        refuse_unless_rounded(quantize.format, None)
    floats = [j for j in jobs if j.action is not Action.COPY_EQUAL]
    shapes = {j.name: j.shape for j in floats}
    targets = gguf_targets(donor.config, shapes, what, dtype=quantize.dtype)
    metadata, warnings = _metadata(donor, what)
    constants = gguf_constants(donor.config) if donor.config else ()
    shard = gguf_layout(metadata, targets, shapes, constants)
    places = shard.tensors
    stored = [
        replace(
            j, stored=_in_gguf(j, targets[j.name], places[targets[j.name].name].shape, quantize)
        )
        for j in floats
        if j.name in targets
    ]
    total = sum(t.n_bytes for t in places.values())
    return Storage(stored, Layout([shard], None, total), warnings=tuple(warnings))


def _in_gguf(
    job: TensorJob, target: GgufTarget, shape: tuple[int, ...], quantize: Quantize
) -> Stored:
    coding: Coding = quantize.adapted(target.coding)
    if coding.format is Format.DENSE:
        dtype = coding.dtype
    else:
        coding, dtype = replace(coding, dtype=_rounded_to(job, quantize)), DType.U8
    return Stored(None, coding, (Part("codes", target.name, dtype, shape),))


def _metadata(donor: Checkpoint, what: Format | DType) -> tuple[Mapping[str, Any], list[str]]:
    name = donor.path.resolve().name
    if is_gguf(donor.path):
        return copied_metadata(read_gguf(find_gguf(donor.path)), donor.config, what, name=name)
    config = donor.config or {}
    tokenizer, warnings = tokenizer_metadata(Path(donor.path), int(config.get("vocab_size", 0)))
    metadata, more = gguf_metadata(config, what, tokenizer, name=name)
    return metadata, [*warnings, *more]


__all__ = ["Storage", "store"]
