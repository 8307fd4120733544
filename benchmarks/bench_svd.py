"""Time the SVD family on one matrix, beside FusionBench's functions and plain torch, in one run.

    pip install --no-deps --target DIR fusion-bench
    python benchmarks/bench_svd.py --rivals DIR            three shapes, 4 and 8 experts: an hour
    python benchmarks/bench_svd.py --rivals DIR --shapes 1024x1024
    python benchmarks/bench_svd.py --rivals DIR --device cuda             on a GPU

Ours is `fastmerge.merge_tensors` on a base and experts in float32, deltas included; the rivals are given the
deltas. Of large matrices plain torch is left out where FusionBench takes the same steps. Loops of 300 steps
are timed over fewer, and scaled: `steps` says over how many. The floor is what LAPACK and BLAS alone take for
the decompositions and products that ours is made of, timed in the same run. Errors are of the merged delta,
against float64 oracles, where those end in sensible time."""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import svd_rivals
import torch
from svd_rivals import FusionBench
from torch import Tensor

import fastmerge
from fastmerge.bench import environment
from fastmerge.linalg import Term, factored_svd, gram, polar
from fastmerge.linalg.gram import add_square
from fastmerge.recipe import keyword_params
from fastmerge.registry import TensorContext, get

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ((1024, 1024), (2048, 5632), (4096, 4096))
EXPERTS = (4, 8)
#: Elements beyond which no oracle is run, and loops are timed over few steps.
LARGE = 2**20
STEPS = 300
#: Of the adapters, and of the part of a full fine-tune's change that is not noise.
RANK = 16


@dataclass(frozen=True)
class Inputs:
    """Experts of one matrix: changes of full rank, and adapters. deltas, products: what they change."""

    shape: tuple[int, int]
    base: Tensor
    deltas: list[Tensor]
    factors: list[tuple[Tensor, Tensor]]
    products: list[Tensor]


def inputs(shape: tuple[int, int], n_experts: int, device: str = "cpu", seed: int = 0) -> Inputs:
    """Draw experts: a part of rank 16 in noise of about its size, as changes of fine-tunes look."""
    generator = torch.Generator().manual_seed(seed)
    m, n = shape

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    factors = [(normal(m, RANK) * 0.01, normal(RANK, n) * 0.01) for _ in range(n_experts)]
    products = [b @ a for b, a in factors]
    deltas = [p + normal(m, n) * 3e-4 for p in products]
    return Inputs(shape, normal(m, n) * 0.02, deltas, factors, products)


# ---- what is timed ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One row. ours, rivals: what returns the merged delta, or what stands for it; rivals: of so many steps.

    steps: of a rival's loop that are timed; what stays when there are none does not grow with them.
    floor: decompositions and products of ours alone. oracle: in float64. added: ours is added to the base.
    """

    name: str
    ours: Callable[[], Tensor]
    rivals: dict[str, Callable[[int], Tensor]]
    floor: Callable[[], object]
    oracle: Callable[[], Tensor] | None = None
    steps: int | None = None
    added: bool = True


def merged(
    method: str, given: Inputs, adapters: bool = False, **params: Any
) -> Callable[[], Tensor]:
    """Return a merge through the public function; the base is taken off to compare."""
    experts: list[Any] = [given.base + d for d in given.deltas]
    if adapters:
        experts = [fastmerge.LoraTensor(given.base, b, a) for b, a in given.factors]

    def run() -> Tensor:
        done = fastmerge.merge_tensors(given.base, experts, method=method, **params)
        assert isinstance(done, Tensor)
        return done

    return run


def oracle(method: str, deltas: list[Tensor], **params: Any) -> Callable[[], Tensor]:
    spec = get(method)
    resolved = keyword_params(spec, len(deltas), True, params)

    def run() -> Tensor:
        context = TensorContext("w", tuple(deltas[0].shape), len(deltas), n_model=deltas[0].numel())
        assert spec.oracle is not None
        wide = [d.double().cpu() for d in deltas]
        return spec.oracle(torch.zeros_like(wide[0]), wide, resolved, context)

    return run


def gram_and_eigh(a: Tensor, times: int) -> None:
    """What a decomposition over the short side takes of LAPACK and BLAS at least, in float32."""
    for _ in range(times):
        torch.linalg.eigh(a @ a.mT)


def half_grams_and_eigh(parts: list[Tensor]) -> None:
    """What the directions that some matrices share take of LAPACK and BLAS at least, in float32."""
    square = parts[0].new_empty((len(parts[0]), len(parts[0])))
    for j, part in enumerate(parts):
        add_square(square, part, j > 0)
    torch.linalg.eigh(square)


def decompose_factors(b: Tensor, a: Tensor) -> None:
    """What the triples of b a take of LAPACK and BLAS at least: the Gram matrices of the factors in float64,
    a Cholesky factor, an eigendecomposition of their size."""
    lower = torch.linalg.cholesky(b.mT @ b)
    torch.linalg.eigh(lower.mT @ (a @ a.mT) @ lower)


def cases(given: Inputs, bench: FusionBench | None, rank: int, step_limit: int) -> list[Case]:
    """Return all rows of one shape and number of experts."""
    deltas, products = given.deltas, given.products
    k = len(deltas)
    short = deltas[0] if given.shape[0] <= given.shape[1] else deltas[0].mT
    square = short[:, : len(short)].contiguous()
    steps = min(STEPS, step_limit)  # of loops
    factors = (
        torch.cat([b for b, _ in given.factors], 1).double(),
        torch.cat([a for _, a in given.factors]).double(),
    )

    def rivals(torch_way: Callable[[int], Tensor], theirs: str = "", on: Any = deltas) -> Any:
        found = {"torch": torch_way}
        if bench is not None and theirs:
            run = getattr(bench, theirs)
            found["fusionbench"] = lambda n: (run(n) if theirs == "wudi" else run())(on)
        return found

    # A sum of full rank takes Newton's inverses, one with directions that are noise a decomposition.
    total = functools.reduce(torch.add, deltas)
    total = total if len(total) <= total.shape[1] else total.mT
    iterates = polar(total).route == "newton"

    def inverses(times: int) -> None:
        for _ in range(times):
            torch.linalg.inv(square)

    def flattened(wide: Tensor) -> None:
        """Of a matrix that is wider than high, with the Cholesky factor that stands for it."""
        inverses(2 if wide.shape[1] > len(wide) else 5)
        if wide.shape[1] > len(wide):
            lower = torch.linalg.cholesky(gram(wide))
            for part in wide.split(1024, 1):
                _ = (
                    square
                    @ torch.linalg.solve_triangular(lower, part.double(), upper=False).float()
                )

    def projected(rank: int) -> Tensor:
        """The average, onto so many directions."""
        basis = short[:, :rank]
        return basis @ (basis.mT @ short)

    return [
        Case(
            "tsv_m",
            merged("tsv_m", given),
            rivals(lambda _: svd_rivals.tsv_m(deltas), "tsv_m"),
            lambda: (gram_and_eigh(short, k), inverses(2 * 5)),
            oracle("tsv_m", deltas),
        ),
        Case(
            "iso_c",
            merged("iso_c", given),
            rivals(lambda _: svd_rivals.iso_c(deltas), "iso_c"),
            lambda: flattened(total) if iterates else torch.linalg.eigh(gram(total)),
            oracle("iso_c", deltas),
        ),
        Case(
            "wudi, 300 steps",
            merged("wudi", given),
            rivals(lambda n: svd_rivals.wudi(deltas, n), "wudi"),
            lambda: [short.mT @ short for _ in range(2)],
            steps=steps,
        ),
        Case(
            "optmerge",
            merged("optmerge", given),
            rivals(lambda n: svd_rivals.optmerge(deltas, n)),
            lambda: gram_and_eigh(short, k + 1),
            oracle("optmerge", deltas),
            steps=steps,
        ),
        Case(
            "knots of adapters",
            merged("knots", given, adapters=True),
            rivals(lambda _: svd_rivals.knots(products), "knots", products),
            lambda: given.base + given.factors[0][0] @ given.factors[0][1],
            oracle("knots", products),
        ),
        Case(
            "tsv_m of adapters",
            merged("tsv_m", given, adapters=True),
            rivals(lambda _: svd_rivals.tsv_m(products), "tsv_m", products),
            lambda: given.base + given.factors[0][0] @ given.factors[0][1],
            oracle("tsv_m", products),
        ),
        Case(
            "one adapter of several",
            lambda: factored_svd([Term(1.0, b, a) for b, a in given.factors], rank).svd.u,
            rivals(lambda _: svd_rivals.lora_svd(products, rank)[0]),
            lambda: decompose_factors(*factors),
        ),
        Case(
            "Sub-MoE",
            lambda: fastmerge.ops.merge_experts(deltas, rank=len(square) // 4),
            rivals(lambda _: svd_rivals.sub_moe(deltas, len(square) // 4)),
            lambda: (half_grams_and_eigh(deltas), projected(len(square) // 4)),
            lambda: svd_rivals.sub_moe([d.double().cpu() for d in deltas], len(square) // 4),
            added=False,
        ),
    ]


# ---- timing ----------------------------------------------------------------------------------------


def finish() -> None:
    """Wait for what a GPU has been given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], repeat: int) -> float:
    """Return the least wall time of some runs; one that takes over 2 s is run once."""
    best = math.inf
    for _ in range(repeat):
        finish()
        start = time.perf_counter()
        run()
        finish()
        best = min(best, time.perf_counter() - start)
        if best > 2:
            break
    return best


def apart(got: Tensor, want: Tensor) -> float:
    want = want.double().cpu()
    return float((got.double().cpu() - want).norm() / want.norm())


def measured(case: Case, given: Inputs, repeat: int) -> dict[str, Any]:
    """Time one row; errors of matrices that are not large."""
    row: dict[str, Any] = {
        "method": case.name,
        "shape": list(given.shape),
        "experts": len(given.deltas),
    }
    case.ours()
    row["seconds"] = seconds(case.ours, repeat)
    row["floor_seconds"] = seconds(case.floor, repeat)
    for name, rival in case.rivals.items():
        steps = case.steps or 0
        row[name] = taken = seconds(functools.partial(rival, steps), repeat)
        if 0 < steps < STEPS:
            start = seconds(functools.partial(rival, 0), repeat)
            row["steps"] = steps
            row[name] = start + (taken - start) * STEPS / steps
    if case.oracle is not None and given.shape[0] * given.shape[1] <= LARGE:
        want = case.oracle()
        found = case.ours().double()
        row["error"] = apart(found - given.base.double() if case.added else found, want)
        for name, rival in case.rivals.items():
            averages = name == "fusionbench" and case.name.startswith("knots")  # it elects no signs
            if (case.steps is None or case.steps == STEPS) and not averages:
                row[f"{name}_error"] = apart(rival(steps), want)
    return row


def show(row: dict[str, Any]) -> None:
    """Print a row: seconds, ratios, errors."""
    m, n = row["shape"]
    text = f"{row['method']:<24} {m:>5} x {n:<5} K={row['experts']}  {row['seconds']:8.3f} s"
    text += f"  (floor {row['floor_seconds']:.3f} s)"
    for name in ("fusionbench", "torch"):
        if name in row:
            text += f"  {name} {row[name]:.2f} s, {row[name] / row['seconds']:.1f}x"
            if f"{name}_error" in row:
                text += f" (error {row[name + '_error']:.1e})"
    if "error" in row:
        text += f"  ours {row['error']:.1e}"
    if "steps" in row:
        text += f"  [from {row['steps']} of {STEPS} steps]"
    print(text, flush=True)


def main() -> None:
    """Time all rows and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rivals", type=Path, help="folder with fusion_bench")
    parser.add_argument(
        "--methods", nargs="*", default=[], help="rows whose names hold one of these"
    )
    parser.add_argument("--experts", type=int, nargs="*", default=list(EXPERTS))
    parser.add_argument("--shapes", nargs="*", default=[f"{m}x{n}" for m, n in SHAPES])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, help="default: torch's own")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: all of it on a GPU")
    parser.add_argument(
        "--results", type=Path, help="benchmarks/results/svd.json, or svd-<card>.json of a GPU"
    )
    options = parser.parse_args()
    card = torch.cuda.get_device_name() if options.device != "cpu" else ""
    name = re.sub(r"\W+", "-", f"svd {card.lower().removeprefix('nvidia ')}".strip())
    results = options.results or ROOT / "benchmarks" / "results" / f"{name}.json"
    if options.threads:
        torch.set_num_threads(options.threads)
    bench = FusionBench(options.rivals, options.device) if options.rivals else None
    if bench is None:
        print("without FusionBench: give --rivals a folder that holds it")
    data: dict[str, Any] = {
        **environment("fastmerge", "torch"),
        "threads": torch.get_num_threads(),
        "device": card or "cpu",
        "rank": RANK,
        "repeat": options.repeat,
        "steps": STEPS,
        "rows": [],
    }
    if bench is not None:
        data["versions"]["fusion-bench"] = bench.version
    results.parent.mkdir(parents=True, exist_ok=True)
    for shape in [(int(m), int(n)) for m, n in (text.split("x") for text in options.shapes)]:
        large = shape[0] * shape[1] > LARGE
        for n_experts in options.experts:
            given = inputs(shape, n_experts, options.device)
            for case in cases(given, bench, RANK, 3 if large else 30):
                if options.methods and not any(part in case.name for part in options.methods):
                    continue
                if large and case.name.startswith("wudi"):
                    continue  # ours takes all 300 steps, of minutes
                if large and "fusionbench" in case.rivals:
                    del case.rivals["torch"]
                data["rows"].append(measured(case, given, options.repeat))
                show(data["rows"][-1])
                results.write_text(json.dumps(data, indent=1) + "\n")
    print(f"wrote {results}")


if __name__ == "__main__":
    main()
