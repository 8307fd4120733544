"""Hold a GPU backend to the cpu backend's bits: the shared case list, large tensors, every method.

Operands are drawn on the host, or on the device from a printed seed, and put where the backend wants them;
what it computes comes back and must be the same to the last bit (NaN: of any sign).
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_device import Subject
from gpu_ferry import Ferried
from gpu_operands import (
    Mismatch,
    agreement,
    cases,
    chunk_of,
    coded_merges,
    compare,
    device_merges,
    family,
    place_all,
    to_host,
    walked,
    whole,
)

from fastmerge import api, ops
from fastmerge.backends import Kernels
from fastmerge.dtypes import DType
from fastmerge.errors import RecipeError
from fastmerge.evaluate import Operands, run_walk, run_walks, sweep_statistic
from fastmerge.recipe import keyword_params
from fastmerge.registry import Scope, TensorContext
from fastmerge.stages import (
    Axis,
    Drop,
    Elect,
    Gram,
    Keep,
    Moments,
    OrderStatistic,
    RankedDrop,
    SignBalance,
    Walk,
)
from fastmerge.streaming.device import HostDevice, TorchDevice

#: Shapes of the random cases that reach every path: short rows, segments, several pieces.
SHAPES = [(5, 123), (127,), (64, 64), (0, 5), (), (33, 4099), (4097,), (70001,), (3, 5, 11)]
#: Parameters of each method to run with; a method that is not here runs with weights, if it has any, alone.
VARIATIONS: dict[str, list[dict[str, Any]]] = {
    "ties": [
        {"weight": 0.5, "density": 0.3},
        {"weight": [1.0, 0.5, -0.3], "density": [0.2, 0.9, 1.0], "rescale": True, "lambda_": 0.7},
        {"preset": "paper"},
        {"weight": 0.5, "density": 0.5, "elect": "normfrac", "merge_func": "dis-max"},
        {"weight": 0.5, "density": 0.5, "elect": "count", "zero_sign": "tensor_majority"},
    ],
    "dare_linear": [
        {"weight": 0.5, "density": 0.3},
        {"weight": 0.5, "density": [0.0, 0.5, 1.0], "rescale_mode": "inverse_keep"},
    ],
    "dare_ties": [{"weight": 0.5, "density": 0.5}, {"preset": "paper", "density": 0.1}],
    "breadcrumbs": [
        {"weight": 0.5, "density": 0.8, "gamma": 0.05},
        {"preset": "paper", "density": 0.7, "gamma": 0.1},
    ],
    "breadcrumbs_ties": [{"weight": 0.5, "density": 0.8, "gamma": 0.05, "rescale": True}],
    "della": [
        {"weight": 0.5, "density": 0.5},
        {"preset": "paper", "density": 0.4},
        {"weight": 0.5, "density": 0.5, "rank_by": "tensor"},
        {"weight": 0.5, "density": 0.5, "rank_by": "value"},
    ],
    "della_linear": [{"weight": 0.5, "density": 0.5}],
    "sce": [{}, {"select_topk": 0.1}, {"preset": "paper", "select_topk": 0.3}],
    "model_stock": [{}, {"filter_wise": True}, {"preset": "paper"}],
    "nuslerp": [{"weight": [0.7, 0.3]}, {"weight": 0.5, "nuslerp_flatten": False}],
    "slerp": [{"t": 0.3}],
    "passthrough": [{"scale": 0.5}, {}],
}


@dataclass
class Verdict:
    """What was checked of a backend, and what failed. kernels: those whose timing must not be shown."""

    backend: str
    seed: int
    checks: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    lost: bool = False

    @property
    def kernels(self) -> set[str]:
        return {f["kernel"] for f in self.failures}

    def as_dict(self) -> dict[str, Any]:
        return {
            "backend": self.backend,
            "seed": self.seed,
            "checks": self.checks,
            "failures": self.failures,
            "left_out": self.left_out,
        }


# ---- the checks ------------------------------------------------------------------------------------

#: (kernel, what is checked, the check): `kernel` is what a failure keeps from being timed.
Check = tuple[str, str, Callable[[], None]]


class Verification:
    """All checks of one backend, in an order that looks at everything early."""

    def __init__(
        self, subject: Subject, referee: Kernels, seed: int, large: Sequence[int], n_seeds: int
    ) -> None:
        self.subject, self.referee, self.seed = subject, referee, seed
        self._large, self._n_seeds = large, n_seeds
        self._where = subject.device.where

    def checks(self) -> Iterator[Check]:
        compiled = (
            self.subject.kernels.name == "cuda"
        )  # others compile each kernel when it is asked for
        yield from self._streams()
        yield from self._methods((33, 257), torch.bfloat16)
        yield from self._strided()
        yield from self._many()
        if compiled:
            yield from self._codes()
        for n in self._large[:1]:
            yield from self._at_size(n)
        if not compiled:
            yield from self._single_codes()
        yield from self._files()
        early = min(2, self._n_seeds)  # the rest come last: there is always one more
        for number in range(early):
            yield from self._random(number)
        for n in self._large[1:]:
            yield from self._at_size(n)
        if max(self._large, default=0) >= 1 << 20:
            yield from self._methods((1031, 4096), torch.bfloat16)
        yield from self._methods((129, 100), torch.float32)
        for number in range(early, self._n_seeds):
            yield from self._random(number)

    def _both(
        self, compute: Callable[[Kernels, cases.Operands], Any], host: cases.Operands, shift: int
    ) -> Callable[[], None]:
        """Return a check: `compute` by the backend on the device and by the referee on the host."""

        def check() -> None:
            placed = place_all(host, self._where, shift)
            compare(
                compute(self.subject.kernels, placed),
                compute(self.referee, host),
            )

        return check

    def _random(self, number: int) -> Iterator[Check]:
        """The shared case list: any stages, mixed types, misaligned views, chunks."""
        k = agreement.EXPERTS[number % len(agreement.EXPERTS)]
        for shape in SHAPES:
            draw = self.seed * 1000 + number
            shift, limit = number % 4, (1 << 30, 1000)[number % 2]
            rng, host = agreement.draw(draw, shape, k, with_base=number % 4 != 1)
            label = f"shape {list(shape)} K={k} draw {draw} shift {shift}"
            dtype = cases.FLOATS[number % 4]
            walk = cases.random_walk(rng, shape, k, host.base is not None)

            def run(each: Kernels, held: cases.Operands, walk: Walk = walk) -> Any:
                return walked(each, held, walk, dtype, limit)  # noqa: B023

            yield "any walk", f"{label} {_stages(walk)}", self._both(run, host, shift)
            for request in agreement.statistics(rng, shape, k):

                def sweep(each: Kernels, held: cases.Operands, request: Any = request) -> Any:
                    return sweep_statistic(each, request, whole(held), limit)  # noqa: B023

                yield (
                    _kernel_of(request),
                    f"{label} {_stages(request)}",
                    self._both(sweep, host, shift),
                )
            keep = cases.random_keep(rng, shape, k)
            yield from self._masks(keep, host, label, shift)
            n = int(np.prod(shape)) if shape else 1
            if host.base is not None and shape != (33, 4099):  # the large tensors have these too
                for plain in agreement.plain_walks(rng, k, n):

                    def run_plain(each: Kernels, held: cases.Operands, walk: Walk = plain) -> Any:
                        return walked(each, held, walk, dtype, limit)  # noqa: B023

                    yield "walk", f"{label} {_stages(plain)}", self._both(run_plain, host, shift)

    def _masks(self, keep: Keep, host: cases.Operands, label: str, shift: int) -> Iterator[Check]:
        def mask(each: Kernels, held: cases.Operands) -> Any:
            return each.keep_mask(keep, chunk_of(held))

        def probability(each: Kernels, held: cases.Operands) -> Any:
            assert isinstance(keep.drop, RankedDrop)
            return each.keep_probability(keep.drop, chunk_of(held))

        yield "keep mask", f"{label} {_stages(keep)}", self._both(mask, host, shift)
        if isinstance(keep.drop, RankedDrop):
            yield "keep probability", f"{label} {keep.drop}", self._both(probability, host, shift)

    def _at_size(self, n: int) -> Iterator[Check]:
        """Large tensors, as models have: walks of the methods, statistics, each K the kernels unroll."""
        cols = 4096 if n % 4096 == 0 else n
        for k in (4, 2, 8, 1, 3, 16, 20) if n < 1 << 24 else (4, 8):
            seed = self.seed + k
            made = family(self.subject.device, n, k, seed)
            placed = cases.Operands(
                None if made.base is None else made.base.view(-1, cols),
                [e.view(-1, cols) for e in made.experts],
            )
            host = to_host(placed)
            rng = agreement.rng_of(seed, n, k)
            label = f"n {n} K={k} seed {seed}"

            def both(
                compute: Callable[[Kernels, cases.Operands], Any],
                placed: cases.Operands = placed,
                host: cases.Operands = host,
            ) -> Callable[[], None]:
                return lambda: compare(
                    compute(self.subject.kernels, placed), compute(self.referee, host)
                )

            walks = list(agreement.plain_walks(rng, k, n))
            if k != 4:
                walks = walks[:: 4 if n < 1 << 24 else 7]
            for walk in walks:

                def run(each: Kernels, held: cases.Operands, walk: Walk = walk) -> Any:
                    return walked(each, held, walk, torch.bfloat16, each.chunk_elements)

                yield "walk", f"{label} {_stages(walk)}", both(run)
            for request in _large_statistics(n, cols, k):

                def sweep(each: Kernels, held: cases.Operands, request: Any = request) -> Any:
                    return sweep_statistic(each, request, whole(held), each.chunk_elements)

                yield _kernel_of(request), f"{label} {_stages(request)}", both(sweep)
            if n < 1 << 24:
                keys = [int(x) for x in rng.integers(0, 2**63, k)]
                drops: list[Any] = [Drop([0.3] * k, keys)]
                if cols < n:
                    drops.append(RankedDrop([0.3] * k, [0.7] * k, keys))
                for drop in drops:

                    def mask(each: Kernels, held: cases.Operands, drop: Any = drop) -> Any:
                        return each.keep_mask(Keep(drop=drop), chunk_of(held))

                    yield "keep mask", f"{label} {type(drop).__name__}", both(mask)

    def _streams(self) -> Iterator[Check]:
        """Work queued behind the making of its operands, on a stream that is not the default one."""
        n, k = 300_007, 4
        made = family(self.subject.device, n, k, self.seed)
        host = to_host(made)
        rng = agreement.rng_of(self.seed, "stream")
        walks = list(agreement.plain_walks(rng, k, n))[:8]
        request = OrderStatistic([[n // 3]] * k)

        def late() -> cases.Operands:
            """Operands that are zero until the stream gets to their making, a while from now."""
            assert made.base is not None
            held = cases.Operands(
                torch.zeros_like(made.base), [torch.zeros_like(e) for e in made.experts]
            )
            self.subject.device.synchronise()
            for _ in range(50):
                self.subject.device.hold()
            assert held.base is not None
            for target, source in zip(
                [held.base, *held.experts], [made.base, *made.experts], strict=True
            ):
                target.copy_(source)
            return held

        def check() -> None:
            with self.subject.device.another_stream():
                for walk in walks:
                    got = walked(self.subject.kernels, late(), walk, torch.bfloat16, 1 << 40)
                    compare(got, walked(self.referee, host, walk, torch.bfloat16, 1 << 22))
                got = sweep_statistic(self.subject.kernels, request, whole(late()), 1 << 40)
            compare(got, sweep_statistic(self.referee, request, whole(host)))

        yield "walk", "on another stream", check

    def _strided(self) -> Iterator[Check]:
        """Transposed and offset views through the public operations, which make them contiguous."""
        rng = agreement.rng_of(self.seed, "strided")
        host = cases.operands(rng, (129, 257), 3, "normal")
        assert host.base is not None
        walk = Walk(np.full((3, 1), 0.5), elect=Elect("mass"))

        def turned(x: torch.Tensor) -> torch.Tensor:
            return x.to(self._where)[1:].T

        def check() -> None:
            with self.subject.served() as name:
                assert host.base is not None
                got = ops.fused_walk(
                    turned(host.base), [turned(e) for e in host.experts], walk, backend=name
                )
            base, experts = (
                host.base[1:].T.contiguous(),
                [e[1:].T.contiguous() for e in host.experts],
            )
            want, _ = walked(self.referee, cases.Operands(base, experts), walk, base.dtype, 1 << 22)
            compare(got, want)

        yield "walk", "strided operands", check

    def _many(self) -> Iterator[Check]:
        """Many tensors of all sizes in one launch, some empty, their walks of several kinds."""
        rng = agreement.rng_of(self.seed, "many")
        sizes = [0, 1, 17, *(int(x) for x in rng.integers(1, 9000, 60))]
        k = 3
        hosts = [cases.operands(rng, (n,), k, "grid") for n in sizes]
        walks = [list(agreement.plain_walks(rng, k, n))[i % 20] for i, n in enumerate(sizes)]

        def all_of(each: Kernels, helds: Sequence[cases.Operands]) -> Any:
            outs = [torch.zeros_like(h.experts[0]) for h in helds]
            jobs: list[Any] = [
                (w, whole(h), ops.buffer_of(o, "out"))
                for w, h, o in zip(walks, helds, outs, strict=True)
            ]
            bad = run_walks(each, jobs, each.chunk_elements)
            return [*outs, np.array(bad)]

        def check() -> None:
            placed = [place_all(h, self._where, i % 3) for i, h in enumerate(hosts)]
            compare(all_of(self.subject.kernels, placed), all_of(self.referee, hosts))

        yield "walks", f"{len(sizes)} tensors at once", check

    def _codes(self) -> Iterator[Check]:
        """Coded operands and results: the parts that the emulated kernels are held to."""
        ferried = Ferried(self.subject.kernels, self._where)
        for name, part in coded_merges.PARTS.items():
            if name != "files":
                yield "codes", name, _asserted(part, ferried)

    def _single_codes(self) -> Iterator[Check]:
        """Each format once: written from values, and read."""
        ferried = Ferried(self.subject.kernels, self._where)
        walk = Walk(np.ones((1, 1)), add_base=False)

        def write(name: str, rng: Any) -> None:
            shape, _ = coded_merges.WRITTEN[name]
            coded_merges.check(
                ferried, coded_merges.operands(rng, shape, 1, [], low_rank=0), walk, name
            )

        def read(name: str, rng: Any) -> None:
            shape, coding = {**coded_merges.WRITTEN, **coded_merges.READ}[name]
            x = coded_merges.values_of(rng, shape, "normal")
            coded = coded_merges.operand(rng, coding, x)
            held = Operands(None, [coded], shape[1], DType.F32)
            outs = [torch.zeros(shape, dtype=torch.float32) for _ in range(2)]
            for each, out in zip((ferried, self.referee), outs, strict=True):
                run_walk(each, walk, held, ops.buffer_of(out, "out"))
            compare(*outs)

        for name, (_, coding) in {**coded_merges.WRITTEN, **coded_merges.READ}.items():
            rng = agreement.rng_of(self.seed, name)
            if name in coded_merges.WRITTEN and not ferried.refuses_coding(coding):
                yield "codes", f"to {name}", partial(write, name, rng)
            yield "codes", f"from {name}", partial(read, name, rng)

    def _files(self) -> Iterator[Check]:
        """Whole merges of files by way of the device, whole and resumed, dense and coded."""
        device = TorchDevice(str(self._where)) if self._where.type == "cuda" else HostDevice()

        def dense(method: str) -> None:
            with tempfile.TemporaryDirectory() as name:
                device_merges.write_sharded_family(Path(name))
                device_merges.check_merge(Path(name), method, self.subject.kernels, device)

        def coded(quantize: str) -> None:
            with tempfile.TemporaryDirectory() as name:
                device_merges.write_quantised_family(Path(name))
                device_merges.check_quantised_merge(
                    Path(name), quantize, self.subject.kernels, device
                )

        for method in device_merges.METHODS:
            yield "files", method, _asserted(dense, method)
        for quantize in ("nf4-dq", "int4-asym", "nvfp4", "fp8-tensor", "gptq", "awq"):
            yield "files", f"ties to {quantize}", _asserted(coded, quantize)

    def _methods(self, shape: tuple[int, int], dtype: torch.dtype) -> Iterator[Check]:
        """Every registered method through `merge_tensors`, on the device and on the host."""
        n = shape[0] * shape[1]
        for spec in api.methods().values():
            least, most = spec.n_inputs
            k = min(max(3, least), most or 3)
            if spec.base_is_operand and spec.base == "required":
                k -= 1
            made = family(self.subject.device, n, k, self.seed + n, dtype)
            placed = cases.Operands(
                None if made.base is None else made.base.view(shape),
                [e.view(shape) for e in made.experts],
            )
            host = to_host(placed)
            weights = {p.name: 0.5 for p in spec.params if p.name == "weight"}
            for given in VARIATIONS.get(spec.name, [weights]):

                def check(
                    spec: Any = spec,
                    given: dict[str, Any] = given,
                    placed: cases.Operands = placed,
                    host: cases.Operands = host,
                ) -> None:
                    def merged(held: cases.Operands, backend: str) -> Any:
                        base = None if spec.base == "ignored" else held.base
                        return api.merge_tensors(
                            base,
                            held.experts,
                            method=spec.name,
                            backend=backend,
                            seed=self.seed,
                            **given,
                        )

                    with self.subject.served() as name:
                        got = merged(placed, name)
                    want = merged(host, self.referee.name)
                    if _decomposes(spec, given, host):
                        near(got, want, host.base)
                    else:
                        compare(got, want)

                yield "method " + spec.name, f"{list(shape)} {dtype} K={k} {given}", check


def _asserted(check: Callable[..., None], *arguments: Any) -> Callable[[], None]:
    """Return a check of which what it asserts is told as a mismatch, in one line."""

    def run() -> None:
        try:
            check(*arguments)
        except AssertionError as wrong:
            text = " ".join(str(wrong).split())[:300]
            raise Mismatch(0, text or "an assertion failed", "as the referee", 1, 1) from wrong

    return run


def _decomposes(spec: Any, given: dict[str, Any], held: cases.Operands) -> bool:
    """Return whether a method decomposes a matrix like these: LAPACK and cuSOLVER round apart."""
    if spec.cost is None:
        return False
    like, k = held.experts[0], len(held.experts)
    params = keyword_params(spec, k, True, given)
    context = TensorContext("w", tuple(like.shape), k, True, 0, like.numel(), None)
    return spec.scope_for(params, context) is Scope.MATRIX


def near(got: Any, want: Any, base: torch.Tensor | None) -> None:
    """Raise Mismatch unless a merged matrix differs by no more than an ulp, or 1 % of what it changes, on
    average 0.1 %. One element in 100 000 may differ by more: elections that are all but tied."""
    a, b = got.detach().cpu().double(), want.double()
    change = b - base.double() if base is not None else b
    size = float(change.square().mean().sqrt())
    apart = (a - b).abs()
    ulp = 2 * torch.finfo(want.dtype).eps * b.abs()
    wrong = (apart > ulp + 1e-2 * size).reshape(-1).nonzero()
    beyond = (apart - ulp).clamp_min(0).square().mean().sqrt()
    if len(wrong) > a.numel() // 100_000 or not float(beyond) <= 1e-3 * size:
        i = int(wrong[0]) if len(wrong) else int(apart.argmax())
        raise Mismatch(i, float(a.reshape(-1)[i]), float(b.reshape(-1)[i]), len(wrong), a.numel())


def _large_statistics(n: int, cols: int, k: int) -> Iterator[Any]:
    yield OrderStatistic([[n * 3 // 10]] * k)
    yield OrderStatistic([[n // 100, n * 9 // 10]] * k)
    yield OrderStatistic(of="variance", fraction_of_nonzero=0.3)
    half = np.full((k, 1), 0.5)
    cut_like = Keep(drop=Drop([0.5] * k, list(range(k))))
    yield Moments("abs", cut_like)
    yield Moments("square")
    yield Moments("max")
    yield Gram()
    yield SignBalance(Keep(), half, Elect("mass"))
    if cols < n:
        yield OrderStatistic([[cols // 4]] * k, scope="row")
        yield Gram(axis=Axis.ROW)
        yield Gram(axis=Axis.COLUMN)


def _kernel_of(request: Any) -> str:
    """Return the kernel that a statistic runs on, as timing names it."""
    if isinstance(request, OrderStatistic):
        return "row order" if request.scope == "row" else f"order of {request.of}"
    return type(request).__name__.lower()


def _stages(plan: Any) -> str:
    """Say a plan in a line: arrays of per-unit values are left out."""
    text = str(replace(plan, coefficient=None) if isinstance(plan, Walk) else plan)
    return text if len(text) < 400 else text[:400] + "..."


def verify(
    verification: Verification, left: Callable[[], float], say: Callable[[str], None]
) -> Verdict:
    """Run the checks while there is time; say each failure as it comes."""
    label = verification.subject.label
    verdict = Verdict(label, verification.seed)
    shown: dict[str, int] = {}
    for kernel, case, check in verification.checks():
        if left() <= 0:
            verdict.left_out.append(f"{kernel}: {case} and all after it (time is up)")
            say(f"  {label}: time for verification is up at {kernel}: {case}")
            break
        verdict.checks += 1
        failure: dict[str, Any] = {"kernel": kernel, "case": case}
        try:
            check()
            continue
        except Mismatch as wrong:
            failure |= {"index": wrong.index, "got": str(wrong.got), "want": str(wrong.want)}
            text = str(wrong)
        except RecipeError as error:  # of a method that wants parameters which are not known here
            verdict.left_out.append(f"{kernel}: {case}: {error}")
            continue
        except Exception as error:  # one line for one check: the others still tell something
            text = f"{type(error).__name__}: {error}".split("\n")[0]
            frame = traceback.extract_tb(error.__traceback__)[-1]
            text += f" ({Path(frame.filename).name}:{frame.lineno})"
        verdict.failures.append(failure | {"text": text})
        if not verification.subject.device.alive():
            verdict.lost = True
            verdict.left_out.append(f"all after {kernel}: {case} (the device's context is lost)")
            say(f"  LOST {label} {kernel}: {text}; {case}")
            break
        shown[kernel] = shown.get(kernel, 0) + 1
        if shown[kernel] <= 5:
            say(f"  WRONG {label} {kernel}: {text}; {case}")
        if len(verdict.failures) >= 200:
            verdict.left_out.append(f"all after {kernel}: {case} (200 failures are enough)")
            break
    return verdict
