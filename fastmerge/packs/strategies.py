"""How a module's change is compressed: one class per strategy, its options as fields.

What a module is follows from its name and shape. A strategy's terms are kept where they take fewer bytes
than the change itself; else the change is stored raw. Vectors are stored raw, in float32.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fastmerge.errors import RecipeError
from fastmerge.experts import low_rank_sparse
from fastmerge.linalg import truncated_svd
from fastmerge.methods.matrices import TABLES
from fastmerge.packs.few_bits import DENSE, check_format
from fastmerge.packs.terms import Term, low_rank, raw, router, sparse, sparse_rows
from fastmerge.registry import nearest

if TYPE_CHECKING:
    from torch import Tensor

Tables = Literal["raw", "prune", "matrix", "skip"]
Role = Literal["vector", "table", "attention", "mlp", "matrix", "block"]

_ATTENTION = re.compile(r"(^|[._])(self_?attn|attn|attention|cross_attn)([._]|$)")
_MLP = re.compile(r"(^|[._])(mlp|ffn|feed_forward|experts?|block_sparse_moe)([._]|$)")


def role_of(name: str, shape: Sequence[int]) -> Role:
    """Return what a tensor is: a vector, a table of tokens or positions, a matrix of attention, of an MLP or
    another, or a block of more dimensions."""
    if len(shape) < 2:
        return "vector"
    if TABLES.search(name):
        return "table"
    if len(shape) > 2:
        return "block"
    if _ATTENTION.search(name):
        return "attention"
    return "mlp" if _MLP.search(name) else "matrix"


@dataclass(frozen=True)
class Strategy:
    """Options that all strategies have.

    dtype: of factors and raw matrices; "model": the model's own. tables: of embeddings, heads and position
    tables: raw, prune (the largest magnitudes stay), matrix (as others) or skip. table_density: share that
    prune keeps.
    exclude: regular expression; what it finds is stored raw.
    """

    dtype: str = "model"
    tables: Tables = "raw"
    table_density: float = 0.1
    exclude: str | None = None

    name: ClassVar[str]
    #: Whether it packs several models into one pack.
    several: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.dtype != "model" and self.dtype not in DENSE:
            raise RecipeError(f"dtype must be one of model, {', '.join(DENSE)}, got {self.dtype!r}")
        if self.tables not in ("raw", "prune", "matrix", "skip"):
            raise RecipeError(f"tables must be raw, prune, matrix or skip, got {self.tables!r}")
        _check_share("table_density", self.table_density)
        if self.exclude is not None:
            try:
                re.compile(self.exclude)
            except re.error as error:
                raise RecipeError(
                    f"exclude is not a regular expression: {self.exclude!r} ({error})"
                ) from None

    def terms(self, name: str, deltas: Sequence[Tensor], own: str) -> list[Term]:
        """Return what a module's changes are stored as.

        deltas: one of each model, float32 or float64. own: the model's type of it, torch's name.
        """
        experts: list[int | None] = list(range(len(deltas))) if self.several else [None]
        dtype = own if self.dtype == "model" else self.dtype
        found: list[Term] = []
        for expert, delta in zip(experts, deltas, strict=True):
            found += self._of_one(name, delta, dtype, expert)
        return found

    def treatment(
        self, name: str, shape: Sequence[int]
    ) -> Literal["exact", "raw", "prune", "skip", "compress"]:
        """Return what becomes of a tensor; exact: raw, in float32 at least."""
        role = role_of(name, shape)
        if role == "vector":
            return "exact"
        if role == "block" or (self.exclude is not None and re.search(self.exclude, name)):
            return "raw"
        if role == "table" and self.tables != "matrix":
            return self.tables
        return "compress"

    def _of_one(self, name: str, delta: Tensor, dtype: str, expert: int | None) -> list[Term]:
        treatment = self.treatment(name, delta.shape)
        if not bool(delta.any()) or treatment == "skip":
            return []
        if treatment == "exact":
            wide = "float64" if delta.element_size() == 8 else "float32"
            return [raw(delta, wide, expert)]
        whole = raw(delta, dtype, expert)
        if treatment == "raw":
            return [whole]
        if treatment == "prune":
            count = int(self.table_density * delta.numel())
            kept = [sparse(delta, count, dtype, expert)] if count else []
        else:
            kept = self.compress(role_of(name, delta.shape), delta, dtype, expert)
        smaller = sum(t.n_bytes for t in kept) < whole.n_bytes
        return kept if smaller or self.several else [whole]

    def compress(self, role: Role, delta: Tensor, dtype: str, expert: int | None) -> list[Term]:
        """Return the terms of a matrix."""
        raise NotImplementedError


def _check_share(what: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise RecipeError(f"{what} must be in [0, 1], got {value}")


def balanced(delta: Tensor, rank: int, *, exact: bool = False) -> tuple[Tensor, Tensor]:
    """Return sqrt(S) U^T [rank, m] and sqrt(S) V^T [rank, n] of the leading triples that are not rounding.

    exact: of a full decomposition; else what they leave may be 1 % more than the least.
    """
    u, s, vh = truncated_svd(delta, rank, exact=exact).svd
    root = s.sqrt()[:, None]
    return root * u.mT, root * vh


def _low_rank(delta: Tensor, rank: int, dtype: str, expert: int | None = None) -> list[Term]:
    if rank < 1:
        return []
    left, right = balanced(delta, rank)
    return [low_rank(left, right, dtype, expert)] if len(left) else []


@dataclass(frozen=True)
class TsvCompress(Strategy):
    """TSV-C: int(rank_fraction * min(m, n)) leading triples, one at least. Source: arXiv:2412.00081."""

    rank_fraction: float = 0.125
    name = "tsv_c"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share("rank_fraction", self.rank_fraction)

    def compress(self, role: Role, delta: Tensor, dtype: str, expert: int | None) -> list[Term]:
        rank = max(1, int(self.rank_fraction * min(delta.shape)))
        return _low_rank(delta, rank, dtype, expert)


@dataclass(frozen=True)
class Twin(Strategy):
    """Twin-Merging's exclusive part: the base is the shared model, int((1 - mask_rate) * min(m, n)) triples
    stay.

    weight: the mixing weight, with which the part is applied where none is given. Source: arXiv:2406.15479.
    """

    mask_rate: float = 0.9
    weight: float = 1.0
    name = "twin"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share("mask_rate", self.mask_rate)

    def compress(self, role: Role, delta: Tensor, dtype: str, expert: int | None) -> list[Term]:
        return _low_rank(delta, int((1 - self.mask_rate) * min(delta.shape)), dtype, expert)


@dataclass(frozen=True)
class Smile(Strategy):
    """SMILE: of each model U [k, m] and S V^T [k, n], and gate_k rows of V^T for the router, in one pack.

    rank below 0: changes whole. Source: arXiv:2408.10174.
    """

    rank: int = 64
    gate_k: int = 8
    name = "smile"
    several = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate_k < 1:
            raise RecipeError(f"gate_k must be at least 1, got {self.gate_k}")

    def compress(self, role: Role, delta: Tensor, dtype: str, expert: int | None) -> list[Term]:
        assert expert is not None
        found = truncated_svd(delta, max(self.rank, self.gate_k)).svd
        k, gate = self.rank, min(self.gate_k, len(found.s))
        left, right = found.u[:, :k].mT, found.s[:k, None] * found.vh[:k]
        part = raw(delta, dtype, expert) if k < 0 else low_rank(left, right, dtype, expert)
        return [part, router(found.vh[:gate], dtype, expert)]


@dataclass(frozen=True)
class Graft(Strategy):
    """GraftLLM: matrices of attention to one rank, others to another, leading directions in more bits.

    bits: formats by their first so many directions, the last for the rest. Rounding is to the nearest,
    without calibration, of factors that hold sqrt(S) each. Source: arXiv:2505.18502; differs from its code:
    float32 changes, factors balanced, no GPTQ.
    """

    attention_rank: int = 1000
    mlp_rank: int = 1400
    bits: str = "int8:20,int4:200,int2"
    tables: Tables = "prune"
    name = "graft"
    groups: Sequence[tuple[str, int | None]] = field(init=False, repr=False, default=())

    def __post_init__(self) -> None:
        super().__post_init__()
        for what, rank in (("attention_rank", self.attention_rank), ("mlp_rank", self.mlp_rank)):
            if rank < 1:
                raise RecipeError(f"{what} must be at least 1, got {rank}")
        object.__setattr__(self, "groups", parse_bits(self.bits))

    def compress(self, role: Role, delta: Tensor, dtype: str, expert: int | None) -> list[Term]:
        left, right = balanced(delta, self.attention_rank if role == "attention" else self.mlp_rank)
        found, first = [], 0
        for format, end in self.groups:
            stop = len(left) if end is None else min(end, len(left))
            if stop > first:
                found.append(low_rank(left[first:stop], right[first:stop], format, expert))
                first = stop
        return found


def parse_bits(text: str) -> list[tuple[str, int | None]]:
    """Return (format, end of its directions or None) of text such as "int8:20,int4:200,int2"."""
    found: list[tuple[str, int | None]] = []
    parts = text.split(",")
    last = 0
    for i, part in enumerate(parts):
        format, colon, end = part.strip().partition(":")
        check_format(format, "a format of bits")
        if (i == len(parts) - 1) == bool(colon):
            raise RecipeError(
                f"bits must be like int8:20,int4:200,int2, the last without an end, got {text!r}"
            )
        if colon and not (end.isascii() and end.isdigit() and int(end) > last):
            raise RecipeError(
                f"ends of bits must be whole numbers that rise, got {end!r} in {text!r}"
            )
        last = int(end) if colon else last
        found.append((format, last if colon else None))
    return found


@dataclass(frozen=True)
class McSmoe(Strategy):
    """MC-SMoE: L R of rank ceil(ratio m n / (m + n)), and the keep_rows share of rows of what is left that
    weigh most; see `ops.low_rank_sparse`. Source: arXiv:2310.01334."""

    ratio: float = 0.25
    keep_rows: float = 0.1
    name = "mcsmoe"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_share("keep_rows", self.keep_rows)
        if not 0 <= self.ratio < 1e6:
            raise RecipeError(f"ratio must be at least 0, got {self.ratio}")

    def compress(self, role: Role, delta: Tensor, dtype: str, expert: int | None) -> list[Term]:
        found = low_rank_sparse(delta, ratio=self.ratio, keep_rows=self.keep_rows)
        terms = []
        if found.left.shape[1]:
            terms.append(low_rank(found.left.mT, found.right, dtype, expert))
        if len(found.rows):
            terms.append(sparse_rows(found.rows, found.values, dtype, expert))
        return terms


STRATEGIES: dict[str, type[Strategy]] = {
    s.name: s for s in (TsvCompress, Twin, Smile, Graft, McSmoe)
}


def make_strategy(name: str, options: Mapping[str, Any]) -> Strategy:
    """Return a strategy with its options, which may be text.

    Raises:
        RecipeError: an unknown strategy or option, or a value out of range; names the nearest.
    """
    if name not in STRATEGIES:
        raise RecipeError(f"strategy {name!r} is unknown{nearest(name, list(STRATEGIES))}")
    kind = STRATEGIES[name]
    return kind(**options_from(kind, options))


def options_from(kind: type[Strategy], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options in the types of a strategy's fields, which may be text."""
    fields = {f.name: f.default for f in dataclasses.fields(kind) if f.init}
    values = {}
    for key, value in options.items():
        if key not in fields:
            raise RecipeError(
                f"strategy {kind.name} has no option {key!r}{nearest(key, list(fields))}"
            )
        values[key] = _as_option(key, value, fields[key])
    return values


def _as_option(key: str, value: Any, default: Any) -> Any:
    """Return a value in the type of an option's default."""
    if default is None or isinstance(default, str):
        return str(value)
    kind = type(default)
    try:
        number = float(value)
        if kind is int and not number.is_integer():
            raise ValueError
        return kind(number)
    except (TypeError, ValueError, OverflowError):
        what = "a whole number" if kind is int else "a number"
        raise RecipeError(f"option {key} must be {what}, got {value!r}") from None


def options_of(strategy: Strategy) -> dict[str, Any]:
    """Return a strategy's options, as they are noted in a pack."""
    return {f.name: getattr(strategy, f.name) for f in dataclasses.fields(strategy) if f.init}
