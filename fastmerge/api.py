"""The whole user surface: merge model folders, plan a merge, merge tensors in memory."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastmerge import forecast as _forecast
from fastmerge import ops
from fastmerge.backends import Chunk, Kernels
from fastmerge.budget import DEVICE_SHARE, Target
from fastmerge.card import hub_id, model_card
from fastmerge.cards import card_of
from fastmerge.checkpoint import OutputFolder, companion_files, merged_config, parse_size
from fastmerge.dtypes import DType
from fastmerge.engine import Engine, Progress, Report, head_differs
from fastmerge.errors import (
    ConflictError,
    DeviceError,
    DeviceMemoryError,
    NonFiniteError,
    RecipeError,
)
from fastmerge.evaluate import (
    ModelTensor,
    Operands,
    Ranges,
    first_nonfinite,
    resolve,
    resolve_model,
    run_walks,
)
from fastmerge.forecast import Forecast
from fastmerge.planner import HEAD, Plan, make_plan
from fastmerge.provenance import MANIFEST, binding, manifest
from fastmerge.recipe import Recipe, keyword_params, load_recipe
from fastmerge.registry import MethodSpec, Params, Scope, TensorContext, get, methods
from fastmerge.stages import Copy, GivenMask, Grain, Walk
from fastmerge.streaming.device import Device, TorchDevice
from fastmerge.streaming.sources import Io
from fastmerge.streaming.stopwatch import Stage, Stopwatch
from fastmerge.streaming.trace import Trace, write_chrome_trace

RecipeLike = str | Path | Mapping[str, Any] | Recipe


def _recipe(recipe: RecipeLike, strict: bool) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe, strict=strict)


def plan(
    recipe: RecipeLike,
    *,
    out_shard_size: int | str = "5B",
    max_memory: int | str | None = None,
    allow_missing: bool = False,
    strict: bool = False,
    seed: int = 0,
    device: str | Device = "cpu",
    max_vram: int | str | None = None,
    max_pinned: int | str | None = None,
    backend: str = "cuda",
) -> Plan:
    """Decide everything about a merge from the recipe and the inputs' headers, without reading a weight.

    Args:
        recipe: path of a mergekit YAML file, its text, or the same as a mapping.
        out_shard_size: most bytes of one output shard; suffixes k, M, B are decimal, MiB and GiB binary.
        max_memory: most bytes the process may hold; default 40 % of what is free.
        allow_missing: merge a tensor over the inputs that have it instead of calling it a conflict.
        strict: warnings about the recipe or the inputs become conflicts.
        device: where the merge is to run: "cpu"; "cuda", "cuda:1", a GPU of this machine; "cuda:H100" and
            the like, a card that need not be here (see `cards.CARDS`).
        max_vram, max_pinned: most bytes on the device, default 90 % of what is free there, and of
            page-locked host memory, default what keeps the link busy, at most 4 GiB.
        backend: that runs there; they differ in the memory that they want.
    Returns:
        A `Plan`; `conflicts` lists what stops it, `as_dict()` is plain data.
    Raises:
        RecipeError, CheckpointError: the recipe or an input is wrong in itself.
        DeviceError: there is no such device.
    """
    pinned = None if max_pinned is None else parse_size(str(max_pinned))
    return make_plan(
        _recipe(recipe, strict),
        out_shard_size=parse_size(str(out_shard_size)),
        max_memory=None if max_memory is None else parse_size(str(max_memory)),
        allow_missing=allow_missing,
        strict=strict,
        seed=seed,
        device=_target(device, max_vram, backend),
        max_pinned=pinned,
    )


def _target(device: str | Device, max_vram: int | str | None, backend: str) -> Target | None:
    """Return what to plan for; None for the host."""
    most = None if max_vram is None else parse_size(str(max_vram))
    if device == "cpu":
        if most is not None:
            raise RecipeError("max-vram is for merges on a device; give --device cuda as well")
        return None
    if isinstance(device, str):
        card = card_of(device)
        if card is not None:
            return Target(device, most or int(card.memory * DEVICE_SHARE), backend)
        device = TorchDevice(device)
    free = int(device.free_bytes() * DEVICE_SHARE)
    if most is not None and most > free:
        raise DeviceMemoryError(
            f"max-vram of {most >> 20} MiB is more than {device.name} has free, {free >> 20} MiB; "
            "lower it or free the device"
        )
    return Target(device.name, most or free, backend)


def merge(
    recipe: RecipeLike,
    out: str | Path,
    *,
    backend: str | Kernels | None = None,
    force: bool = False,
    resume: bool = False,
    out_shard_size: int | str = "5B",
    max_memory: int | str | None = None,
    allow_missing: bool = False,
    strict: bool = False,
    seed: int = 0,
    nan_policy: str = "error",
    copy_tokenizer: bool = True,
    write_model_card: bool = True,
    threads: int = 0,
    io: Io | str = Io.AUTO,
    fsync: bool = True,
    chunk_elements: int | None = None,
    device: str | Device = "cpu",
    max_vram: int | str | None = None,
    max_pinned: int | str | None = None,
    trace: str | Path | None = None,
    progress: Progress | None = None,
    on_plan: Callable[[Plan], None] | None = None,
) -> Report:
    """Merge the models of a recipe into the folder `out`.

    Weights go to temporary names, are flushed and renamed when all are done, the index last: `out` never
    holds a half-written file under a final name. What is written is noted in a journal, so that a merge that
    was killed can be finished.

    Args:
        recipe, out_shard_size, max_memory, allow_missing, strict, max_vram, max_pinned: see `plan`.
        backend: force one backend, by name or its kernels; default: the best that can run.
        device: "cpu"; "cuda" or "cuda:1"; "auto", a GPU if one can be used; or a `streaming.Device`.
        force: replace the model in a non-empty `out`; a killed merge there is started again.
        resume: finish the killed merge in `out`, of the same recipe, inputs and options; without one, start.
        seed: of the random drops; a draw depends on (seed, tensor, expert, element) alone.
        nan_policy: error refuses NaN and infinity in inputs, propagate carries them through.
        threads: of the kernels; 0 takes what the process may use.
        io: how bytes move, see `sources.Io`; results do not depend on it.
        fsync: wait for the disk before the folder becomes a model. Without, a power cut soon afterwards may
            leave wrong bytes; a killed process never does.
        chunk_elements: elements of one kernel call; results do not depend on it.
        trace: file to write what ran when to, in Chrome's trace format.
        progress: called with (tensor name, bytes done, bytes in all).
        on_plan: called with the plan before work starts.
    Raises:
        MergeError: anything the caller can mend, in one line.
    """
    _check_nan_policy(nan_policy)
    how = _io(io)
    watch = Stopwatch()
    started = time.perf_counter()
    device = _usable(device, timed=trace is not None)
    on_device = None if isinstance(device, str) else device
    name = on_device.name if on_device else "cpu"
    kernels = ops.choose(name, backend) if backend is None or isinstance(backend, str) else backend
    decided = plan(
        recipe,
        out_shard_size=out_shard_size,
        max_memory=max_memory,
        allow_missing=allow_missing,
        strict=strict,
        seed=seed,
        device=device,
        max_vram=max_vram,
        max_pinned=max_pinned,
        backend=kernels.name,
    )
    decided.raise_conflicts()
    watch.add("planning", time.perf_counter() - started)
    from fastmerge import _cpu

    _cpu.set_threads(threads)
    if on_plan:
        on_plan(decided)
    assert decided.layout is not None
    inputs = [c.path for c in decided.checkpoints]
    bound = binding(decided, nan_policy, parse_size(str(out_shard_size)))
    output = OutputFolder(
        Path(out),
        decided.layout,
        force=force,
        inputs=inputs,
        binding=bound,
        resume=resume,
        direct=how is not Io.BUFFERED,
        sync=fsync,
    )
    with output as folder:
        engine = Engine(
            decided,
            kernels,
            folder,
            nan_policy=nan_policy,
            strict=strict,
            io=how,
            chunk_elements=chunk_elements or kernels.chunk_elements,
            progress=progress,
            device=on_device,
            trace=Trace(recording=trace is not None),
        )
        report = engine.run()
        if trace is not None:
            write_chrome_trace(Path(trace), report.spans)
        report.resumed = folder.resumed
        with watch.time("finishing"):
            texts, copies = _companions(
                decided, folder, Path(out), copy_tokenizer, write_model_card
            )
            texts[MANIFEST] = manifest(decided, bound, folder)
            folder.commit(texts, copies)
    first, last = (Stage(name, watch.seconds[name]) for name in ("planning", "finishing"))
    report.stages = [first, *report.stages, last]
    report.warnings = decided.warnings + report.warnings
    return report


def forecast(
    plan: Plan,
    device: str | Device,
    *,
    read_rate: int | str | None = None,
    write_rate: int | str | None = None,
    one_disk: bool = False,
) -> Forecast:
    """Say how long a merge that was planned for a device takes, by stage, and what limits it.

    Args:
        device: what the plan was made for: a known card, whose nominal figures are taken, or one that is
            here, whose link is measured.
        read_rate, write_rate: bytes per second of the disks; by default the inputs' is measured where they
            are, and the output's taken to be the same.
        one_disk: reads and writes share the rate of reading.
    """
    if read_rate is None:
        read = _forecast.read_rate(plan), "measured here"
    else:
        read = float(parse_size(str(read_rate))), "given"
    write = read[0], "taken to be as reading"
    if write_rate is not None:
        write = float(parse_size(str(write_rate))), "given"
    card = card_of(device) if isinstance(device, str) else None
    if card is not None:
        rates = _forecast.card_rates(card, read, write)
    else:
        opened = TorchDevice(device) if isinstance(device, str) else device
        rates = _forecast.measured_rates(opened, read, write)
    return _forecast.forecast(plan, dataclasses.replace(rates, one_disk=one_disk))


def _usable(device: str | Device, timed: bool) -> str | Device:
    """Return the device to merge on, opened; "cpu" for the host. timed: it is to record its spans."""
    if not isinstance(device, str) or device == "cpu":
        return device
    if device == "auto":
        try:
            return TorchDevice("cuda", timed)
        except DeviceError:
            return "cpu"
    if card_of(device) is not None:
        raise DeviceError(f"device {device!r} is a card to plan for; merge on cuda or cuda:0")
    return TorchDevice(device, timed)


def _io(io: Io | str) -> Io:
    try:
        return Io(io)
    except ValueError:
        raise RecipeError(f"io must be one of {', '.join(Io)}, got {io!r}") from None


def _check_nan_policy(nan_policy: str) -> None:
    if nan_policy not in ("error", "propagate"):
        raise RecipeError(f"nan_policy must be error or propagate, got {nan_policy!r}")


def _companions(
    decided: Plan, folder: OutputFolder, out: Path, copy_tokenizer: bool, write_model_card: bool
) -> tuple[dict[str, bytes], dict[str, Path]]:
    """Everything beside the weights: config, recipe, card; tokenizer and the like from the donor."""
    donor = decided.checkpoints[decided.donor]
    dtypes = [j.out_dtype for j in decided.jobs if j.out_dtype.is_merged]
    main = max(set(dtypes), key=dtypes.count) if dtypes else DType.F32
    texts: dict[str, bytes] = {}
    if donor.config is not None:
        tied = bool(donor.config.get("tie_word_embeddings"))
        has_head = any(j.name == HEAD for j in decided.jobs)
        # A tied config would make loaders ignore a merged head of its own.
        untie = tied and has_head and head_differs(decided, folder)
        texts["config.json"] = merged_config(donor.config, main, False if untie else None)
    copies = companion_files(donor.path) if copy_tokenizer else {}
    copies = {name: path for name, path in copies.items() if name not in texts}
    if write_model_card:
        texts["mergekit_config.yml"] = decided.recipe.text.encode()
        names = [str(i.ref) for i in decided.recipe.inputs]
        bases = [hub_id(n, c.config) for c, n in zip(decided.checkpoints, names, strict=True)]
        texts["README.md"] = model_card(
            title=out.resolve().name,
            recipe_text=decided.recipe.text,
            method_title=decided.spec.title,
            method_paper=decided.spec.paper,
            base_models=[b for b in dict.fromkeys(bases) if b],
            inputs=names,
            dtype=main.torch,
        ).encode()
    return texts, copies


# ---- tensors in memory -----------------------------------------------------------------------------


def _spec_operands(
    spec: MethodSpec, base: Any | None, experts: Sequence[Any]
) -> tuple[Any | None, list[Any]]:
    """Return (delta base, recipe operands) for a method."""
    operands = list(experts)
    delta_base = base
    if spec.base_is_operand:
        delta_base = None
        if base is not None:
            operands = [base, *operands] if spec.base == "required" else [*operands, base]
    elif spec.base == "ignored":
        delta_base = None
    return delta_base, operands


def merge_tensors(
    base: ops.Tensor | None,
    experts: Sequence[ops.Tensor],
    *,
    method: str,
    backend: str | None = None,
    seed: int = 0,
    name: str = "tensor",
    masks: Sequence[Any] | None = None,
    nan_policy: str = "error",
    chunk_elements: int | None = None,
    **params: Any,
) -> ops.Tensor:
    """Merge one tensor of several models.

    Args:
        base: [...] float16, bfloat16, float32 or float64 torch tensor or numpy array, or None where
            the method allows it.
        experts: n_experts tensors of base's shape, on its device; any mix of types; strided ones are copied.
            Tensors on a GPU are merged there, on torch's current stream.
        method: a name from `methods()`; params: its parameters, per-expert ones as one value or a list.
        seed, name: of the random drops; the same name and seed give the mask that a file merge draws.
        masks: keep masks instead of random draws, one per expert, nonzero keeps.
        nan_policy: error refuses NaN and infinity in the operands, propagate carries them through.
    Returns:
        Same kind, shape and device; dtype of base, or of the first expert.
    Raises:
        RecipeError: unknown method or parameter, value out of bounds. ConflictError: shapes or dtypes.
        NonFiniteError: NaN or infinity in an operand; names it and the first flat index.
    """
    merged = merge_state_dicts(
        None if base is None else {name: base},
        [{name: e} for e in experts],
        method=method,
        backend=backend,
        seed=seed,
        masks=None if masks is None else {name: masks},
        nan_policy=nan_policy,
        chunk_elements=chunk_elements,
        **params,
    )
    return merged[name]


def merge_state_dicts(
    base: Mapping[str, ops.Tensor] | None,
    experts: Sequence[Mapping[str, ops.Tensor]],
    *,
    method: str,
    backend: str | None = None,
    seed: int = 0,
    masks: Mapping[str, Sequence[Any]] | None = None,
    nan_policy: str = "error",
    chunk_elements: int | None = None,
    **params: Any,
) -> dict[str, ops.Tensor]:
    """Merge whole state dicts in memory; see `merge_tensors`. All must hold the same names."""
    _check_nan_policy(nan_policy)
    spec = get(method)
    delta_base, operands = _spec_operands(spec, base, experts)
    resolved = keyword_params(spec, len(operands), base is not None, params)
    first = operands[0] if delta_base is None else delta_base
    jobs: list[tuple[str, ModelTensor, Operands, Any]] = []
    n_model = sum(math.prod(t.shape) for t in first.values())
    device = "cpu"
    for key in sorted(first):
        like = first[key]
        buffers = _buffers(key, delta_base, operands)
        shape = tuple(like.shape)
        given = GivenMask(masks[key]) if masks and key in masks else None
        context = TensorContext(
            key, shape, len(operands), delta_base is not None, seed, n_model, given
        )
        cols = max(1, shape[-1]) if shape else 1
        wide = any(b.dtype is DType.F64 for b in buffers)
        compute = DType.F64 if wide else DType.F32
        if jobs and buffers[0].device != device:
            raise ConflictError(
                f"{jobs[0][0]!r} is on {device} but {key!r} on {buffers[0].device}; "
                "merge the tensors of each device on their own"
            )
        device = buffers[0].device
        origin = buffers.pop(0) if delta_base is not None else None
        tensor = ModelTensor(resolved, context, cols, compute)
        jobs.append((key, tensor, Operands(origin, buffers, cols, compute), like))
    kernels = ops.choose(device, backend)
    limit = chunk_elements or kernels.chunk_elements
    walks = _walks(kernels, spec, resolved, jobs, limit)
    kernels = ops.choose(device, backend, walks)
    out = {
        key: ops.empty_like(like, (held.base or held.experts[0]).dtype)
        for key, _, held, like in jobs
    }
    bad = run_walks(
        kernels,
        [
            (walk, held, ops.buffer_of(out[key], key))
            for (key, _, held, _), walk in zip(jobs, walks, strict=True)
        ],
        limit,
    )
    for (key, _, held, _), found in zip(jobs, bad, strict=True):
        if found and nan_policy == "error":
            _refuse_nonfinite(key, held)
    return {key: out[key] for key in first}


def _walks(
    kernels: Any,
    spec: MethodSpec,
    params: Params,
    jobs: Sequence[tuple[str, ModelTensor, Operands, Any]],
    limit: int,
) -> list[Walk | Copy]:
    if spec.scope_for(params) is not Scope.MODEL:
        return [resolve(kernels, spec, params, t.context, o, limit) for _, t, o, _ in jobs]

    def visit(
        feed: Callable[[int, Chunk], None], wanted: Mapping[int, Ranges], size: Grain
    ) -> None:
        for t in sorted(wanted):
            held, ranges = jobs[t][2], wanted[t]
            for a, b in ((0, held.n),) if ranges is None else ranges:
                for _, chunk in held.slice(a, b).chunks(size, limit):
                    feed(t, chunk)

    return resolve_model(kernels, spec, [t for _, t, _, _ in jobs], visit)


def _refuse_nonfinite(key: str, held: Operands) -> None:
    labels = (["base"] if held.base else []) + [f"experts[{k}]" for k in range(len(held.experts))]
    for label, buffer in zip(labels, held.operands, strict=True):
        index = first_nonfinite(buffer)
        if index is not None:
            raise NonFiniteError(
                f"{key!r} of {label} holds NaN or infinity at flat index {index}; "
                "mend it or give nan_policy='propagate'"
            )


def _buffers(key: str, base: Any | None, operands: Sequence[Any]) -> list[Any]:
    everything = ([] if base is None else [base]) + list(operands)
    labels = ([] if base is None else ["base"]) + [f"experts[{k}]" for k in range(len(operands))]
    buffers = []
    for label, state in zip(labels, everything, strict=True):
        if key not in state:
            raise ConflictError(f"{key!r} is missing in {label}")
        if tuple(state[key].shape) != tuple(everything[0][key].shape):
            raise ConflictError(
                f"{key!r} is {list(everything[0][key].shape)} in {labels[0]} but "
                f"{list(state[key].shape)} in {label}"
            )
        buffers.append(ops.buffer_of(state[key], f"{key!r} of {label}"))
    ops.one_device(buffers, [f"{key!r} of {label}" for label in labels])
    return buffers


__all__ = ["forecast", "merge", "merge_state_dicts", "merge_tensors", "methods", "plan"]
