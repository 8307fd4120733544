"""What methods of scope MATRIX share: which tensors they take for matrices, and what becomes of the others.

A tensor is decomposed where it has two dimensions and no rule takes it out: embeddings, output heads
and position tables have rows that are tokens, not outputs of a layer; kernels of convolutions have
more dimensions. What is not decomposed is averaged: out = base + lambda * mean_k(weight_k * delta_k).
A projection that several layers are fused into is one matrix, or, if asked for, as many as it was made of.

`matrix_method` declares such a method: its file is what it does with the deltas of one matrix.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastmerge.errors import RecipeError
from fastmerge.linalg import EPS, SVD, Term, factored_svd, svd
from fastmerge.methods.deltas import per_expert
from fastmerge.registry import Cost, Param, Params, Recipe, Scope, TensorContext, method
from fastmerge.stages import Add, Combine, Deltas, Joined, Matrices, Walk

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT = Param("weight", 1.0, "factor of the expert's delta before anything else", scope="expert")
LAMBDA = Param("lambda", 1.0, "scale of the merged delta")

#: Embeddings of tokens and positions, output heads, projections of texts.
TABLES = re.compile(
    r"(^|[._])(embed\w*|\w*embeddings?|wte|wpe|lm_head|head|classifier|score|text_projection|output)\.weight$"
    r"|(^|[._])(position_ids|class_embedding|position_embedding|positional_embedding|text_projection)$"
)

#: Projections whose rows are those of so many layers, one after the other.
FUSED = (
    (re.compile(r"(^|[._])(qkv|qkv_proj|Wqkv|in_proj)([._]weight)$"), 3),
    (re.compile(r"(^|[._])gate_up_proj\.weight$"), 2),
)

POLICY = (
    Param(
        "tables",
        "mean",
        "of embeddings, output heads and position tables: averaged, or decomposed as others are",
        kind=str,
        choices=("mean", "matrix"),
    ),
    Param(
        "conv",
        "mean",
        "kernels with more than two dimensions: averaged, or decomposed as [out, in * height * width]",
        kind=str,
        choices=("mean", "flatten"),
    ),
    Param(
        "fused",
        "whole",
        "rows of several layers (qkv of as many heads each, gate and up): one matrix, or one for each layer",
        kind=str,
        choices=("whole", "split"),
    ),
    Param(
        "exclude", None, "regular expression: tensors whose names it finds are averaged", kind=str
    ),
)

MODE = Param(
    "mode",
    "stable",
    "stable leaves out directions that are rounding noise; compat keeps them, as the authors' code does",
    kind=str,
    choices=("stable", "compat"),
)


def shape_of(params: Params, context: TensorContext) -> tuple[int, int] | None:
    """Return the shape of the matrix that a tensor is taken for, or None: it is averaged."""
    shape = context.shape
    if len(shape) < 2 or min(shape) == 0:
        return None
    if len(shape) > 2 and params.conv == "mean":
        return None
    if params.tables == "mean" and TABLES.search(context.name):
        return None
    if params.exclude is not None and _pattern(params.exclude).search(context.name):
        return None
    return shape[0], math.prod(shape[1:])


def layers_of(params: Params, context: TensorContext, shape: tuple[int, int]) -> int:
    """Return how many layers' rows a matrix holds that are to be decomposed on their own.

    Queries, keys and values have as many rows each where there are three times as many as columns.
    """
    if params.fused == "split":
        for pattern, n in FUSED:
            if pattern.search(context.name) and shape[0] % n == 0:
                return n if n == 2 or shape[0] == n * shape[1] else 1
    return 1


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise RecipeError(f"exclude is not a regular expression: {text!r} ({error})") from None


def scope_of(params: Params, context: TensorContext) -> Scope:
    """Return MATRIX for what is decomposed, ELEMENT for the rest."""
    return Scope.ELEMENT if shape_of(params, context) is None else Scope.MATRIX


# ---- declaring a method --------------------------------------------------------------------------

#: What a method does with the deltas of one matrix: at once, or as a recipe that waits for other tensors.
Decomposition = Callable[[Params, Deltas], Add | Generator[Joined, Any, Add]]
#: The same in float64, sharing nothing with it: from the deltas to what is added to the base.
MatrixOracle = Callable[[Sequence["Tensor"], Params], "Tensor"]


@dataclass(frozen=True)
class Plain:
    """What becomes of tensors that are no matrices: a walk, and its oracle."""

    walk: Callable[[Params], Walk]
    oracle: MatrixOracle


def _mean_walk(params: Params) -> Walk:
    n_experts = len(params.weight)
    combine = Combine(divide_by="constant", divisor=float(n_experts), lambda_=params.lambda_)
    return Walk(per_expert(params.weight), combine=combine)


def _mean_oracle(deltas: Sequence[Tensor], params: Params) -> Tensor:
    return weighted_sum(deltas, params.weight) * float(params.lambda_ / len(deltas))


AVERAGED = Plain(_mean_walk, _mean_oracle)


@dataclass(frozen=True)
class Flops:
    """Operations for a matrix [m, n], r the shorter side, in units of m n r.

    Counted, or, of TSV-M and Iso-C, fitted to what they took at the rate of an eigendecomposition.
    """

    each: float = 0.0  # of each expert
    once: float = 0.0


def matrix_method(
    name: str,
    *,
    params: Sequence[Param],
    blocks: float | Callable[[int], float],
    side: int | None = None,
    flops: Flops | Callable[[Params, tuple[int, int]], float],
    plain: Plain = AVERAGED,
    **fields: Any,
) -> Callable[[Decomposition], _Declared]:
    """Declare a method of scope MATRIX: the decorated function gives what is added to the base.

    Args:
        params: beside the policy of tensors, which all have.
        blocks: how many matrices of a tensor's size, in the compute type, there are at a time, or a function
            of the number of experts; beside four square ones in float64, of the shorter side or of `side`.
        flops: see `Flops`; or a function of the parameters and the shape.
        fields: as those of `registry.method`.
    """

    def cost(params: Params, context: TensorContext) -> Cost:
        shape = shape_of(params, context)
        if shape is None:
            return Cost(0, 0.0)
        m, n = shape
        r, held = min(m, n), blocks(context.n_experts) if callable(blocks) else blocks
        if isinstance(flops, Flops):
            work = (flops.each * context.n_experts + flops.once) * m * n * r
        else:
            work = flops(params, shape)
        square = r if side is None else shape[side]
        return Cost(int(held * 4 * m * n) + 4 * 8 * square**2, work)

    def declare(decompose: Decomposition) -> _Declared:
        @functools.wraps(decompose)
        def recipe(params: Params, context: TensorContext) -> Recipe:
            shape = shape_of(params, context)
            if shape is None:
                return plain.walk(params)
            deltas: Deltas = yield Matrices(shape)
            layers = layers_of(params, context, shape)
            parts = []
            for rows in _layers(deltas, shape, layers) if layers > 1 else (deltas,):
                found = decompose(params, rows)
                parts.append(found if isinstance(found, Add) else (yield from found))
            return parts[0] if layers == 1 else _side_by_side(parts)

        declared = method(
            name,
            params=(*params, *POLICY),
            base="required",
            scope=scope_of,
            cost=cost,
            **fields,
        )(recipe)
        return _Declared(declared, plain)

    return declare


@dataclass(frozen=True)
class _Declared:
    """What `matrix_method` leaves in a method's file: attach the oracle with `@name.oracle`."""

    method: Any
    plain: Plain

    def oracle(self, function: MatrixOracle) -> MatrixOracle:
        def whole(
            base: Tensor, experts: Sequence[Tensor], params: Params, context: TensorContext
        ) -> Tensor:
            import torch

            shape = shape_of(params, context)
            deltas = [e - base for e in experts]
            if shape is None:
                return base + self.plain.oracle(deltas, params)
            matrices = [d.reshape(shape) for d in deltas]
            layers = layers_of(params, context, shape)
            parts = zip(*(d.chunk(layers) for d in matrices), strict=True)
            merged = torch.cat([function(list(part), params) for part in parts])
            return base + merged.reshape(base.shape)

        self.method.oracle(whole)
        return function


@dataclass(frozen=True)
class _Rows:
    """Some rows of all deltas."""

    deltas: Deltas
    rows: slice
    shape: tuple[int, int]

    def __len__(self) -> int:
        return len(self.deltas)

    def __getitem__(self, k: int) -> Tensor:
        return self.deltas[k][self.rows].clone()

    def total(self, weight: Sequence[float]) -> Tensor:
        return self.deltas.total(weight)[self.rows].clone()

    def factors(self, k: int) -> tuple[Tensor, Tensor] | None:
        found = self.deltas.factors(k)
        return found and (found[0][self.rows], found[1])


def _layers(deltas: Deltas, shape: tuple[int, int], n: int) -> list[_Rows]:
    step = shape[0] // n
    return [_Rows(deltas, slice(i * step, (i + 1) * step), (step, shape[1])) for i in range(n)]


def _side_by_side(parts: Sequence[Add]) -> Add:
    import torch

    return Add(torch.cat([part.values * part.scale for part in parts]))


# ---- what several do -----------------------------------------------------------------------------


def leading_triples(
    deltas: Deltas | Sequence[Tensor], k: int, weight: float, rank: int, stable: bool
) -> SVD:
    """Return the leading triples of weight * delta_k, at most `rank`; stable: without rounding noise.

    That of an adapter is decomposed by its factors, where noise is left out anyway.
    """
    factors = deltas.factors(k) if stable and not isinstance(deltas, Sequence) else None
    if factors is not None:
        return rounded(factored_svd([Term(weight, *factors)], rank).svd, factors[1])
    delta = deltas[k]
    return svd(delta if weight == 1 else delta * weight, rank, floor=None if stable else 0.0)


def triples_of_sum(deltas: Deltas, weight: Sequence[float]) -> SVD | None:
    """Return all triples of sum_k weight_k * delta_k that are not rounding noise, by the factors of adapters.

    None: not all experts are adapters, or of so many ranks that the sum itself is no larger.
    """
    factors = [deltas.factors(k) for k in range(len(deltas))]
    terms = [Term(w, *f) for w, f in zip(weight, factors, strict=True) if f is not None]
    if len(terms) < len(deltas) or 2 * sum(len(t.a) for t in terms) > min(deltas.shape):
        return None
    return rounded(factored_svd(terms).svd, terms[0].a)


def rounded(triples: SVD, like: Tensor) -> SVD:
    """Return triples in another type, those left out that are rounding noise of it."""
    u, s, vh = triples
    floor = max(len(u), vh.shape[1]) * EPS[like.element_size()]
    kept = int((s > floor * s[0]).sum()) if len(s) else 0
    return SVD(u[:, :kept].to(like.dtype), s[:kept].to(like.dtype), vh[:kept].to(like.dtype))


def added(tensors: Iterable[Tensor]) -> Tensor:
    """Return the sum of at least one tensor."""
    return functools.reduce(operator.add, tensors)


# ---- what several oracles do ---------------------------------------------------------------------


def weighted_sum(deltas: Sequence[Tensor], weight: Sequence[float]) -> Tensor:
    """Return sum_k weight_k * delta_k."""
    return added(w * d for w, d in zip(weight, deltas, strict=True))


def polar_oracle(a: Tensor, stable: bool) -> Tensor:
    """U V^T by a full decomposition; stable: of what is more than rounding in float32."""
    import torch

    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    kept = int((s > max(a.shape) * EPS[4] * s.max()).sum()) if stable and len(s) else len(s)
    product: Tensor = u[:, :kept] @ vh[:kept]
    return product


def spectral_oracle(a: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """U diag(function(s)) V^T by a full decomposition."""
    import torch

    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    product: Tensor = (u * function(s)) @ vh
    return product
