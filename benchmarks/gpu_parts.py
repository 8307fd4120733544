"""The parts of a GPU benchmark: verify; time kernels, many small tensors, whole methods beside torch."""

from __future__ import annotations

import gc
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gpu_device
import gpu_rivals
import torch
from gpu_cases import VERIFIED, Case, Small, all_cases, operand_sets
from gpu_device import Gpu, Host, Subject
from gpu_operands import Mismatch, compare, to_host
from gpu_timing import Spread, Timer, copy_bandwidth
from gpu_verify import Verdict, Verification, verify

from fastmerge import api, ops
from fastmerge.backends import Kernels

BUDGET = 480.0
COMPILE_SECONDS = 40
LOST = (
    "a kernel broke the device's context; look at it with CUDA_LAUNCH_BLOCKING=1; "
    "for the other backend alone: --backend, --no-build"
)
#: Parts in order, and each one's share of the time that is left when it begins.
PARTS = {"verify": 0.45, "kernels": 0.5, "small": 0.2, "rivals": 0.95}


@dataclass(frozen=True)
class Sizes:
    """How much of everything. large: lengths of the large tensors that are verified."""

    elements: int = 1 << 26
    large: tuple[int, ...] = (3 << 20, (64 << 20) + 5)
    n_seeds: int = 12
    n_sets: int = 2
    copied: int = 1 << 30
    small_count: int = 300
    small_largest: int = 65536
    compiled: bool = True


QUICK = Sizes(large=(3 << 20,), n_seeds=4)
REHEARSAL = Sizes(1 << 14, (1 << 13, 4101), 1, 2, 1 << 20, 5, 600, False)


@dataclass
class Progress:
    """The clock that everything goes by, and the terminal."""

    budget: float = BUDGET
    started: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    @property
    def left(self) -> float:
        return self.budget - self.elapsed

    def say(self, text: str) -> None:
        print(f"[{self.elapsed:4.0f}/{self.budget:.0f} s] {text}", flush=True)

    def until(self, seconds: float) -> Callable[[], float]:
        """Return a clock that runs out after `seconds`."""
        end = self.elapsed + seconds
        return lambda: end - self.elapsed


class Bench:
    """One run: what it measures goes to `result`, which is written after every row."""

    def __init__(
        self,
        device: Host,
        subjects: Sequence[Subject],
        sizes: Sizes,
        *,
        seed: int = 0,
        out: Path | None = None,
        quick: bool = False,
        budget: float = BUDGET,
        progress: Progress | None = None,
    ) -> None:
        self.device, self.subjects, self.sizes, self.seed, self.out = (
            device,
            subjects,
            sizes,
            seed,
            out,
        )
        self.progress = progress or Progress(budget)
        self.timer = Timer(device, sizes.n_sets, quick)
        self.referee: Kernels = ops.choose("cpu")
        self.wrong: dict[str, set[str]] = {s.label: set() for s in subjects}
        self.lost = False
        self.result: dict[str, Any] = {
            **gpu_device.environment(device),
            "rehearsal": not isinstance(device, Gpu),
            "seed": seed,
            "elements": sizes.elements,
            "dtype": "bf16",
            "referee": self.referee.name,
            "verification": [],
            **{part: [] for part in PARTS if part != "verify"},
            "left_out": [],
        }

    # ---- the result file -------------------------------------------------------------------------

    def save(self) -> None:
        self.result["elapsed_s"] = round(self.progress.elapsed, 1)
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            partial = self.out.with_name(self.out.name + ".partial")
            partial.write_text(json.dumps(self.result, indent=2, default=str) + "\n")
            os.replace(partial, self.out)

    def add(self, part: str, row: dict[str, Any], text: str) -> None:
        self.result[part].append(row)
        self.save()
        self.progress.say(text)

    def leave_out(self, what: str, why: str) -> None:
        self.result["left_out"].append(f"{what}: {why}")
        self.save()
        self.progress.say(f"  left out {what}: {why}")

    # ---- parts -----------------------------------------------------------------------------------

    def run(self, parts: Sequence[str]) -> int:
        """Run the parts and return the exit status."""
        self.save()
        for part, share in PARTS.items():
            if part in parts and not self.lost:
                getattr(self, part)(max(0.0, share * self.progress.left))
                self._free()
        self.save()
        failed = [v for v in self.result["verification"] if v["failures"]]
        failed += [k for k, kernels in self.wrong.items() if kernels]
        return 1 if failed else 0

    def _free(self) -> None:
        gc.collect()
        if isinstance(self.device, Gpu):
            torch.cuda.empty_cache()

    def verify(self, seconds: float) -> None:
        clock = self.progress.until(seconds)
        for i, subject in enumerate(self.subjects):
            self.progress.say(
                f"verifying {subject.label} against {self.referee.name}, seed {self.seed}"
            )
            share = self.progress.until(clock() / (len(self.subjects) - i))
            verification = Verification(
                subject, self.referee, self.seed, self.sizes.large, self.sizes.n_seeds
            )
            verdict: Verdict = verify(verification, share, self.progress.say)
            self.wrong[subject.label] |= verdict.kernels
            wrong = f"{len(verdict.failures)} wrong" if verdict.failures else "all the same bits"
            self.add(
                "verification",
                verdict.as_dict(),
                f"  {subject.label}: {verdict.checks} checks, {wrong}",
            )
            self._free()
            if verdict.lost:
                self.lost = True
                self.leave_out("all else", LOST)
                return

    def kernels(self, seconds: float) -> None:
        clock = self.progress.until(seconds)
        n = self.sizes.elements
        copied = self._copy()
        sets = operand_sets(self.device, n, 8, self.seed + 1, self.sizes.n_sets)
        checked = operand_sets(self.device, min(n, VERIFIED), 8, self.seed + 9, 1)[0]
        self.progress.say(
            f"{'':10}{'kernel':<26}{'bytes/elem':>11}{'us':>10}{'p20':>10}{'p80':>10}{'GB/s':>8}"
            f"{'of copy':>9}{'sweeps':>8}{'call us':>10}"
        )
        for case in all_cases():
            for subject in self.subjects:
                name = f"{subject.label} {case.name}"
                if clock() <= 0:
                    self.leave_out(name, "time is up")
                elif case.kernel in self.wrong[subject.label]:
                    self.leave_out(name, f"verification of {case.kernel} failed")
                else:
                    work = partial(self._kernel, case, subject, sets, checked, copied)
                    self._guarded(name, subject, case.kernel, work)
                if self.lost:
                    return
        again, _ = copy_bandwidth(self.timer, self.sizes.copied)
        self.result["copy_again_bytes_per_s"] = again
        self.progress.say(f"copy again {again / 1e9:.0f} GB/s")

    def _copy(self) -> float:
        copied, spread = copy_bandwidth(self.timer, self.sizes.copied)
        self.result |= {
            "copy_bytes_per_s": copied,
            "copy": {**spread.as_dict("kernel"), "bytes": 2 * self.sizes.copied},
        }
        self.progress.say(
            f"copy of {self.sizes.copied >> 20} MiB: {copied / 1e9:.0f} GB/s read and written"
        )
        return copied

    def _guarded(self, name: str, subject: Subject, kernel: str, work: Callable[[], None]) -> None:
        """Do a row; what goes wrong becomes a line, for the next rows may still be worth having."""
        try:
            work()
        except Mismatch as wrong:
            self.wrong[subject.label].add(kernel)
            self.leave_out(name, f"WRONG: {wrong}")
        except Exception as error:
            self.leave_out(name, f"{type(error).__name__}: {line_of(error)}")
            self._free()
            if not self.device.alive():
                self.wrong[subject.label].add(kernel)
                self.lost = True
                self.leave_out("all else", LOST)

    def _kernel(
        self, case: Case, subject: Subject, sets: Sequence[Any], checked: Any, copied: float
    ) -> None:
        case.check(subject.kernels, self.referee, checked)
        run = case.run(subject.kernels, sets)
        timed = self.timer.time(run, subject.meter)
        call = self.timer.wall(run, row_seconds=0)
        n = self.sizes.elements
        n_bytes = case.n_bytes(n)
        rate = n_bytes / timed.kernel.median
        sweeps = timed.kernel.median * copied / n_bytes if case.in_sweeps else None
        row = {
            "backend": subject.label,
            "name": case.name,
            "experts": case.n_experts,
            "elements": n,
            "bytes": n_bytes,
            **timed.kernel.as_dict("kernel"),
            **call.as_dict("call"),
            "bytes_per_s": rate,
            "share_of_copy": rate / copied,
            "sweeps": sweeps,
            "launches": timed.launches,
        }
        k, us = timed.kernel, 1e6
        text = (
            f"{subject.label:<10}{case.name:<26}{n_bytes / n:>11.1f}{k.median * us:>10.1f}{k.p20 * us:>10.1f}"
            f"{k.p80 * us:>10.1f}{rate / 1e9:>8.0f}{rate / copied:>9.0%}"
            f"{f'{sweeps:.2f}' if sweeps else '':>8}{call.median * us:>10.1f}"
        )
        self.add("kernels", row, text)

    def small(self, seconds: float) -> None:
        """Many small tensors: one launch for all, one call each, plain torch each."""
        clock = self.progress.until(seconds)
        sizes = self.sizes
        small = Small.of(self.device, sizes.small_count, sizes.small_largest, 4, self.seed + 5)
        cuts = small.cuts()
        for subject in self.subjects:

            def rows(subject: Subject = subject) -> None:
                together = small.together(subject.kernels)
                one_by_one = small.one_by_one(subject.kernels)
                compare(together(), small.on_host().together(self.referee)())
                for name, run in (("one launch", together), ("one by one", one_by_one)):
                    self._small(small, subject.label, name, self.timer.wall(lambda _: run()))  # noqa: B023
                timed = self.timer.time(lambda _: together(), subject.meter)
                self._small(small, subject.label, "one launch, kernels", timed.kernel)

            if {"walk", "walks"} & self.wrong[subject.label]:
                self.leave_out(f"{subject.label} small tensors", "verification of walks failed")
            elif clock() > 0:
                self._guarded(f"{subject.label} small tensors", subject, "walks", rows)
            if self.lost:
                return
        eager = self.timer.wall(lambda _: gpu_rivals.small_walks(small.operands, cuts))
        self._small(small, "torch", "eager", eager)

    def _small(self, small: Small, label: str, name: str, spread: Spread) -> None:
        row = {
            "backend": label,
            "name": name,
            "tensors": len(small.operands),
            "bytes": small.n_bytes,
            **spread.as_dict("wall"),
        }
        text = f"{label:<10}{len(small.operands)} small tensors, {name:<22}{spread.median * 1e6:>10.0f} us"
        self.add("small", row, text)

    def rivals(self, seconds: float) -> None:
        """Whole methods, statistics and all, beside plain torch and compiled torch on the same tensors."""
        clock = self.progress.until(seconds)
        k = 4
        sets = operand_sets(self.device, self.sizes.elements, k, self.seed + 1, self.sizes.n_sets)
        checked = operand_sets(
            self.device, min(self.sizes.elements, VERIFIED), k, self.seed + 9, 1
        )[0]
        rows = []
        for rival in gpu_rivals.RIVALS:
            if clock() <= 0:
                self.leave_out(f"method {rival.method}", "time is up")
                continue
            row: dict[str, Any] = {
                "method": rival.method, "experts": k, "elements": self.sizes.elements, "given": rival.given,
            }  # fmt: skip
            for subject in self.subjects:
                if "method " + rival.method in self.wrong[subject.label]:
                    self.leave_out(f"{subject.label} {rival.method}", "its verification failed")
                    continue

                def ours(subject: Subject = subject, rival: Any = rival, row: Any = row) -> None:
                    def merged(held: Any, backend: str) -> Any:
                        base = held.base if rival.with_base else None
                        return api.merge_tensors(
                            base, held.experts, method=rival.method, backend=backend, **rival.given
                        )

                    with subject.served() as name:
                        compare(merged(checked, name), merged(to_host(checked), self.referee.name))
                        spread = self.timer.wall(lambda i: merged(sets[i], name))
                    row[subject.label] = spread.as_dict("wall")

                self._guarded(
                    f"{subject.label} {rival.method}", subject, "method " + rival.method, ours
                )
                if self.lost:
                    return
            self._eager(rival, row, sets)
            rows.append((rival, row))
            self.add("rivals", row, _rival_text(row))
        if not self.sizes.compiled:
            self.leave_out("torch.compile", "not part of a rehearsal")
            return
        for rival, row in rows:
            if clock() <= 0:
                self.leave_out(f"torch.compile of {rival.method}", "time is up")
                continue
            self._compiled(rival, row, sets, min(COMPILE_SECONDS, max(1, int(clock()))))
            self.save()
            self.progress.say(_rival_text(row))

    def _eager(self, rival: gpu_rivals.Rival, row: dict[str, Any], sets: Sequence[Any]) -> None:
        try:
            spread = self.timer.wall(lambda i: rival.eager(sets[i].base, sets[i].experts))
            row["eager"] = spread.as_dict("wall")
        except Exception as error:  # out of memory, above all
            self.leave_out(f"eager {rival.method}", line_of(error))
            self._free()

    def _compiled(
        self, rival: gpu_rivals.Rival, row: dict[str, Any], sets: Sequence[Any], seconds: int
    ) -> None:
        try:
            torch.compiler.reset()
            compiled = torch.compile(rival.eager, dynamic=False)
            with _alarm(seconds):
                compiled(sets[0].base, sets[0].experts)
                self.device.synchronise()
            spread = self.timer.wall(lambda i: compiled(sets[i].base, sets[i].experts))
            row["compiled"] = spread.as_dict("wall")
        except Exception as error:  # compilers raise anything
            row["compiled_not"] = f"{type(error).__name__}: {line_of(error)}"
            self.leave_out(f"torch.compile of {rival.method}", row["compiled_not"])
            self._free()


def _rival_text(row: dict[str, Any]) -> str:
    kinds = [name for name in ("cuda", "triton", "reference", "eager", "compiled") if name in row]
    kinds += [
        name
        for name in row
        if isinstance(row[name], dict) and "wall_s" in row[name] and name not in kinds
    ]
    times = "".join(f"  {name} {row[name]['wall_s'] * 1e3:.3f} ms" for name in kinds)
    ours = [name for name in kinds if name not in ("eager", "compiled")]
    ratios = "".join(
        f"  {name} is {row[other]['wall_s'] / row[name]['wall_s']:.1f}x {other}"
        for name in ours
        for other in ("eager", "compiled")
        if other in row
    )
    return f"method {row['method']:<18} K={row['experts']}{times};{ratios}"


def line_of(error: BaseException) -> str:
    return (str(error).strip() or "no message").split("\n")[0][:300]


@contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the block after `seconds`."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
