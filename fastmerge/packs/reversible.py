"""Reversible Model Merging: what several models change, as one mean and a few directions that all share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmerge.errors import RecipeError
from fastmerge.linalg.tiny import principal
from fastmerge.packs.build import PackReport, write_pack
from fastmerge.packs.few_bits import encode
from fastmerge.packs.strategies import Strategy, balanced, options_from, options_of
from fastmerge.packs.terms import Term, TermInfo, raw
from fastmerge.stored_tensors import Progress, check_device

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rmm(Strategy):
    """rank: of each model's factors. p: directions at each position. reference: index of the model whose
    signs the others' factors take."""

    rank: int = 16
    p: int = 1
    reference: int = 0
    name = "rmm"
    several = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for what, value, least in (("rank", self.rank, 1), ("p", self.p, 0)):
            if value < least:
                raise RecipeError(f"{what} must be at least {least}, got {value}")

    def terms(self, name: str, deltas: Sequence[Tensor], own: str) -> list[Term]:
        if self.treatment(name, deltas[0].shape) != "compress":
            return super().terms(name, deltas, own)
        dtype = own if self.dtype == "model" else self.dtype
        shared = shared_term(
            [padded_factors(d, self.rank) for d in deltas], self.p, self.reference, dtype
        )
        whole = [raw(d, dtype, expert) for expert, d in enumerate(deltas) if bool(d.any())]
        return [shared] if shared.n_bytes < sum(t.n_bytes for t in whole) else whole


def rmm(
    models: Sequence[str | Path],
    base: str | Path,
    out: str | Path,
    *,
    rank: int = 16,
    p: int = 1,
    reference: int = 0,
    overwrite: bool = False,
    shard_size: int | str = "1B",
    device: str = "cpu",
    progress: Progress | None = None,
    **options: Any,
) -> PackReport:
    """Pack T models so that each can be restored: per position a mean, p directions and T coefficients.

    A_t = U sqrt(S) [m, r] and B_t = sqrt(S) V^T [r, n] of each change. At each row of A and column of B the T
    vectors x_t become mean + Phi (Phi^T (x_t - mean)), Phi their p principal directions. Stored numbers, of
    those of the factors: (p (r + T) + r) / (r T). With p >= min(r, T - 1) factors are restored exactly; the
    squared error else is the sum of eigenvalues left out.

    Args:
        models: folders of T models, made from `base`.
        rank: r; p: directions, capped at min(r, T - 1).
        reference: index of the model to whose factors the others' signs are aligned. Factors have a sign for
            each direction, which is no property of the change but decides what the mean is.
        options: dtype, tables, table_density and exclude, as of other packs. The rest as `packs.pack`.
    Returns:
        A `PackReport`. `revert` restores a model.
    Raises:
        MergeError: anything the caller can mend, in one line.
    Source: Reversible Model Merging, from its description; no code of the authors.
    """
    given = {**options, "rank": rank, "p": p, "reference": reference}
    chosen = Rmm(**options_from(Rmm, given))
    models = list(models)
    if len(models) < 2:
        raise RecipeError(f"rmm packs two models or more, got {len(models)}")
    if not 0 <= reference < len(models):
        raise RecipeError(f"reference must be in [0, {len(models) - 1}], got {reference}")
    check_device(device)

    def terms(name: str, deltas: Sequence[Tensor], own: str) -> list[Term]:
        return chosen.terms(name, [d.to(device) for d in deltas], own)

    return write_pack(
        models,
        base,
        out,
        terms,
        strategy="rmm",
        options=options_of(chosen),
        weight=1.0,
        overwrite=overwrite,
        shard_size=shard_size,
        progress=progress,
    )


def padded_factors(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return balanced factors [r, m] and [r, n], r = min(rank, m, n); rows that the change lacks are 0."""
    import torch

    r = min(rank, *delta.shape)
    left, right = (
        torch.nn.functional.pad(f, (0, 0, 0, r - len(f))) for f in balanced(delta, r, exact=True)
    )
    return left, right


def aligned(
    factors: Sequence[tuple[Tensor, Tensor]], reference: int
) -> list[tuple[Tensor, Tensor]]:
    """Return factors with the sign of each direction that is nearer to the reference's."""
    left, right = factors[reference]
    found = []
    for a, b in factors:
        likeness = (a * left).sum(1) / _lengths(a, left) + (b * right).sum(1) / _lengths(b, right)
        sign = (likeness >= 0).to(a.dtype).mul_(2).sub_(1)[:, None]
        found.append((a * sign, b * sign))
    return found


def _lengths(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = a.norm(dim=1) * b.norm(dim=1)
    return product.masked_fill(product == 0, 1)


def shared_term(
    factors: Sequence[tuple[Tensor, Tensor]], p: int, reference: int, format: str
) -> Term:
    """Return the term of all models' factors, p directions at each position."""
    import torch

    n_experts, rank = len(factors), len(factors[0][0])
    p = min(p, rank, n_experts - 1)
    same_signs = aligned(factors, reference)
    parts: dict[str, Tensor] = {}
    for side, name in enumerate(("left", "right")):
        # [T, r, m] -> a matrix [r, T] at each of m positions
        found = principal(torch.stack([f[side] for f in same_signs]).permute(2, 1, 0), p)
        positions = len(found.mean)
        parts |= encode(f"{name}.mean", format, found.mean.mT)
        parts |= encode(
            f"{name}.basis", format, found.basis.permute(2, 1, 0).reshape(-1, positions)
        )
        parts |= encode(f"{name}.coef", format, found.coef.permute(1, 2, 0).reshape(-1, positions))
    numbers = {"rank": rank, "basis": p, "experts": n_experts}
    return Term(TermInfo("shared_low_rank", format, numbers), parts)
