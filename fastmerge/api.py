"""The whole user surface: merge model folders, plan a merge, merge tensors in memory."""

from __future__ import annotations

import dataclasses
import importlib
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from fastmerge import forecast as _forecast
from fastmerge import ops
from fastmerge.backends import Kernels
from fastmerge.budget import DEVICE_SHARE, Target, default_memory, target_of
from fastmerge.card import Quantisation, hub_id, model_card
from fastmerge.cards import card_of
from fastmerge.checkpoint import HEAD, OutputFolder, companion_files, merged_config, parse_size
from fastmerge.checkpoint.files import read_json_object
from fastmerge.checkpoint.gguf import read_gguf
from fastmerge.dtypes import DType
from fastmerge.engine import Engine, Progress, Report, head_differs
from fastmerge.errors import DeviceError, RecipeError
from fastmerge.evaluate import (
    check_nan_policy,
)
from fastmerge.forecast import Forecast, decomposition_rate
from fastmerge.planner import Plan, make_plan
from fastmerge.processes import Processes
from fastmerge.provenance import MANIFEST, binding, manifest
from fastmerge.quant.gguf import find_gguf, is_gguf
from fastmerge.quant.gguf_tokenizer import tokenizer_files
from fastmerge.quant.quantize import Quantize
from fastmerge.recipe import Recipe, Source, appended, load_recipe
from fastmerge.registry import methods
from fastmerge.streaming import gpus
from fastmerge.streaming.device import Device, TorchDevice
from fastmerge.streaming.sources import Io
from fastmerge.streaming.stopwatch import Stage, Stopwatch
from fastmerge.streaming.trace import Trace, write_chrome_trace
from fastmerge.tensors import merge_state_dicts, merge_tensors
from fastmerge.workers import Assignment, Workers, clock_origin, merge_shared

RecipeLike = str | Path | Mapping[str, Any] | Recipe | Source


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
    device: str | Device | Target = "cpu",
    max_vram: int | str | None = None,
    max_pinned: int | str | None = None,
    backend: str = "cuda",
    quantize: Quantize | str | None = None,
) -> Plan:
    """Decide everything about a merge from the recipe and the inputs' headers, without reading a weight.

    Args:
        recipe: path of a mergekit YAML file, its text, or the same as a mapping.
        out_shard_size: most bytes of one output shard; suffixes k, M, B are decimal, MiB and GiB binary.
        max_memory: most bytes the process may hold; default 40 % of what is free.
        allow_missing: merge a tensor over the inputs that have it instead of calling it a conflict.
        strict: warnings about the recipe or the inputs become conflicts.
        device: where the merge is to run: "cpu"; "cuda", "cuda:1", a GPU of this machine; "cuda:H100" and
            the like, a card that need not be here (see `cards.CARDS`); "cuda:0,cuda:1" or "cuda:all", several
            GPUs, among which tensors and host memory are divided: the plan is that of one of them.
        max_vram, max_pinned: most bytes on the device, default 90 % of what is free there, and of
            page-locked host memory, default what keeps the link busy, at most 4 GiB.
        backend: that runs there; they differ in the memory that they want.
        quantize: how weights are coded, or the name of a format (`fastmerge formats`); None: not at all.
    Returns:
        A `Plan`; `conflicts` lists what stops it, `as_dict()` is plain data.
    Raises:
        RecipeError, CheckpointError: the recipe or an input is wrong in itself.
        DeviceError: there is no such device.
    """
    n = len(gpus.named(device)) if isinstance(device, str) else 1
    return make_plan(
        _recipe(recipe, strict),
        out_shard_size=parse_size(str(out_shard_size)),
        max_memory=_divided(max_memory, n) or default_memory() // n,
        allow_missing=allow_missing,
        strict=strict,
        seed=seed,
        device=_target(device, max_vram, backend),
        max_pinned=_divided(max_pinned, n),
        quantize=Quantize(quantize) if isinstance(quantize, str) else quantize,
    )


def _appended(recipe: RecipeLike, previous: Path) -> Source:
    """Return the recipe with an earlier merge as its first model."""
    if isinstance(recipe, Recipe | Source):
        raise RecipeError("append needs the recipe as it is written: a file, a text or a mapping")
    path = previous / MANIFEST
    known = read_json_object(path, strict=True).get("joined")
    if not isinstance(known, dict) or not {"merged_experts", "merged_lambda"} <= set(known):
        raise RecipeError(
            f"{previous} is no merge that can be gone on with: {MANIFEST} does not say what it holds; "
            "append to one that opcm made"
        )
    return appended(recipe, str(previous), known)


def _divided(size: int | str | None, n: int) -> int | None:
    return None if size is None else parse_size(str(size)) // n


def _target(
    device: str | Device | Target, max_vram: int | str | None, backend: str
) -> Target | None:
    """Return what to plan for; None for the host."""
    most = _divided(max_vram, 1)
    if isinstance(device, Target):
        return dataclasses.replace(device, memory=min(most or device.memory, device.memory))
    if device == "cpu":
        if most is not None:
            raise RecipeError("max-vram is for merges on a device; give --device cuda as well")
        return None
    if isinstance(device, str):
        names = gpus.named(device)
        if (
            len(names) > 1
        ):  # not opened: each worker opens its own, and plans for what is free there
            driver = gpus.driver()
            least = min(driver.total_bytes(gpus.index_of(name)) for name in names)
            target = Target(",".join(names), int(least * DEVICE_SHARE), backend)
            return _target(target, max_vram, backend)
        card = card_of(names[0])
        if card is not None:
            return Target(device, most or int(card.memory * DEVICE_SHARE), backend)
        device = TorchDevice(names[0])
    return target_of(device, most, backend)


def merge(
    recipe: RecipeLike,
    out: str | Path,
    *,
    append: str | Path | None = None,
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
    quantize: Quantize | str | None = None,
    ray: str | None = None,
    trace: str | Path | None = None,
    progress: Progress | None = None,
    on_flops: Callable[[float], None] | None = None,
    on_plan: Callable[[Plan], None] | None = None,
) -> Report:
    """Merge the models of a recipe into the folder `out`.

    Weights go to temporary names, are flushed and renamed when all are done, the index last: `out` never
    holds a half-written file under a final name. What is written is noted in a journal, so that a merge that
    was killed can be finished.

    Args:
        recipe, out_shard_size, max_memory, allow_missing, strict, max_vram, max_pinned, quantize: see
            `plan`.
        append: folder of an earlier merge by a method that takes experts one after the other (opcm): the
            recipe's models are added to it. What it costs does not depend on how many it holds.
        backend: force one backend, by name or its kernels; default: the best that can run.
        device: "cpu"; "cuda" or "cuda:1"; "auto", a GPU if one can be used; "cuda:0,cuda:1" or "cuda:all",
            several, each with a process of its own; or a `streaming.Device`.
        ray: address of a Ray cluster that merges a shard per task; "auto", the one at hand; "local", one that
            is started here. A task asks for `threads` processors (else 1), memory and, with "cuda", a GPU.
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
        on_flops: called with the operations of the decompositions that are done, of `Plan.flops`.
        on_plan: called with the plan before work starts.
    Raises:
        MergeError: anything the caller can mend, in one line.
    """
    check_nan_policy(nan_policy)
    if append is not None:
        recipe = _appended(recipe, Path(append))
    if quantize is not None and nan_policy != "error":
        raise RecipeError("nan_policy propagate has no codes to carry NaN; merge without quantize")
    if "://" in str(out):
        raise RecipeError(
            f"output {str(out)!r} is not a folder; merge into one, then copy it there"
        )
    how = _io(io)
    watch = Stopwatch()
    started = time.perf_counter()
    workers = _workers(device, ray, threads)
    kernels: Kernels | None = None
    if workers is None:
        device = _usable(device, timed=trace is not None)
        on_device = None if isinstance(device, str) else device
        name = on_device.name if on_device else "cpu"
        kernels = (
            ops.choose(name, backend) if backend is None or isinstance(backend, str) else backend
        )
    elif not (backend is None or isinstance(backend, str)):
        raise RecipeError("backend must be a name where other processes merge")
    decided = plan(
        recipe,
        out_shard_size=out_shard_size,
        max_memory=max_memory,
        allow_missing=allow_missing,
        strict=strict,
        seed=seed,
        device=workers.planned if workers else device,
        max_vram=max_vram,
        max_pinned=max_pinned,
        backend=kernels.name if kernels else str(backend or "cuda"),
        quantize=quantize,
    )
    decided.raise_conflicts()
    if workers and any(decided.joins(job) for job in decided.jobs):
        raise RecipeError(
            f"{decided.spec.name} has every tensor wait for all others; merge in one process, on one device"
        )
    watch.add("planning", time.perf_counter() - started)
    from fastmerge import _cpu

    n_threads = _cpu.set_threads(threads)
    if decided.flops and threads:  # kernels and decompositions take turns
        import torch

        torch.set_num_threads(n_threads)
    if on_plan:
        on_plan(decided)
    assert decided.layout is not None
    inputs = tuple(c.path for c in decided.checkpoints)
    adapters = tuple(c.adapter for c in decided.checkpoints)
    bound = binding(decided, nan_policy, parse_size(str(out_shard_size)))
    output = OutputFolder(
        Path(out),
        decided.layout,
        force=force,
        inputs=[*inputs, *filter(None, adapters)],
        binding=bound,
        resume=resume,
        direct=how is not Io.BUFFERED,
        sync=fsync,
    )
    with workers or nullcontext(), output as folder:
        if kernels is None:
            assert workers is not None
            whole = Assignment(
                dataclasses.replace(decided.recipe, found=inputs, adapters=adapters),
                bound,
                Path(out).absolute(),
                decided.max_memory,
                backend=backend if isinstance(backend, str) else None,
                max_vram=_divided(max_vram, 1),
                max_pinned=_divided(max_pinned, workers.n_here),
                strict=strict,
                threads=threads,
                io=how,
                chunk_elements=chunk_elements,
                origin=None if trace is None else clock_origin(),
            )
            report = merge_shared(workers, decided, folder, whole, progress)
        else:
            report = Engine(
                decided,
                kernels,
                folder,
                nan_policy=nan_policy,
                strict=strict,
                io=how,
                chunk_elements=chunk_elements or kernels.chunk_elements,
                progress=progress,
                on_flops=on_flops,
                device=on_device,
                trace=Trace(recording=trace is not None),
            ).run()
        if trace is not None:
            write_chrome_trace(Path(trace), report.spans)
        report.resumed = folder.resumed
        with watch.time("finishing"):
            texts, copies = _companions(
                decided, report, folder, Path(out), copy_tokenizer, write_model_card
            )
            texts[MANIFEST] = manifest(decided, bound, folder, report.joined)
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
            here, whose link is measured; of several, the first, and the others taken to be like it.
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
    devices = gpus.named(device) if isinstance(device, str) else [device]
    first = devices[0]
    card = card_of(first) if isinstance(first, str) else None
    if card is not None:
        rates = _forecast.card_rates(card, read, write)
    else:
        opened = gpus.driver().open(first, False) if isinstance(first, str) else first
        rates = _forecast.measured_rates(opened, read, write)
    rates = dataclasses.replace(rates, one_disk=one_disk)
    return _forecast.forecast(plan, rates.shared_by(len(devices)))


def _workers(device: str | Device, ray: str | None, threads: int) -> Workers | None:
    """Return the processes that a merge is shared among; None: this one merges."""
    if ray is not None:
        # Integrations stand above this module, so this one is loaded by name.
        integration = importlib.import_module("fastmerge.integrations.ray")
        workers: Workers = integration.RayWorkers(ray, device, threads)
        return workers
    names = gpus.named(device) if isinstance(device, str) else []
    return Processes(names) if len(names) > 1 else None


def _usable(device: str | Device, timed: bool) -> str | Device:
    """Return the device to merge on, opened; "cpu" for the host. timed: it is to record its spans."""
    if not isinstance(device, str) or device == "cpu":
        return device
    if device == "auto":
        try:
            return TorchDevice("cuda", timed)
        except DeviceError:
            return "cpu"
    (device,) = gpus.named(device)
    if card_of(device) is not None:
        raise DeviceError(f"device {device!r} is a card to plan for; merge on cuda or cuda:0")
    return TorchDevice(device, timed)


def _io(io: Io | str) -> Io:
    try:
        return Io(io)
    except ValueError:
        raise RecipeError(f"io must be one of {', '.join(Io)}, got {io!r}") from None


def _companions(
    decided: Plan,
    report: Report,
    folder: OutputFolder,
    out: Path,
    copy_tokenizer: bool,
    write_model_card: bool,
) -> tuple[dict[str, bytes], dict[str, Path]]:
    """Everything beside the weights: config, recipe, card; tokenizer and the like from the donor."""
    donor = decided.checkpoints[decided.donor]
    dtypes = [j.out_dtype for j in decided.jobs if j.out_dtype.is_merged]
    main = max(set(dtypes), key=dtypes.count) if dtypes else DType.F32
    texts: dict[str, bytes] = {}
    storage = decided.storage
    in_one_file = decided.quantize is not None and decided.quantize.is_gguf
    if donor.config is not None and not in_one_file:
        tied = bool(donor.config.get("tie_word_embeddings"))
        has_head = any(j.name == HEAD for j in decided.jobs)
        # A tied config would make loaders ignore a merged head of its own.
        untie = tied and has_head and head_differs(decided, folder)
        described = None
        if storage is not None and storage.format is not None and storage.model is not None:
            described = storage.format.config(storage.model)
            texts |= storage.format.files(storage.model)
        texts["config.json"] = merged_config(
            donor.config, main, False if untie else None, described
        )
    copies: dict[str, Path] = {}
    if copy_tokenizer and not in_one_file:
        if is_gguf(donor.path):
            files, warnings = tokenizer_files(read_gguf(find_gguf(donor.path)))
            texts |= files
            report.warnings += warnings
        else:
            copies = companion_files(donor.path)
    copies = {name: path for name, path in copies.items() if name not in texts}
    if write_model_card:
        texts["mergekit_config.yml"] = decided.recipe.text.encode()
        refs = [i.ref for i in decided.recipe.inputs]
        names = [(r.path, r.lora.path if r.lora else None) for r in refs]
        bases = [hub_id(r.path, c.config) for c, r in zip(decided.checkpoints, refs, strict=True)]
        bases += [hub_id(adapter) for _, adapter in names if adapter]
        texts["README.md"] = model_card(
            title=out.resolve().name,
            recipe_text=decided.recipe.text,
            method_title=decided.spec.title,
            method_paper=decided.spec.paper,
            base_models=[b for b in dict.fromkeys(bases) if b],
            inputs=names,
            dtype=main.torch,
            quantisation=_quantisation(decided, report),
        ).encode()
    return texts, copies


def _quantisation(decided: Plan, report: Report) -> Quantisation | None:
    """Return what the model card says of coded weights."""
    if decided.quantize is None:
        return None
    rows = [
        (j.name, j.stored.coding, report.residuals.get(j.name))
        for j in decided.coded
        if j.stored is not None
    ]
    return Quantisation(decided.quantize.format, decided.bits_per_weight, rows)


__all__ = [
    "Quantize",
    "decomposition_rate",
    "forecast",
    "merge",
    "merge_state_dicts",
    "merge_tensors",
    "methods",
    "plan",
]
