"""Several LoRA adapters made into one, module by module, without their base."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmerge.checkpoint import Adapter, TensorInfo, read_adapter
from fastmerge.checkpoint.adapter import ADAPTER_CONFIG
from fastmerge.checkpoint.coded import LowRank
from fastmerge.checkpoint.files import read_json_object
from fastmerge.checkpoint.wording import place, shown
from fastmerge.dtypes import DType, promote
from fastmerge.errors import ConflictError, NonFiniteError, RecipeError
from fastmerge.linalg import Term, factored_svd
from fastmerge.linalg.randomized import squared_distance, squared_norm
from fastmerge.lora.combine import Combined, Part, Rule, combine
from fastmerge.lora.folder import Factors, factor_type, new_adapter, stored, write_adapter
from fastmerge.lora.report import LoraReport, ModuleResult
from fastmerge.stored_tensors import Progress, bytes_of, read_tensor

if TYPE_CHECKING:
    from torch import Tensor


def merge_adapters(
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | float,
    combination: str = "svd",
    rank: int | None = None,
    density: float | None = None,
    majority_sign: str = "total",
    scaling_power: int = 1,
    dtype: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> LoraReport:
    """Merge LoRA adapters into one, as peft's add_weighted_adapter does, without the model.

    Args:
        adapters: folders as peft saves them, of one base. Modules that only some have are merged over those.
        weights: one for each adapter, of any sign, or one for all.
        combination: svd, linear, cat, ties_svd, dare_linear_svd, dare_ties_svd, magnitude_prune_svd, ties,
            dare_linear, dare_ties or magnitude_prune; see `lora.combine.combine`.
        rank: of the result, for the kinds that end in svd; default: the largest of the adapters'.
        density: the share of values kept, for the kinds that trim or drop, (0, 1].
        majority_sign: what elects a sign: total (sum of values) or frequency (their count).
        scaling_power: 2 for what peft computed before it applied alpha / r once.
        dtype: of the factors; default: what holds those of all adapters.
        seed: of random drops and of decompositions.
        overwrite: replace an adapter that is in `out`.
        progress: called with (module, bytes done, bytes in all).
    Returns:
        Rank and residual of each module: against sum_t c_t B_t A_t for svd, linear and cat, against what the
        rule makes of dense changes for the other kinds that end in svd.
    Raises:
        RecipeError: options. CheckpointError: a folder. ConflictError: adapters that do not fit together.
        NonFiniteError: a factor holds NaN or infinity.
    """
    started = time.perf_counter()
    rule = Rule(combination, rank, density, majority_sign, scaling_power, seed)
    if isinstance(adapters, str | Path):
        raise RecipeError(f"adapters must be a list of folders, got {shown(str(adapters))}")
    opened = [read_adapter(p) for p in adapters]
    if not opened:
        raise RecipeError("no adapter is given; name one at least")
    coefficients = _weights(weights, len(opened))
    report = LoraReport(Path(out))
    factors: dict[str, Factors] = {}
    total = sum(_n_bytes(low) for adapter in opened for low in adapter.low_rank.values())
    with new_adapter(out, overwrite=overwrite, inputs=[a.path for a in opened]) as folder:
        whole = _whole(opened, report)
        for module in dict.fromkeys(m for adapter in opened for m in adapter.low_rank):
            having = [
                (a, w) for a, w in zip(opened, coefficients, strict=True) if module in a.low_rank
            ]
            _check_module(module, having, whole)
            kept_as = (
                promote([a.low_rank[module].a.dtype for a, _ in having])
                if dtype is None
                else factor_type(dtype)
            )
            parts = [_part(module, a, w) for a, w in having]
            report.bytes_read += sum(_n_bytes(a.low_rank[module]) for a, _ in having)
            result = _result(module, parts, rule, kept_as, report)
            if result is not None:
                factors[module] = result
            if progress is not None:
                progress(module, report.bytes_read, total)
        if not factors:
            raise ConflictError("the adapters add up to nothing; check the weights")
        for adapter in opened:
            for known in adapter.identities:
                known.check_unchanged()
        configs = [
            read_json_object(adapter.path / ADAPTER_CONFIG, strict=True) for adapter in opened
        ]
        report.bytes_written = write_adapter(
            folder.hidden,
            factors,
            whole,
            set(factors) if report.skipped else _targets(configs, factors),
            _settings(configs, report),
        )
        folder.commit()
    report.seconds = time.perf_counter() - started
    return report


def _weights(weights: Sequence[float] | float, n: int) -> list[float]:
    given = [weights] * n if isinstance(weights, int | float) else weights
    try:
        if isinstance(given, str):  # of which each letter would be a weight
            raise TypeError
        found = [float(w) for w in given]
    except (TypeError, ValueError):
        raise RecipeError(
            f"weights must be a number or a list of numbers, got {weights!r}"
        ) from None
    if len(found) != n:
        raise RecipeError(f"{len(found)} weights are given for {n} adapters; give one each, or one")
    for k, weight in enumerate(found):
        if not math.isfinite(weight):
            raise RecipeError(f"weights[{k}] must be a finite number, got {weight}")
    return found


def _n_bytes(low: LowRank) -> int:
    return low.a.n_bytes + low.b.n_bytes


def _check_module(
    module: str, having: Sequence[tuple[Adapter, float]], whole: Mapping[str, Tensor]
) -> None:
    """Raise ConflictError unless the adapters adapt the same weight, and none replaces it."""
    first = having[0][0]
    shape = _shape(first.low_rank[module])
    for adapter, _ in having[1:]:
        other = _shape(adapter.low_rank[module])
        if other != shape:
            raise ConflictError(
                f"{shown(module)} is {list(shape)} in {place(first.path)} but {list(other)} in "
                f"{place(adapter.path)}; give adapters of one base"
            )
    if f"{module}.weight" in whole:
        raise ConflictError(
            f"{shown(module)} has factors in {place(first.path)} and is replaced by another adapter; merge "
            "models with `fastmerge merge` and BASE+ADAPTER instead"
        )


def _shape(low: LowRank) -> tuple[int, int]:
    return low.b.shape[0], low.a.shape[1]


def _part(module: str, adapter: Adapter, weight: float) -> Part:
    low = adapter.low_rank[module]
    return Part(_finite(low.a), _finite(low.b), low.scale, weight)


def _finite(info: TensorInfo) -> Tensor:
    tensor = read_tensor(info)
    if not bool(tensor.isfinite().all()):
        index = int(tensor.reshape(-1).isfinite().logical_not().nonzero()[0])
        raise NonFiniteError(
            f"{place(info.file)}: tensor {shown(info.name)} holds NaN or infinity at flat index {index}; "
            "leave that adapter out"
        )
    return tensor


def _result(
    module: str, parts: Sequence[Part], rule: Rule, dtype: DType, report: LoraReport
) -> Factors | None:
    """Return the factors as stored, and add them to the report; None where nothing is left."""
    combined = combine(parts, rule, module)
    shape = (len(parts[0].b), parts[0].a.shape[1])
    if not bool(combined.factors.a.any()) or not bool(combined.factors.b.any()):
        report.skipped[module] = "the weighted sum is zero"
        return None
    factors = stored(module, combined.factors, dtype)
    norm, residual = _residual(combined, factors)
    report.modules.append(ModuleResult(module, shape, len(factors.a), norm, residual))
    return factors


def _residual(combined: Combined, factors: Factors) -> tuple[float | None, float | None]:
    """Return the norm of the wanted change and what the stored factors miss of it, as a share."""
    wanted = combined.wanted
    if wanted is None:
        return None, None
    if isinstance(wanted, list):
        norm = factored_svd(wanted).norm
        missed = factored_svd([*wanted, Term(-1.0, factors.b, factors.a)]).norm
    else:
        norm = math.sqrt(squared_norm(wanted))
        missed = math.sqrt(
            squared_distance(wanted, factors.b.to(wanted.dtype), factors.a.to(wanted.dtype))
        )
    return norm, missed / norm if norm else None


def _whole(adapters: Sequence[Adapter], report: LoraReport) -> dict[str, Tensor]:
    """Return the tensors that adapters hold in place of the model's.

    Raises:
        ConflictError: two adapters hold different ones.
    """
    found: dict[str, tuple[Adapter, Tensor]] = {}
    for adapter in adapters:
        for name, info in adapter.whole.items():
            tensor = read_tensor(info)
            report.bytes_read += info.n_bytes
            first, held = found.setdefault(name, (adapter, tensor))
            if held.dtype != tensor.dtype or bytes_of(held) != bytes_of(tensor):
                raise ConflictError(
                    f"{place(first.path)} and {place(adapter.path)} both replace {shown(name)}, by different "
                    "values, which no combination defines; merge models with `fastmerge merge` and "
                    "BASE+ADAPTER instead"
                )
    report.saved += found
    if found and len(adapters) > 1:
        report.warnings.append(
            f"{len(found)} tensors that adapters hold whole ({shown(next(iter(found)))}, ...) are taken as "
            "they are, not weighted"
        )
    return {name: tensor for name, (_, tensor) in found.items()}


def _targets(configs: Sequence[Mapping[str, Any]], modules: Mapping[str, Factors]) -> set[str]:
    """Return what the adapters call their targets, or modules' names where those are no lists of names."""
    lists = [c.get("target_modules") for c in configs]
    if any(not isinstance(x, list) for x in lists) or any(
        c.get("layers_to_transform") is not None or c.get("exclude_modules") for c in configs
    ):
        return set(modules)
    return {str(name) for x in lists for name in x or ()}


def _settings(configs: Sequence[Mapping[str, Any]], report: LoraReport) -> dict[str, Any]:
    """Return what the configurations say alike of their model."""
    found = {}
    for key in ("base_model_name_or_path", "task_type"):
        named = list(dict.fromkeys(str(c[key]) for c in configs if c.get(key)))
        if len(named) > 1:
            report.warnings.append(
                f"the adapters differ in {key}: {', '.join(map(shown, named))}; the first is kept"
            )
        found[key] = named[0] if named else None
    return found
