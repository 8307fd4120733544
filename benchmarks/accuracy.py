"""Measure how far float32 results of the SVD family lie from float64, and hold them to what is claimed.

    python benchmarks/accuracy.py            all kinds, shapes and seeds; a few minutes; writes results
    python benchmarks/accuracy.py --few      one shape, one seed and two experts of each; writes nothing

Every primitive of fastmerge.linalg and every method that decomposes is run on float32 inputs of several kinds
and compared with float64 that is given the same numbers: methods with their own oracle. An error is
||found - wanted||_F / ||wanted||_F. Claims are made by kind of input, 2 to 10 times what was the worst; what
is below 1e-9 beside float32 is not told apart. Exit status 1: a claim is exceeded. Results go to
benchmarks/results/accuracy_svd.json.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastmerge
from fastmerge.bench import environment
from fastmerge.linalg import Term, factored_svd, gram, polar, spectrum, svd
from fastmerge.linalg.leading import refined
from fastmerge.linalg.quadratic import adam, filtered, heavy_ball
from fastmerge.linalg.tiny import principal
from fastmerge.methods.wudi import SMALLEST_EIGENVALUE, quadratic_of
from fastmerge.recipe import keyword_params
from fastmerge.registry import TensorContext, get

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ((192, 192), (192, 320), (320, 192))
LARGE = (800, 900)  # of the route that refines
SMALL = (9, 6)  # of the many that are decomposed at once; and transposed
SEEDS = (0, 1)
EXPERTS = (2, 4)

KINDS = {
    "well": "singular values from 1 to 2",
    "gauss": "independent normal values",
    "power": "s_i = 1 / i",
    "ill": "s_i from 1 down to 1e-6, evenly in the logarithm",
    "deficient": "rank a third of the shorter side",
    "lora": "products of rank 16",
}


def matrix(kind: str, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return a float32 matrix of a kind, its norm about 1."""
    m, n = shape
    r = min(shape)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    if kind == "gauss":
        a = normal(m, n)
    elif kind == "lora":
        # Factors in float32, as adapters have them; the product is rounded once more.
        a = normal(m, 16).float().double() @ normal(16, n).float().double()
    else:
        i = torch.arange(r, dtype=torch.float64)
        s = {
            "well": 2 - i / max(r - 1, 1),
            "power": 1 / (i + 1),
            "ill": 10 ** (-6 * i / max(r - 1, 1)),
            "deficient": (i < r // 3).double() * (2 - i / r),
        }[kind]
        u, v = (torch.linalg.qr(normal(size, r)).Q for size in shape)
        a = (u * s) @ v.mT
    return (a / a.norm()).float()


class Item(NamedTuple):
    """What is measured, and what is claimed. claims: kind -> the largest error; a kind that is not there is
    not measured. why: the reason of a claim that is wider than others'."""

    name: str
    errors: Callable[[str, tuple[int, int], int], Iterator[float]]
    claims: dict[str, float]
    shapes: Sequence[tuple[int, int]] = SHAPES
    why: str = ""


def claims(*values: float) -> dict[str, float]:
    """Return claims of all kinds, in the order of KINDS; one value: the same of all."""
    return dict(zip(KINDS, values * len(KINDS) if len(values) == 1 else values, strict=True))


def apart(found: Tensor, wanted: Tensor) -> float:
    """Return ||found - wanted||_F / ||wanted||_F."""
    size = float(wanted.double().norm())
    distance = float((found.double() - wanted.double()).norm())
    return distance / size if size else distance


# ---- primitives ------------------------------------------------------------------------------------


def on_matrix(
    compare: Callable[[Tensor], float],
) -> Callable[[str, tuple[int, int], int], Iterator[float]]:
    def errors(kind: str, shape: tuple[int, int], seed: int) -> Iterator[float]:
        yield compare(matrix(kind, shape, torch.Generator().manual_seed(seed)))

    return errors


def of_gram(a: Tensor) -> float:
    """Summed in another order: backwards."""
    wide = a.double().flip(1)
    return apart(gram(a), wide @ wide.mT)


def of_values(route: Any) -> Callable[[Tensor], float]:
    """Singular values, relative to the largest."""

    def compare(a: Tensor) -> float:
        wanted = torch.linalg.svdvals(a.double())
        return float((spectrum(a, route=route).s - wanted).abs().max() / wanted[0])

    return compare


def left_over(a: Tensor, k: int) -> float:
    """How much more k triples leave of the matrix than the best ones."""
    rest = float(torch.linalg.svdvals(a.double())[k:].norm())
    return max(float((a.double() - svd(a, k).product().double()).norm()) - rest, 0.0)


def of_truncation(a: Tensor) -> float:
    """A quarter of the triples."""
    return left_over(a, min(a.shape) // 4)


def of_refined(a: Tensor) -> float:
    """As many triples as the route that refines takes of such a matrix, at most a quarter."""
    wide = a if len(a) <= a.shape[1] else a.mT
    k = next(k for k in (min(a.shape) // 4, 40, 12) if refined([wide], k) is not None)
    return left_over(a, k)


def of_basis(a: Tensor) -> float:
    """Singular vectors of a quarter of the triples, those above noise: how far from orthonormal."""
    found = svd(a, min(a.shape) // 4, floor=None)
    worst = 0.0
    for basis in (found.u.mT, found.vh):
        g = basis.double() @ basis.double().mT
        worst = max(worst, float((g - torch.eye(len(g))).norm()) / math.sqrt(max(len(g), 1)))
    return worst


def polar_oracle(a: Tensor, rank: int) -> Tensor:
    u, _, vh = torch.linalg.svd(a.double(), full_matrices=False)
    return u[:, :rank] @ vh[:rank]


def of_polar(route: Any) -> Callable[[Tensor], float]:
    def compare(a: Tensor) -> float:
        found = polar(a, route=route)
        return apart(found.q, polar_oracle(a, found.rank))

    return compare


def of_orthogonality(route: Any) -> Callable[[Tensor], float]:
    """How far Q Q^T is from a projector, whatever Q should be: measured here in float64."""

    def compare(a: Tensor) -> float:
        found = polar(a, route=route)
        q = found.q.double() if len(found.q) <= found.q.shape[1] else found.q.double().mT
        g = q @ q.mT
        return float((g @ g - g).norm()) / math.sqrt(max(found.rank, 1))

    return compare


def of_factors(kind: str, shape: tuple[int, int], seed: int) -> Iterator[float]:
    generator = torch.Generator().manual_seed(seed)
    m, n = shape
    terms = [
        Term(
            weight,
            torch.randn(m, 16, generator=generator),
            torch.randn(16, n, generator=generator),
        )
        for weight in (0.5, 1.0, -2.0)
    ]
    dense = torch.stack([t.scale * t.b.double() @ t.a.double() for t in terms]).sum(0)
    wanted = svd(dense, 16, route="lapack").product()
    yield apart(factored_svd(terms, 16).svd.product(), wanted)


def of_adam(kind: str, shape: tuple[int, int], seed: int) -> Iterator[float]:
    """30 steps on what WUDI makes of two matrices."""
    start, c, d = quadratic(kind, shape, seed)
    wanted = adam(start.double(), c.double(), d.double(), lr=1e-5, steps=30)
    yield apart(adam(start, c, d, lr=1e-5, steps=30), wanted)


def of_filtered(kind: str, shape: tuple[int, int], seed: int) -> Iterator[float]:
    """What descent with momentum ends at, beside its steps one by one."""
    start, c, d = quadratic(kind, shape, seed)
    lr, momentum, steps = 0.1, 0.9, 100
    values, vectors = torch.linalg.eigh(c.double())
    kept = values >= SMALLEST_EIGENVALUE
    left = heavy_ball(lr, momentum, steps)
    found = filtered(start, d, values[kept], vectors[:, kept], left)
    x, v = start.double(), torch.zeros_like(start, dtype=torch.float64)
    for _ in range(steps):
        v = momentum * v + 2 * (x @ c.double() - d.double())
        x = x - lr * v
    yield apart(found, x)


def quadratic(kind: str, shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    start, c, d = quadratic_of([matrix(kind, shape, generator) for _ in range(2)], [1.0, 1.0])
    return start, c.float(), d


def of_principal(kind: str, shape: tuple[int, int], seed: int) -> Iterator[float]:
    """64 matrices at once, by their mean and two principal directions."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.stack([matrix(kind, shape, generator) for _ in range(64)])
    mean = x.double().mean(2, keepdim=True)
    u, s, vh = torch.linalg.svd(x.double() - mean, full_matrices=False)
    yield apart(principal(x, 2).product(), mean + (u[..., :2] * s[:, None, :2]) @ vh[:, :2])


def of_experts(kind: str, shape: tuple[int, int], seed: int) -> Iterator[float]:
    """Sub-MoE's step over a quarter of the rows."""
    generator = torch.Generator().manual_seed(seed)
    for n_experts in EXPERTS:
        w = [matrix(kind, shape, generator) for _ in range(n_experts)]
        u, _, _ = torch.linalg.svd(torch.cat([x.double() for x in w], 1), full_matrices=False)
        u = u[:, : shape[0] // 4]
        wanted = u @ (u.mT @ torch.stack([x.double() for x in w]).mean(0))
        yield apart(fastmerge.ops.merge_experts(w, rank=shape[0] // 4), wanted)


FALLS_BACK = (
    "ill, deficient and lora have directions that are rounding noise: it falls back to gram"
)

PRIMITIVES = [
    Item("gram", on_matrix(of_gram), claims(5e-15), [(64, 3000)]),
    Item(
        "singular values by gram, of the largest",
        on_matrix(of_values("gram")),
        claims(5e-15, 2e-13, 8e-15, 1e-10, 5e-8, 5e-8),
        why="a value that is zero comes out as the root of eps64, at most",
    ),
    Item(
        "singular values by lapack, of the largest",
        on_matrix(of_values("lapack")),
        claims(3e-6, 3e-6, 1e-6, 3e-6, 3e-6, 3e-6),
    ),
    Item(
        "truncation, more left than by the best",
        on_matrix(of_truncation),
        claims(2e-9, 1e-9, 3e-9, 5e-9, 2e-9, 1e-6),
        why="of lora nothing is left by the best: what shows is the rounding of the product",
    ),
    Item("truncation, refined", on_matrix(of_refined), claims(1e-9), [LARGE]),
    Item("truncated bases, orthonormal", on_matrix(of_basis), claims(1e-7)),
    Item("SVD of a sum of factors", of_factors, {"lora": 2e-14}),
    Item(
        "polar factor, newton",
        on_matrix(of_polar("newton")),
        claims(5e-6, 1e-5, 1e-5, 1e-7, 1e-7, 1e-7),
        why=FALLS_BACK,
    ),
    Item(
        "polar factor, express",
        on_matrix(of_polar("express")),
        claims(1e-5, 1e-5, 1e-5, 1e-7, 1e-7, 1e-7),
        why=FALLS_BACK,
    ),
    Item("polar factor, gram", on_matrix(of_polar("gram")), claims(1e-7)),
    Item(
        "polar factor, svd",
        on_matrix(of_polar("svd")),
        claims(5e-6, 5e-6, 1e-5, 5e-2, 4e-6, 4e-6),
        why="a decomposition in float32 tells the directions of s_i to about eps32 s_1 / s_i",
    ),
    Item(
        "polar factor, newton, orthonormal",
        on_matrix(of_orthogonality("newton")),
        claims(3e-6, 2e-6, 2e-6, 1e-7, 5e-8, 2e-8),
    ),
    Item(
        "polar factor, express, orthonormal",
        on_matrix(of_orthogonality("express")),
        claims(3e-6, 3e-6, 3e-6, 1e-7, 5e-8, 2e-8),
    ),
    Item(
        "polar factor, gram, orthonormal",
        on_matrix(of_orthogonality("gram")),
        claims(1e-7, 1e-7, 1e-7, 1e-7, 5e-8, 2e-8),
    ),
    Item(
        "polar factor, svd, orthonormal",
        on_matrix(of_orthogonality("svd")),
        claims(6e-6, 6e-6, 6e-6, 5e-6, 5e-6, 4e-6),
    ),
    Item("quadratic, Adam", of_adam, claims(5e-7, 5e-7, 5e-6, 1e-6, 5e-7, 1e-6)),
    Item("quadratic, filtered", of_filtered, claims(2e-6, 2e-6, 5e-5, 1e-5, 3e-6, 1e-5)),
    Item(
        "principal directions of small matrices",
        of_principal,
        claims(2e-7),
        [SMALL, SMALL[::-1]],
    ),
    Item("Sub-MoE", of_experts, claims(5e-5, 2e-5, 2e-6, 1e-5, 2e-5, 1e-6), [LARGE]),
]


# ---- methods ---------------------------------------------------------------------------------------


def of_method(
    method: str, params: dict[str, Any] | None = None
) -> Callable[[str, tuple[int, int], int], Iterator[float]]:
    """Return what measures a method: merges of 2 and 4 experts, whose base is zero."""

    def errors(kind: str, shape: tuple[int, int], seed: int) -> Iterator[float]:
        generator = torch.Generator().manual_seed(seed)
        for n_experts in EXPERTS:
            deltas = [matrix(kind, shape, generator) for _ in range(n_experts)]
            yield method_error(method, params or {}, deltas)

    return errors


def method_error(method: str, params: dict[str, Any], deltas: Sequence[Tensor]) -> float:
    """Return how far a float32 merge of deltas lies from the method's oracle."""
    spec = get(method)
    base = torch.zeros_like(deltas[0])
    found = fastmerge.merge_tensors(base, list(deltas), method=method, **params)
    assert isinstance(found, Tensor) and spec.oracle is not None
    resolved = keyword_params(spec, len(deltas), True, params)
    context = TensorContext("w", tuple(base.shape), len(deltas), n_model=base.numel())
    return apart(found, spec.oracle(base.double(), [d.double() for d in deltas], resolved, context))


METHODS = [
    Item("tsv_m", of_method("tsv_m"), claims(1e-5, 1e-5, 1e-5, 1e-5, 1e-5, 2e-6)),
    Item("iso_c", of_method("iso_c"), claims(8e-6, 8e-6, 2e-5, 2e-5, 8e-6, 4e-7)),
    Item(
        "iso_cts",
        of_method("iso_cts"),
        claims(1e-5, 1e-5, 2e-5, 2e-4, 1e-5, 3e-6),
        why="what is left of a delta beside the common space is rounded to float32",
    ),
    Item("star", of_method("star"), claims(6e-7)),
    Item(
        "subspace_boosting",
        of_method("subspace_boosting"),
        claims(4e-7, 4e-7, 2e-6, 2e-5, 5e-7, 2e-7),
    ),
    Item("svc", of_method("svc"), claims(1e-6, 1e-6, 2e-6, 2e-6, 1e-6, 2e-6)),
    Item("lore", of_method("lore", {"mu": 0.01}), claims(4e-7)),
    Item("twin_merging", of_method("twin_merging"), claims(2e-6, 1e-6, 3e-6, 1e-6, 1e-6, 1e-6)),
    Item("adarank", of_method("adarank", {"rank_fraction": 0.25}), claims(8e-7)),
    Item(
        "wudi, Adam, 30 steps",
        of_method("wudi", {"steps": 30}),
        claims(6e-7, 8e-7, 8e-6, 2e-6, 8e-7, 2e-6),
    ),
    *(
        Item(f"wudi, {solver}", of_method("wudi", {"solver": solver}), claims(1e-7))
        for solver in ("exact", "swudi", "aswudi")
    ),
    Item("optmerge", of_method("optmerge"), claims(2e-7, 2e-7, 1e-6, 4e-7, 2e-7, 3e-7)),
    Item("opcm", of_method("opcm"), claims(3e-6, 2e-6, 2e-5, 4e-5, 1e-6, 4e-7)),
    Item(
        "knots",
        of_method("knots"),
        claims(2e-6, 2e-6, 5e-3, 5e-5, 2e-6, 1e-6),
        why="a coordinate whose sum over the experts nearly cancels may elect the other sign",
    ),
    Item(
        "dop, 10 steps",
        of_method("dop", {"steps": 10}),
        claims(2e-4, 2e-4, 8e-6, 1e-4, 5e-5, 1e-4),
        why="Adam's steps are as long where a gradient is rounding as where it is large",
    ),
]


# ---- all of it -------------------------------------------------------------------------------------


def measured(item: Item, few: bool = False) -> Iterator[dict[str, Any]]:
    """Yield a row for each kind that an item has a claim on: the claim and the worst error."""
    for kind, claim in item.claims.items():
        worst = 0.0
        for shape in item.shapes[:1] if few else item.shapes:
            for seed in SEEDS[:1] if few else SEEDS:
                found = item.errors(kind, shape, seed)
                worst = max([worst, *(islice(found, 1) if few else found)])
        yield {"item": item.name, "kind": kind, "claim": claim, "worst": worst}


def main() -> None:
    """Measure, print a table, write it; stop with an error where a claim is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--few", action="store_true", help="one shape and one seed of each kind")
    parser.add_argument(
        "--items", nargs="*", default=[], help="those whose names hold one of these"
    )
    results = ROOT / "benchmarks" / "results" / "accuracy_svd.json"
    parser.add_argument("--results", type=Path, default=results)
    options = parser.parse_args()
    # Most matrices here are small: torch's thread team costs several times what it gives.
    torch.set_num_threads(1)
    rows = []
    for item in (*PRIMITIVES, *METHODS):
        if options.items and not any(part in item.name for part in options.items):
            continue
        for row in measured(item, options.few):
            rows.append(row)
            over = "" if row["worst"] <= row["claim"] else "  EXCEEDED"
            figures = f"claimed {row['claim']:.0e}  worst {row['worst']:.1e}{over}"
            print(f"{row['item']:<42} {row['kind']:<10} {figures}", flush=True)
    if not options.items and not options.few:
        data = {**environment("fastmerge", "torch"), "kinds": KINDS, "rows": rows}
        data["why"] = {i.name: i.why for i in (*PRIMITIVES, *METHODS) if i.why}
        data["shapes"] = [list(shape) for shape in SHAPES]
        data["large"], data["seeds"], data["experts"] = list(LARGE), len(SEEDS), list(EXPERTS)
        options.results.write_text(json.dumps(data, indent=1) + "\n")
        print(f"wrote {options.results}")
    if any(not row["worst"] <= row["claim"] for row in rows):
        sys.exit("a claim is exceeded")


if __name__ == "__main__":
    main()
