"""Experts of one mixture-of-experts layer: merged in the span that they share, or compressed one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fastmerge.errors import ConflictError, NonFiniteError, RecipeError
from fastmerge.linalg import gram, truncated_svd
from fastmerge.linalg.leading import refined
from fastmerge.registry import get
from fastmerge.tensors import merge_tensors

if TYPE_CHECKING:
    from torch import Tensor


def merge_experts(
    weights: Sequence[Tensor] | Tensor,
    frequency: Sequence[float] | Tensor | None = None,
    rank: int | None = None,
    *,
    rule: str | None = None,
    **params: Any,
) -> Tensor:
    """Merge a group of experts over the leading left directions that they share (Sub-MoE).

    merged = U U^T sum_k f_k W_k        U: the `rank` leading eigenvectors of sum_k W_k W_k^T

    With [W_1 .. W_K] = U S [V_1^T .. V_K^T] this is U S (sum_k f_k V_k)^T: the concatenation is never
    decomposed, and without truncation the result is the average by frequency.

    Args:
        weights: K matrices [m, n], or one tensor [K, m, n]; any floating type, one device.
        frequency: how often the router takes each expert, >= 0; divided by its sum. None or all
            zero: equal shares.
        rank: directions kept, 1 to m; None: all.
        rule: a merge method that merges the V_k instead of their average, such as "ties", with its `params`;
            its weights are the frequencies. It is what needs the V_k explicitly.
    Returns:
        [m, n], of the first expert's type and device.
    Raises:
        ConflictError: shapes differ, or are not matrices. RecipeError: a bad frequency or rank.
        NonFiniteError: an expert holds NaN or infinity.
    Source: arXiv:2506.23266. Its normalisation of frequencies and final rank are not published in full.
    """
    import torch

    experts = [_matrix(w, f"weights[{k}]") for k, w in enumerate(weights)]
    if not experts:
        raise ConflictError("weights holds no expert; give at least one")
    for k, expert in enumerate(experts):
        if expert.shape != experts[0].shape:
            raise ConflictError(
                f"weights[{k}] is {list(expert.shape)} but weights[0] is {list(experts[0].shape)}"
            )
    shares = _shares(frequency, len(experts))
    m = len(experts[0])
    if rank is not None and not 1 <= rank <= m:
        raise RecipeError(f"rank must be in [1, {m}], the experts' rows, got {rank}")
    if rule is None and rank in (None, m):
        return _average(experts, shares).to(weights[0].dtype)
    s, u = (x.to(experts[0].dtype) for x in _shared_directions(experts, rank or m))
    if rule is None:
        projected: Tensor = u @ (u.mT @ _average(experts, shares))
        return projected.to(weights[0].dtype)
    inverse = (s > s[0] * _FLOOR) / s.masked_fill(s == 0, 1)
    right = [inverse[:, None] * (u.mT @ e) for e in experts]
    origin = None if get(rule).base == "ignored" else torch.zeros_like(right[0])
    merged: Tensor = merge_tensors(origin, right, method=rule, weight=shares, **params)
    product: Tensor = (u * s) @ merged
    return product.to(weights[0].dtype)


def _shared_directions(experts: Sequence[Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """Return the leading singular values [rank] and left vectors [m, rank] of the experts side by side."""
    import torch

    if experts[0].dtype is torch.float32:
        found = refined(experts, rank, rough=True)
        if found is not None:
            return found
    total = gram(experts[0])
    for expert in experts[1:]:
        total += gram(expert)
    values, vectors = torch.linalg.eigh(total)
    return values.flip(0)[:rank].clamp_min(0).sqrt(), vectors.flip(1)[:, :rank]


#: Singular values below this share of the largest are rounding of the float64 Gram matrix.
_FLOOR = 2.0**-26


class LowRankSparse(NamedTuple):
    """w ~ left right, plus `values` in the rows `rows`.

    left: [m, r]; right: [r, n]; rows: [p] int64, ascending; values: [p, n].
    """

    left: Tensor
    right: Tensor
    rows: Tensor
    values: Tensor

    def product(self) -> Tensor:
        """Return left right + S, [m, n]."""
        return (self.left @ self.right).index_add_(0, self.rows, self.values)


def low_rank_sparse(
    w: Tensor,
    *,
    rank: int | None = None,
    ratio: float | None = None,
    keep_rows: float = 0.1,
) -> LowRankSparse:
    """Split a matrix into a low-rank part and the rows of what is left that weigh most (MC-SMoE).

    w ~ L R + S,  L = U_k sqrt(S_k),  R = sqrt(S_k) V_k^T,  S: whole rows of w - L R

    Args:
        w: [m, n], any floating type.
        rank: k, 0 to min(m, n); or
        ratio: share of w's parameters that L and R take: k = ceil(ratio m n / (m + n)),
            capped at min(m, n).
        keep_rows: share of rows that S keeps, [0, 1]; int(keep_rows m) rows of largest norm, the lower index
            first where norms are equal. The authors' importance needs gradients; the norm needs none.
    Returns:
        A `LowRankSparse` in float32, or float64 for float64.
    Raises:
        RecipeError: neither or both of rank and ratio, or one out of range. ConflictError: not a matrix.
        NonFiniteError: w holds NaN or infinity.
    Source: arXiv:2310.01334, second stage.
    """
    a = _matrix(w, "w")
    k = rank_of(a.shape[0], a.shape[1], rank, ratio)
    if not 0 <= keep_rows <= 1:
        raise RecipeError(f"keep_rows must be in [0, 1], got {keep_rows}")
    found = truncated_svd(a, k).svd
    root = found.s.sqrt()
    left, right = found.u * root, root[:, None] * found.vh
    rest = a - left @ right
    rows = rest.norm(dim=1).argsort(descending=True, stable=True)[: int(keep_rows * len(a))]
    rows = rows.sort().values
    return LowRankSparse(left, right, rows, rest[rows])


def rank_of(m: int, n: int, rank: int | None, ratio: float | None) -> int:
    """Return the rank that is asked for, directly or as a share of an [m, n] matrix' parameters."""
    if (rank is None) == (ratio is None):
        raise RecipeError(f"give either rank or ratio, got rank={rank} and ratio={ratio}")
    if rank is not None:
        if not 0 <= rank <= min(m, n):
            raise RecipeError(f"rank must be in [0, {min(m, n)}], got {rank}")
        return rank
    assert ratio is not None
    if not 0 <= ratio < math.inf:
        raise RecipeError(f"ratio must be at least 0 and finite, got {ratio}")
    return min(m, n, math.ceil(ratio * m * n / (m + n))) if m + n else 0


def _matrix(w: Tensor, what: str) -> Tensor:
    """Return a matrix in the type that is computed in."""
    import torch

    if w.dim() != 2 or not w.is_floating_point():
        raise ConflictError(f"{what} is {w.dtype} {list(w.shape)}; give a floating-point matrix")
    a = w.detach()
    a = a if a.dtype is torch.float64 else a.float()
    # A sum that is finite has no other terms, and takes a fraction of the time of looking at each.
    if not math.isfinite(float(a.sum())) and not bool(torch.isfinite(a).all()):
        index = int(torch.isfinite(a).flatten().logical_not().nonzero()[0])
        raise NonFiniteError(f"{what} holds NaN or infinity at flat index {index}; mend it before")
    return a


def _shares(frequency: Sequence[float] | Tensor | None, n: int) -> list[float]:
    given = [1.0] * n if frequency is None else [float(f) for f in frequency]
    if len(given) != n:
        raise RecipeError(f"frequency has {len(given)} values for {n} experts")
    for k, f in enumerate(given):
        if not 0 <= f < math.inf:
            raise RecipeError(f"frequency[{k}] must be at least 0 and finite, got {f}")
    total = math.fsum(given)
    return [f / total for f in given] if total else [1 / n] * n


def _average(experts: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    total = experts[0] * shares[0]
    for expert, share in zip(experts[1:], shares[1:], strict=True):
        total.add_(expert, alpha=share)
    return total
