"""Time the kernels one by one: ns per element, and share of memcpy's bandwidth in the same run.

    python benchmarks/bench_ops.py [--elements 4194304] [--runs 7] [--threads 1] [--only ties,order]

Operands are a bf16 base and bf16 experts near it, as fine-tuned checkpoints are. Every operation is first
verified against the reference backend on a shorter tensor of the same content. Times are the least of
`--runs`, so that other work on the machine shows as little as it can.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastmerge import _cpu, ops
from fastmerge.evaluate import Operands, run_walk, sweep_statistic
from fastmerge.stages import (
    Axis,
    Combine,
    Drop,
    Elect,
    Gram,
    Keep,
    Moments,
    OrderStatistic,
    RankedDrop,
    Trim,
    Walk,
)

COLS = 4096


@dataclass(frozen=True)
class Case:
    """`build(operands)` returns what to time; `bytes_per_element` is what it must move at least."""

    name: str
    n_experts: int
    bytes_per_element: float
    build: Callable[[Operands, Any], Callable[[], Any]]


def make(n: int, k: int) -> Operands:
    generator = torch.Generator().manual_seed(k)
    base = torch.randn(n, generator=generator) * 0.03
    experts = [(base + 0.002 * torch.randn(n, generator=generator)).bfloat16() for _ in range(k)]
    chunk = ops._chunk(base.bfloat16().view(-1, COLS), [e.view(-1, COLS) for e in experts])
    return Operands(chunk.base, chunk.experts, COLS, chunk.compute)


def ties(k: int, cuts: Any) -> Walk:
    return Walk(
        np.full((k, 1), 0.5),
        keep=Keep(trim=Trim(cuts[0])),
        elect=Elect("mass"),
        combine=Combine(divide_by="weight", divisor_weight=[0.5] * k),
    )


def walk_case(name: str, k: int, recipe: Callable[[Operands, Any], Walk]) -> Case:
    def build(operands: Operands, kernels: Any) -> Callable[[], Any]:
        walk = recipe(operands, kernels)
        held = torch.empty(operands.n, dtype=torch.bfloat16)
        out = ops.buffer_of(held, "out")

        def run() -> Any:
            run_walk(kernels, walk, operands, out)
            return held.view(torch.int16).numpy()

        return run

    return Case(name, k, 2.0 * (k + 2), build)


def statistic_case(name: str, k: int, request: Callable[[int], Any]) -> Case:
    def build(operands: Operands, kernels: Any) -> Callable[[], Any]:
        wanted = request(operands.n)
        return lambda: sweep_statistic(kernels, wanted, operands)

    return Case(name, k, 2.0 * (k + 1), build)


def cases() -> Iterator[Case]:
    for k in (2, 4, 8):
        yield walk_case(
            f"ties walk K={k}",
            k,
            lambda o, kernels, k=k: ties(
                k, sweep_statistic(kernels, OrderStatistic([[o.n * 3 // 10]] * k), o)
            ),
        )
    for k in (2, 4):
        yield walk_case(f"linear walk K={k}", k, lambda o, _, k=k: Walk(np.full((k, 1), 0.5)))
    yield walk_case(
        "dare walk K=4",
        4,
        lambda o, _: Walk(
            np.full((4, 1), 0.5), keep=Keep(drop=Drop([0.5] * 4, [1, 2, 3, 4], rescale=True))
        ),
    )
    yield walk_case(
        "dare ties walk K=4",
        4,
        lambda o, _: Walk(
            np.full((4, 1), 0.5),
            keep=Keep(drop=Drop([0.5] * 4, [1, 2, 3, 4], rescale=True)),
            elect=Elect("mass"),
        ),
    )
    yield walk_case(
        "della walk K=2",
        2,
        lambda o, _: Walk(
            np.full((2, 1), 0.5),
            keep=Keep(drop=RankedDrop([0.3] * 2, [0.7] * 2, [1, 2], Axis.ROW, rescale=True)),
        ),
    )
    for k in (2, 4, 8):
        yield statistic_case(
            f"order statistic K={k}", k, lambda n, k=k: OrderStatistic([[n * 3 // 10]] * k)
        )
    yield statistic_case(
        "order two ranks K=4", 4, lambda n: OrderStatistic([[n // 100, n * 9 // 10]] * 4)
    )
    yield statistic_case(
        "variance cut K=4", 4, lambda n: OrderStatistic(of="variance", fraction_of_nonzero=0.3)
    )
    yield statistic_case("row order K=4", 4, lambda n: OrderStatistic([[1000]] * 4, scope="row"))
    yield statistic_case("moments K=4", 4, lambda n: Moments("abs"))
    yield statistic_case("gram K=4", 4, lambda n: Gram())


def plain(x: Any) -> Any:
    """Reduce any result to arrays that compare bit by bit."""
    if isinstance(x, list):
        return [a for cut in x for a in (cut.value, cut.last_tie)]
    if hasattr(x, "__dataclass_fields__"):
        return [getattr(x, f) for f in x.__dataclass_fields__]
    return [np.asarray(x)]


def verify(case: Case) -> None:
    """Compare with the reference on a tensor long enough to take the same path."""
    operands = make(COLS * 80, case.n_experts)
    results = [case.build(operands, ops.choose("cpu", name))() for name in ("cpu", "reference")]
    for a, b in zip(*map(plain, results), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=case.name)


def least(run: Callable[[], Any], runs: int) -> float:
    best = float("inf")
    for _ in range(runs):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--elements", type=int, default=1 << 22)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="comma-separated parts of case names")
    args = parser.parse_args()
    n = args.elements // COLS * COLS
    threads = _cpu.set_threads(args.threads)
    kernels = ops.choose("cpu", "cpu")

    source, target = (np.ones(1 << 26, np.uint8) for _ in range(2))
    copied = least(lambda: np.copyto(target, source), args.runs)
    bandwidth = 2 * source.nbytes / copied
    print(f"{_cpu.isa()}, {threads} thread(s), {n} elements; memcpy {bandwidth / 1e9:.1f} GB/s")
    wanted = [w for w in args.only.split(",") if w]
    for case in cases():
        if wanted and not any(w in case.name for w in wanted):
            continue
        verify(case)
        run = case.build(make(n, case.n_experts), kernels)
        seconds = least(run, args.runs)
        share = case.bytes_per_element * n / seconds / bandwidth
        print(
            f"{case.name:24} {seconds / n * 1e9:8.3f} ns/element {share:6.1%} of memcpy", flush=True
        )


if __name__ == "__main__":
    main()
