"""What a module's change is stored as: a sum of terms, each of one kind, in one format.

A module is a tensor of the base, of shape [m, n] where it is a matrix. The kinds:

low_rank         left^T right          left [rank, m], right [rank, n]: rows are directions
shared_low_rank  left_t^T right_t      left_t = mean + sum_j basis_j * coef_(j, t) of expert t, right_t too
rows             values in whole rows  index [rows], ascending; values [rows, n]
sparse           single values         index [count] into the flat tensor, ascending; values [1, count]
raw              all of it             values [m, n]
router           no change             rows [rank, n]: what a router multiplies a layer's input with
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fastmerge import ops
from fastmerge.dtypes import DType
from fastmerge.errors import CheckpointError
from fastmerge.jobs import matrix_of
from fastmerge.packs.few_bits import Spec, decode, encode, specs
from fastmerge.stages import Keep, OrderStatistic, Trim

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TermInfo:
    """A term without its tensors.

    numbers: what its kind counts, by name. expert: whose change it is a part of; None: of each. scale: a
    factor.
    """

    kind: str
    format: str
    numbers: Mapping[str, int]
    expert: int | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Term:
    """A term with its stored tensors, by slot."""

    info: TermInfo
    parts: Mapping[str, Tensor]

    @property
    def n_bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.parts.values())


@dataclass(frozen=True)
class Kind:
    """numbers: their names. parts: (slot, rows, cols) of its matrices. index: (slot, length, bound) if any.

    add: adds scale times the term to a total of the module's shape; None: it is no change.
    """

    numbers: tuple[str, ...]
    parts: Callable[[Mapping[str, int], tuple[int, ...]], Sequence[tuple[str, int, int]]]
    add: Callable[[Term, Tensor, int, float], None] | None
    index: Callable[[Mapping[str, int], tuple[int, ...]], tuple[int, int]] | None = None
    of_matrices: bool = True


def part_specs(info: TermInfo, shape: tuple[int, ...]) -> dict[str, Spec]:
    """Return type and shape of every tensor that a term of a module of `shape` is stored as."""
    kind = KINDS[info.kind]
    found: dict[str, Spec] = {}
    if kind.index is not None:
        count, bound = kind.index(info.numbers, shape)
        found["index"] = Spec(DType.I32 if bound <= 2**31 else DType.I64, (count,))
    for slot, rows, cols in kind.parts(info.numbers, shape):
        found |= specs(slot, info.format, rows, cols)
    return found


def add_term(term: Term, total: Tensor, expert: int, factor: float = 1.0) -> None:
    """Add a term to the change of one expert; terms of another's add nothing.

    Raises:
        CheckpointError: an index is not ascending or outside the tensor.
    """
    add = KINDS[term.info.kind].add
    if add is not None and term.info.expert in (None, expert):
        add(term, total, expert, factor * term.info.scale)


def change_of(terms: Sequence[Term], shape: tuple[int, ...], expert: int, wide: bool) -> Tensor:
    """Return the change that terms add up to: float32, or float64 (wide)."""
    import torch

    total = torch.zeros(shape, dtype=torch.float64 if wide else torch.float32)
    for term in terms:
        add_term(term, total, expert)
    return total


# ---- building ------------------------------------------------------------------------------------


def low_rank(left: Tensor, right: Tensor, format: str, expert: int | None = None) -> Term:
    """left: [rank, m]; right: [rank, n]."""
    parts = encode("left", format, left) | encode("right", format, right)
    return Term(TermInfo("low_rank", format, {"rank": len(left)}, expert), parts)


def raw(values: Tensor, format: str, expert: int | None = None) -> Term:
    """values: of the module's shape."""
    matrix = values.reshape(matrix_of(tuple(values.shape)))
    return Term(TermInfo("raw", format, {}, expert), encode("values", format, matrix))


def sparse_rows(rows: Tensor, values: Tensor, format: str, expert: int | None = None) -> Term:
    """rows: [p], ascending; values: [p, n]."""
    import torch

    parts = {"index": rows.to(torch.int32).cpu()} | encode("values", format, values)
    return Term(TermInfo("rows", format, {"rows": len(rows)}, expert), parts)


def sparse(delta: Tensor, count: int, format: str, expert: int | None = None) -> Term:
    """Keep the `count` values of largest magnitude; the lower index first where they are equal."""
    import torch

    flat = delta.cpu().reshape(-1)
    (cut,) = ops.order_statistic(None, [flat], OrderStatistic([[count]]))
    mask = torch.as_tensor(ops.keep_mask(None, [flat], Keep(trim=Trim(cut))))
    kept = mask[0].nonzero()[:, 0]
    narrow = torch.int32 if flat.numel() <= 2**31 else torch.int64
    parts = {"index": kept.to(narrow)} | encode("values", format, flat[kept][None])
    return Term(TermInfo("sparse", format, {"count": count}, expert), parts)


def router(rows: Tensor, format: str, expert: int) -> Term:
    """rows: [rank, n]."""
    return Term(
        TermInfo("router", format, {"rank": len(rows)}, expert), encode("rows", format, rows)
    )


def scaled(term: Term, factor: float) -> Term:
    """Return factor times a term."""
    return replace(term, info=replace(term.info, scale=term.info.scale * factor))


# ---- reading -------------------------------------------------------------------------------------


def matrix_part(term: Term, slot: str, shape: tuple[int, ...]) -> Tensor:
    """Return one matrix of a term, decoded."""
    listed = KINDS[term.info.kind].parts(term.info.numbers, shape)
    rows, cols = next((r, c) for s, r, c in listed if s == slot)
    return decode(slot, term.info.format, term.parts, rows, cols)


def factors(term: Term, shape: tuple[int, ...], expert: int) -> tuple[Tensor, Tensor]:
    """Return left [rank, m] and right [rank, n] of a low-rank term, of one expert where they differ."""
    if term.info.kind == "low_rank":
        return matrix_part(term, "left", shape), matrix_part(term, "right", shape)
    found = []
    rank, basis, n_experts = (term.info.numbers[n] for n in ("rank", "basis", "experts"))
    for side, positions in zip(("left", "right"), shape, strict=True):
        mean = matrix_part(term, f"{side}.mean", shape)
        vectors = matrix_part(term, f"{side}.basis", shape).reshape(basis, rank, positions)
        coef = matrix_part(term, f"{side}.coef", shape).reshape(basis, n_experts, positions)
        found.append(mean + (vectors * coef[:, expert, None]).sum(0))
    return found[0], found[1]


def _add_low_rank(term: Term, total: Tensor, expert: int, factor: float) -> None:
    left, right = factors(term, tuple(total.shape), expert)
    total.addmm_(left.mT.to(total.dtype), right.to(total.dtype), alpha=factor)


def _add_rows(term: Term, total: Tensor, expert: int, factor: float) -> None:
    index = _index(term, len(total))
    values = matrix_part(term, "values", tuple(total.shape))
    total.index_add_(0, index, values.to(total.dtype), alpha=factor)


def _add_sparse(term: Term, total: Tensor, expert: int, factor: float) -> None:
    index = _index(term, total.numel())
    values = matrix_part(term, "values", tuple(total.shape))[0]
    total.view(-1).index_add_(0, index, values.to(total.dtype), alpha=factor)


def _add_raw(term: Term, total: Tensor, expert: int, factor: float) -> None:
    values = matrix_part(term, "values", tuple(total.shape))
    total.add_(values.reshape(total.shape), alpha=factor)


def _index(term: Term, bound: int) -> Tensor:
    index = term.parts["index"].long()
    ascending = bool((index[1:] > index[:-1]).all())
    if len(index) and not (ascending and int(index[0]) >= 0 and int(index[-1]) < bound):
        raise CheckpointError(
            f"an index of a {term.info.kind} term is not ascending in [0, {bound}); the pack is damaged, "
            "make it again"
        )
    return index


def _shared_parts(n: Mapping[str, int], shape: tuple[int, ...]) -> list[tuple[str, int, int]]:
    return [
        (f"{side}.{slot}", rows, cols)
        for side, cols in zip(("left", "right"), shape, strict=True)
        for slot, rows in (
            ("mean", n["rank"]),
            ("basis", n["basis"] * n["rank"]),
            ("coef", n["basis"] * n["experts"]),
        )
    ]


KINDS: dict[str, Kind] = {
    "low_rank": Kind(
        ("rank",),
        lambda n, shape: [("left", n["rank"], shape[0]), ("right", n["rank"], shape[1])],
        _add_low_rank,
    ),
    "shared_low_rank": Kind(("rank", "basis", "experts"), _shared_parts, _add_low_rank),
    "rows": Kind(
        ("rows",),
        lambda n, shape: [("values", n["rows"], shape[1])],
        _add_rows,
        index=lambda n, shape: (n["rows"], shape[0]),
    ),
    "sparse": Kind(
        ("count",),
        lambda n, shape: [("values", 1, n["count"])],
        _add_sparse,
        index=lambda n, shape: (n["count"], math.prod(shape)),
        of_matrices=False,
    ),
    "raw": Kind((), lambda n, shape: [("values", *matrix_of(shape))], _add_raw, of_matrices=False),
    "router": Kind(("rank",), lambda n, shape: [("rows", n["rank"], shape[1])], None),
}
