"""Measure how far float32 results of the SVD family lie from float64, and hold them to what is claimed.

    python benchmarks/accuracy.py            all kinds, shapes and seeds; a minute or two; writes results
    python benchmarks/accuracy.py --few      one shape and one seed of each

Every primitive of fastmerge.linalg and every method that decomposes is run on float32 inputs of several kinds
and compared with float64: methods with their own oracle, given the same float32 numbers. An error is
||found - wanted||_F / ||wanted||_F. A claim is made by kind: what weights the least directions of a matrix as
much as the largest (polar factors, Iso-C, whitening) cannot know directions that the rounding of the input
has changed, so that it is off by about eps32 s_1 / s_min where these are small. Exit status 1: a claim is
exceeded. Results go to benchmarks/results/accuracy_svd.json.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastmerge
from fastmerge.bench import environment
from fastmerge.linalg import Term, factored_svd, gram, polar, spectrum, svd
from fastmerge.recipe import keyword_params
from fastmerge.registry import TensorContext, get

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ((192, 192), (192, 320), (320, 192))
LARGE = (800, 900)  # of the route that refines
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
    """What is measured, and what is claimed. claims: kind -> the largest error; a kind that is not there
    has no claim, with the reason in `why`."""

    name: str
    errors: Callable[[str, tuple[int, int], int], Iterator[float]]
    claims: dict[str, float]
    shapes: Sequence[tuple[int, int]] = SHAPES
    why: str = ""


def claims(value: float, **others: float) -> dict[str, float]:
    """Return one claim for all kinds, and others."""
    return dict.fromkeys(KINDS, value) | others


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


def of_values(a: Tensor) -> float:
    """Singular values, relative to the largest."""
    wanted = torch.linalg.svdvals(a.double())
    return float((spectrum(a).s - wanted).abs().max() / wanted[0])


def of_truncation(a: Tensor) -> float:
    """A quarter of the triples: how much more they leave of the matrix than the best ones."""
    k = min(a.shape) // 4
    rest = float(torch.linalg.svdvals(a.double())[k:].norm())
    return max(float((a.double() - svd(a, k).product().double()).norm()) - rest, 0.0)


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


NO_CLAIM = "ill: the rounding of the input decides what becomes of the least directions"
_POLAR = {"well": 5e-6, "gauss": 1e-5, "power": 1e-5}

PRIMITIVES = [
    Item("gram", on_matrix(of_gram), claims(1e-15), [(64, 3000)]),
    Item(
        "singular values, of the largest",
        on_matrix(of_values),
        claims(2e-13, ill=1e-10, deficient=5e-8, lora=5e-8),
    ),
    Item(
        "truncation, more left than by the best", on_matrix(of_truncation), claims(5e-9, lora=1e-6)
    ),
    Item("truncation, refined", on_matrix(of_truncation), claims(5e-9, lora=1e-6), [LARGE]),
    Item("truncated bases, orthonormal", on_matrix(of_basis), claims(1e-6)),
    Item("SVD of a sum of factors", of_factors, {"lora": 2e-14}),
    *(
        Item(f"polar factor, {route}", on_matrix(of_polar(route)), accuracy, why=NO_CLAIM)
        for route, accuracy in (
            ("newton", _POLAR | {"deficient": 2e-7, "lora": 2e-7}),
            ("express", _POLAR | {"deficient": 2e-7, "lora": 2e-7}),
            ("gram", dict.fromkeys((*_POLAR, "deficient", "lora"), 2e-7)),
            ("svd", _POLAR | {"deficient": 5e-6, "lora": 5e-6}),
        )
    ),
    *(
        Item(
            f"polar factor, {route}, orthonormal", on_matrix(of_orthogonality(route)), claims(most)
        )
        for route, most in (("newton", 3e-6), ("express", 5e-6), ("gram", 2e-7), ("svd", 1e-5))
    ),
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
    Item("tsv_m", of_method("tsv_m"), claims(1e-5, ill=1e-4, lora=2e-6)),
    Item("iso_c", of_method("iso_c"), claims(1e-5, power=5e-5, ill=5e-5, lora=5e-7)),
    Item("iso_cts", of_method("iso_cts"), claims(2e-5, power=1e-4, ill=5e-3)),
    Item("star", of_method("star"), claims(2e-6)),
    Item(
        "subspace_boosting",
        of_method("subspace_boosting"),
        claims(1e-4, power=2e-4, ill=1e-3, lora=2e-6),
    ),
    Item("svc", of_method("svc"), claims(5e-6, ill=1e-5)),
    Item("lore", of_method("lore", {"mu": 0.01}), claims(2e-6)),
    Item("twin_merging", of_method("twin_merging"), claims(5e-6)),
    Item("wudi, Adam", of_method("wudi", {"steps": 30}), claims(3e-6, power=1e-5)),
    Item("wudi, exact", of_method("wudi", {"solver": "exact"}), claims(2e-7)),
    Item("optmerge", of_method("optmerge"), claims(3e-6, power=1e-4, ill=2e-5)),
    Item("opcm", of_method("opcm"), claims(1e-4, ill=2e-2, lora=1e-6)),
    # A coordinate whose sum over the experts nearly cancels may elect the other sign.
    Item("knots", of_method("knots"), claims(3e-6, power=1e-2, ill=1e-2)),
    Item("dop", of_method("dop", {"steps": 10}), claims(2e-4, power=2e-5)),
]


# ---- all of it -------------------------------------------------------------------------------------


def measured(item: Item, few: bool = False) -> Iterator[dict[str, Any]]:
    """Yield a row for each kind that an item has a claim on: the claim and the worst error."""
    for kind, claim in item.claims.items():
        worst = 0.0
        for shape in item.shapes[:1] if few else item.shapes:
            for seed in SEEDS[:1] if few else SEEDS:
                worst = max(worst, *item.errors(kind, shape, seed))
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
    rows = []
    for item in (*PRIMITIVES, *METHODS):
        if options.items and not any(part in item.name for part in options.items):
            continue
        for row in measured(item, options.few):
            rows.append(row)
            over = "" if row["worst"] <= row["claim"] else "  EXCEEDED"
            figures = f"claimed {row['claim']:.0e}  worst {row['worst']:.1e}{over}"
            print(f"{row['item']:<42} {row['kind']:<10} {figures}", flush=True)
    if not options.items:
        data = {**environment("fastmerge", "torch"), "kinds": KINDS, "rows": rows}
        data["shapes"] = [list(shape) for shape in SHAPES]
        data["large"], data["seeds"], data["experts"] = list(LARGE), len(SEEDS), list(EXPERTS)
        options.results.write_text(json.dumps(data, indent=1) + "\n")
        print(f"wrote {options.results}")
    if any(not row["worst"] <= row["claim"] for row in rows):
        sys.exit("a claim is exceeded")


if __name__ == "__main__":
    main()
