"""A LoRA adapter of what a model changes of its base: each weight's change, truncated."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmerge.checkpoint import EMBEDDINGS, HEAD, Checkpoint
from fastmerge.checkpoint.wording import shown
from fastmerge.dtypes import DType
from fastmerge.errors import ConflictError, RecipeError
from fastmerge.linalg import SVD, Truncated, truncated_svd
from fastmerge.linalg.randomized import squared_distance
from fastmerge.lora.folder import (
    Factors,
    check_rank,
    factor_type,
    new_adapter,
    stored,
    target_names,
    write_adapter,
)
from fastmerge.lora.report import LoraReport, ModuleResult
from fastmerge.methods.matrices import TABLES
from fastmerge.stored_tensors import (
    Progress,
    bytes_of,
    change,
    check_device,
    info_of,
    open_dense,
    read_tensor,
)

if TYPE_CHECKING:
    from torch import Tensor

#: The last word of an architecture -> what peft calls the task.
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}

#: Models whose linear layers store [in, out].
_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")

#: Half the distance of neighbouring values, relative: what rounding to a type adds to a residual at most.
_ROUNDING = {DType.F32: 0.0, DType.F16: 2.0**-11, DType.BF16: 2.0**-8}


@dataclass(frozen=True)
class Goal:
    """What is kept of a change: `rank` triples, or as few as leave `error` of its norm and at most `rank`.

    sv_epsilon: singular values that are not above it are left out.
    """

    rank: int | None
    error: float | None = None
    sv_epsilon: float = 0.0

    def truncated(self, delta: Tensor, *, exact: bool = False, seed: int = 0) -> Truncated:
        """Return the triples of a change [m, n] that are kept; there may be none."""
        found = truncated_svd(delta, self.rank, error=self.error, exact=exact, seed=seed)
        u, s, vh = found.svd
        k = int((s > self.sv_epsilon).sum())
        return replace(found, svd=SVD(u[:, :k], s[:k], vh[:k]))


def balanced(svd: SVD) -> Factors:
    """Return b = U sqrt(s), a = sqrt(s) V^T, on the CPU."""
    u, s, vh = (x.cpu() for x in svd)
    return Factors(s.sqrt()[:, None] * vh, u * s.sqrt())


def goal_of(
    rank: int | None,
    error: float | None,
    energy: float | None,
    max_rank: int | None,
    sv_epsilon: float,
    dtype: DType,
) -> Goal:
    """Check what a caller asks for.

    Raises:
        RecipeError: nothing, too much, or what factors of that type cannot give.
    """
    if sum(x is not None for x in (rank, error, energy)) > 1:
        raise RecipeError(
            "rank, error and energy exclude each other; to bound the rank of a target, give max_rank "
            "(--max-rank)"
        )
    if rank is not None and max_rank is not None:
        raise RecipeError(
            "rank and max_rank exclude each other; give max_rank with error or energy"
        )
    for what, value in (("rank", rank), ("max_rank", max_rank)):
        if value is not None:
            check_rank(what, value)
    if sv_epsilon < 0 or not math.isfinite(sv_epsilon):
        raise RecipeError(f"sv_epsilon must be a number from 0 on, got {sv_epsilon}")
    if error is None and energy is None:
        limit = max_rank if rank is None else rank
        if limit is None:
            raise RecipeError(
                "say how much of each change to keep: rank, error or energy (--rank 16, --error 0.1 or "
                "--energy 0.9)"
            )
        return Goal(limit, None, sv_epsilon)
    if error is not None and not 0 <= error < 1:
        raise RecipeError(f"error must be in [0, 1), got {error}")
    if energy is not None and not 0 < energy <= 1:
        raise RecipeError(f"energy must be in (0, 1], got {energy}")
    target = math.sqrt(1 - energy) if energy is not None else error or 0.0
    lost = _ROUNDING[dtype]
    if lost and target <= lost:
        raise RecipeError(
            f"factors in {dtype.torch} leave up to {lost:.2g} of a change by rounding, so that an error of "
            f"{target:.2g} cannot be met; pass --dtype float32"
        )
    return Goal(max_rank, math.sqrt(target**2 - lost**2), sv_epsilon)


@dataclass(frozen=True)
class Choice:
    """Which changes become factors, which are kept whole, and which are left out.

    saved: "changed", "none", or the last words of names of modules that are kept whole.
    """

    include: Sequence[re.Pattern[str]]
    exclude: Sequence[re.Pattern[str]]
    saved: str | Sequence[str]

    def refusal(self, module: str) -> str:
        """Return why a module is left out, or nothing."""
        for pattern in self.exclude:
            if pattern.search(module):
                return f"excluded by {pattern.pattern!r}"
        if self.include and not any(p.search(module) for p in self.include):
            return "no include expression finds it"
        return ""

    def names(self, module: str) -> bool:
        """Return whether the module is one of those to be kept whole."""
        if isinstance(self.saved, str):
            return False
        return any(f".{module}".endswith(f".{name}") for name in self.saved)

    def keeps(self, module: str) -> bool:
        """Return whether a tensor that has no factors is kept whole."""
        return self.saved == "changed" or self.names(module)


def _choice(include: Sequence[str], exclude: Sequence[str], saved: str | Sequence[str]) -> Choice:
    found = []
    for what, texts in (("include", include), ("exclude", exclude)):
        patterns = []
        for text in [texts] if isinstance(texts, str) else texts:
            try:
                patterns.append(re.compile(text))
            except re.error as error:
                raise RecipeError(f"{what} {text!r} is no regular expression: {error}") from None
        found.append(patterns)
    if isinstance(saved, str) and saved not in ("changed", "none"):
        saved = [saved]
    return Choice(found[0], found[1], saved)


def extract_lora(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    error: float | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    sv_epsilon: float = 0.0,
    dtype: str = "float32",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    save_modules: str | Sequence[str] = "changed",
    exact: bool = False,
    seed: int = 0,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> LoraReport:
    """Write a PEFT adapter of what a model changes of its base.

    D = tuned - base ~ U diag(s) V^T,  lora_B = U sqrt(s),  lora_A = sqrt(s) V^T,  alpha = r

    Weights of two dimensions become factors, but for embeddings, output heads and position tables. One
    matrix of each model is in memory at a time, in float32.

    Args:
        base, tuned: folders of models of one architecture.
        rank: triples of each change; or, of rank, error and energy one:
        error: the least rank that leaves ||D - B A||_F <= error ||D||_F, 0 <= error < 1.
        energy: the least rank that keeps that share of ||D||_F^2: error = sqrt(1 - energy).
        max_rank: with error or energy, the most; alone: as rank.
        sv_epsilon: singular values up to this are left out.
        dtype: of the factors: float32, bfloat16 or float16.
        include, exclude: regular expressions, searched in names of modules; exclude goes first.
        save_modules: "changed": other changed tensors (embeddings, heads, norms, biases) are kept whole.
            "none": they are left out and named in the report. Names: modules whose name ends so are kept
            whole, linear ones too, and others are left out.
        exact: decompose in full, where else a randomised decomposition does, whose residual is measured too.
        seed: of its start. device: where matrices are decomposed.
        overwrite: replace an adapter that is in `out`.
        progress: called with (tensor name, bytes done, bytes in all).
    Returns:
        Rank, norm and residual of each module, and what has no part in the adapter with the reason.
    Raises:
        RecipeError: options. CheckpointError: a folder. NonFiniteError: a change holds NaN or infinity.
        ConflictError: no weight changed that could become factors.
    """
    started = time.perf_counter()
    kept_as = factor_type(dtype)
    goal = goal_of(rank, error, energy, max_rank, sv_epsilon, kept_as)
    choice = _choice(include, exclude, save_modules)
    check_device(device)
    origin, model = open_dense(base), open_dense(tuned)
    run = _Extraction(
        origin, model, goal, choice, kept_as, exact, seed, device, LoraReport(Path(out))
    )
    names = list(dict.fromkeys([*model.tensors, *origin.tensors]))
    total = sum(info_of(m, n).n_bytes for m in (origin, model) for n in m.tensors)
    with new_adapter(out, overwrite=overwrite, inputs=[origin.path, model.path]) as folder:
        for name in names:
            run.take(name)
            if progress is not None:
                progress(name, run.report.bytes_read, total)
        run.complete()
        for checkpoint in (origin, model):
            checkpoint.check_unchanged()
        if not run.factors:
            raise ConflictError(
                f"no weight of {model} differs from {origin} in a way that an adapter can hold"
                f"{run.first_reason()}; check which model is which"
            )
        run.report.bytes_written = write_adapter(
            folder.hidden,
            run.factors,
            run.whole,
            target_names(run.factors, run.linear - set(run.factors)),
            run.settings(),
        )
        folder.commit()
    run.report.seconds = time.perf_counter() - started
    return run.report


class _Extraction:
    """One run: what becomes of each tensor."""

    def __init__(
        self,
        base: Checkpoint,
        tuned: Checkpoint,
        goal: Goal,
        choice: Choice,
        dtype: DType,
        exact: bool,
        seed: int,
        device: str,
        report: LoraReport,
    ) -> None:
        self.base = base
        self.tuned = tuned
        self.goal = goal
        self.choice = choice
        self.dtype = dtype
        self.exact = exact
        self.seed = seed
        self.device = device
        self.report = report
        self.factors: dict[str, Factors] = {}
        self.whole: dict[str, Tensor] = {}
        self.linear: set[str] = set()
        self.transposed = (base.config or {}).get("model_type") in _TRANSPOSED

    def take(self, name: str) -> None:
        """Decide on one tensor of either model."""
        had, has = self.base.tensors.get(name), self.tuned.tensors.get(name)
        module, _, kind = name.rpartition(".")
        linear = kind == "weight" and not TABLES.search(name) and not self.choice.names(module)
        if has is not None and linear and len(has.shape) == 2:
            self.linear.add(module)
        if has is None:
            self.report.skipped[name] = f"{self.tuned} does not have it"
            return
        if had is None and name != HEAD:
            self.report.skipped[name] = f"{self.base} does not have it"
            return
        new = self._read(self.tuned, name)
        old = None if had is None else self._read(self.base, name)
        delta = None
        if old is not None and old.shape == new.shape:
            if not (old.is_floating_point() and new.is_floating_point()):
                if old.dtype == new.dtype and bytes_of(old) == bytes_of(new):
                    self.report.unchanged += 1
                else:
                    self.report.skipped[name] = f"of type {str(new.dtype).removeprefix('torch.')}"
                return
            delta = change(old, new, name, self.tuned)
            if not bool(delta.any()):
                self.report.unchanged += 1
                return
        if kind not in ("weight", "bias") or not module:
            self.report.skipped[name] = "it is no weight or bias of a module"
        elif reason := self.choice.refusal(module):
            self.report.skipped[name] = reason
        elif delta is not None and linear and delta.dim() == 2:
            self._decompose(name, module, delta)
        else:
            self._keep(name, module, new, old)

    def _read(self, model: Checkpoint, name: str) -> Tensor:
        info = info_of(model, name)
        self.report.bytes_read += info.n_bytes
        return read_tensor(info)

    def _keep(self, name: str, module: str, new: Tensor, old: Tensor | None) -> None:
        if not self.choice.keeps(module):
            self.report.skipped[name] = (
                f"it is no matrix of a linear layer: {shown(list(new.shape))}"
                if not TABLES.search(name)
                else "it is an embedding, an output head or a position table"
            )
            return
        if old is not None and old.shape != new.shape:
            if old.shape[1:] != new.shape[1:] or not TABLES.search(name):
                raise ConflictError(
                    f"{shown(name)} is {list(old.shape)} in {self.base} but {list(new.shape)} in "
                    f"{self.tuned}; give models of one architecture, or exclude it"
                )
            self.report.warnings.append(
                f"{shown(name)} has {len(old)} rows in the base but {len(new)} in the adapter; call "
                f"resize_token_embeddings({len(new)}) on the base before loading it"
            )
        self._save(name, new)
        config = self.tuned.config or {}
        tied = config.get("tie_word_embeddings", True) and HEAD not in self.tuned.tensors
        if name in EMBEDDINGS and tied and task_of(config) == "CAUSAL_LM":
            # peft leaves a head tied to the base's embedding; the tuned model's is tied to its own.
            self._save(HEAD, new)

    def _save(self, name: str, tensor: Tensor) -> None:
        self.whole[name] = tensor
        self.report.saved.append(name)

    def _decompose(self, name: str, module: str, delta: Tensor) -> None:
        if self.transposed:
            delta = delta.mT.contiguous()
        found = self.goal.truncated(delta.to(self.device), exact=self.exact, seed=self.seed)
        k = len(found.svd.s)
        if k == 0:
            self.report.skipped[name] = f"no singular value is above {self.goal.sv_epsilon:g}"
            return
        factors = stored(module, balanced(found.svd), self.dtype)
        self.factors[module] = factors
        missed = squared_distance(delta, factors.b.to(delta.dtype), factors.a.to(delta.dtype))
        residual = math.sqrt(missed) / found.norm
        asked = math.hypot(self.goal.error or 0.0, _ROUNDING[self.dtype])
        note = ""
        if self.goal.error is not None and self.goal.rank == k and residual > asked:
            note = "the largest rank allowed leaves more than asked for"
        elif k * sum(delta.shape) >= delta.numel():
            note = "factors take no less than the matrix"
        info = info_of(self.tuned, name)
        self.report.modules.append(
            ModuleResult(module, tuple(info.shape), k, found.norm, residual, note)
        )

    def complete(self) -> None:
        """Add what else the modules hold whose weight is kept whole: peft loads them entire or not at all."""
        modules = {name.removesuffix(".weight") for name in self.whole if name.endswith(".weight")}
        for name in self.tuned.tensors:
            if name.rpartition(".")[0] in modules and name not in self.whole:
                self._save(name, self._read(self.tuned, name))
                if self.report.skipped.pop(name, None) is None:
                    self.report.unchanged -= 1

    def first_reason(self) -> str:
        """Return the reason why the first skipped tensor has no part, for an error."""
        for name, reason in self.report.skipped.items():
            return f" ({shown(name)}: {reason})"
        return ""

    def settings(self) -> dict[str, Any]:
        """Return what the adapter's configuration says of its model."""
        return {
            "base_model_name_or_path": str(self.base.path),
            "fan_in_fan_out": self.transposed,
            "task_type": task_of(self.tuned.config),
        }


def task_of(config: Mapping[str, Any] | None) -> str | None:
    """Return peft's name of a model's task, None where the model's configuration does not tell."""
    for architecture in (config or {}).get("architectures") or ():
        for ending, task in _TASKS.items():
            if str(architecture).endswith(ending):
                return task
    return None
