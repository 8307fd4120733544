"""KnOTS: experts written in one left basis, which aligns them, then merged coordinate by coordinate there."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from fastmerge.linalg import EPS, gram
from fastmerge.methods.matrices import LAMBDA, WEIGHT, added, matrix_method
from fastmerge.registry import Param, Params
from fastmerge.stages import Add, Deltas, Joined

if TYPE_CHECKING:
    from torch import Tensor


def _flops(params: Params, shape: tuple[int, int]) -> float:
    m, n = shape
    return 4.0 * len(params.weight) * m * m * n + 9.0 * m**3


@matrix_method(
    "knots",
    title="KnOTS",
    summary="writes the experts in one common basis, elects signs there, averages what agrees",
    paper="arXiv:2410.19735",
    params=(
        WEIGHT,
        LAMBDA,
        Param(
            "density",
            1.0,
            "share of an expert's coordinates in the basis that is kept, by magnitude",
            low=0.0,
            high=1.0,
        ),
        Param(
            "scope",
            "tensor",
            "what density is over; model holds all coordinates in memory at once, as few as adapters have",
            kind=str,
            choices=("tensor", "model"),
        ),
        Param(
            "merge_func",
            "dis-mean",
            "dis-mean, dis-sum: of the coordinates that agree with the elected sign; mean, sum: of all",
            kind=str,
            choices=("dis-mean", "dis-sum", "mean", "sum"),
        ),
        Param(
            "least_singular_value",
            1e-5,
            "directions of the experts side by side with less are left out, as those that are rounding noise",
            low=0.0,
        ),
    ),
    blocks=lambda n_experts: n_experts + 4.0,
    side=0,
    flops=_flops,
    joins=lambda params: params.scope == "model" and params.density < 1,
)
def knots(params: Params, deltas: Deltas) -> Generator[Joined, Any, Add]:
    """out = base + lambda * U merge_k(Z_k), Z_k = U^T D_k, D_k = weight_k * delta_k.

    U: the left singular vectors of [D_1 ... D_K]. A sign that cancels out is the tensor's more frequent one.
    Of adapters no D_k is formed: U comes from their factors.
    """
    factors = [deltas.factors(k) for k in range(len(deltas))]
    adapters = [f for f in factors if f is not None]
    if len(adapters) == len(deltas):
        scaled = [(b * w, a) for (b, a), w in zip(adapters, params.weight, strict=True)]
        basis, aligned = aligned_factors(scaled, params.least_singular_value)
    else:
        basis, aligned = _aligned(deltas, params)
    if params.density < 1:
        cuts = [_cut([z], params.density) for z in aligned]
        if params.scope == "model":
            answer = yield Joined(aligned, lambda values: _joint_cuts(values, params.density))
            cuts = answer["cuts"]
        aligned = [z * (z.abs() >= cut) for z, cut in zip(aligned, cuts, strict=True)]
    return Add(basis @ _merged(aligned, params.merge_func), params.lambda_)


def _aligned(deltas: Deltas, params: Params) -> tuple[Tensor, list[Tensor]]:
    held = [deltas[k].mul_(w) for k, w in enumerate(params.weight)]
    side_by_side = gram(held[0])
    for delta in held[1:]:
        side_by_side += gram(delta)
    basis = _directions(side_by_side, held, params.least_singular_value).to(held[0].dtype)
    return basis, [basis.mT @ delta for delta in held]


def aligned_factors(
    factors: Sequence[tuple[Tensor, Tensor]], least: float
) -> tuple[Tensor, list[Tensor]]:
    """Return U [m, p] and all U^T B_k A_k [p, n] of factors (B_k [m, r], A_k [r, n]).

    With [B_1 .. B_K] = Q R, the left singular vectors of all products side by side are Q times those of
    [R_1 A_1 .. R_K A_K], whose Gram matrix takes that of each A_k: nothing of size m x n is formed.
    """
    import torch

    q, r = torch.linalg.qr(torch.cat([b for b, _ in factors], 1).double())
    parts = torch.split(r, [b.shape[1] for b, _ in factors], 1)
    cores = [part @ gram(a) @ part.mT for part, (_, a) in zip(parts, factors, strict=True)]
    inner = torch.stack(cores).sum(0)
    u = _directions(inner, [a for _, a in factors], least)
    basis = q @ u
    aligned = [(u.mT @ part).to(a.dtype) @ a for part, (_, a) in zip(parts, factors, strict=True)]
    return basis.to(factors[0][1].dtype), aligned


def _directions(square: Tensor, like: Sequence[Tensor], least: float) -> Tensor:
    """Return eigenvectors of a Gram matrix, largest first, without those below both floors."""
    import torch

    values, vectors = torch.linalg.eigh(square)
    s = values.clamp_min(0).sqrt()
    size = max(len(square), sum(x.shape[1] for x in like))
    noise = size * EPS[like[0].element_size()] * float(s[-1]) if len(s) else 0.0
    kept: Tensor = vectors[:, s > max(least, noise)]
    return kept.flip(1)


def _cut(parts: Sequence[Tensor], density: float) -> float:
    """Return the magnitude from which on a share `density` of all elements is kept, and what equals it."""
    import torch

    sizes = torch.cat([z.abs().flatten() for z in parts])
    dropped = len(sizes) - int(len(sizes) * density)
    return float(sizes.kthvalue(dropped).values) if dropped else 0.0


def _joint_cuts(values: Sequence[Sequence[Tensor]], density: float) -> dict[str, Any]:
    return {"cuts": [_cut(parts, density) for parts in zip(*values, strict=True)]}


def _merged(aligned: Sequence[Tensor], merge_func: str) -> Tensor:
    """Merge coordinates [p, n] one by one."""
    import torch

    total: Tensor = added(aligned)
    if merge_func in ("mean", "sum"):
        return total / len(aligned) if merge_func == "mean" else total
    sign = total.sign()
    sign[sign == 0] = 1.0 if float(sign.sum(dtype=torch.float64)) >= 0 else -1.0
    merged, count = torch.zeros_like(total), torch.zeros_like(total)
    for z in aligned:
        agrees = z * sign > 0
        merged += z * agrees
        count += agrees
    return merged.div_(count.clamp_min_(1)) if merge_func == "dis-mean" else merged


@knots.oracle
def knots_oracle(deltas: Sequence[Tensor], params: Params) -> Tensor:
    """The published steps in float64."""
    return model_oracle([deltas], params)[0]


def model_oracle(model: Sequence[Sequence[Tensor]], params: Params) -> list[Tensor]:
    """All deltas of a matrix decomposed side by side, the trim over all matrices of a model."""
    import torch

    bases, rows = [], []
    for deltas in model:
        wide = torch.cat([w * d for w, d in zip(params.weight, deltas, strict=True)], 1)
        u, s, vh = torch.linalg.svd(wide, full_matrices=False)
        noise = max(wide.shape) * EPS[4] * float(s.max()) if len(s) else 0.0
        kept = s > max(params.least_singular_value, noise)
        z = s[kept, None] * vh[kept]
        bases.append(u[:, kept])
        rows.append(z.reshape(len(z), len(deltas), deltas[0].shape[1]).movedim(1, 0))  # [K, p, n]
    for k in range(len(params.weight)):
        order = torch.cat([z[k].abs().flatten() for z in rows]).sort().values
        dropped = len(order) - math.floor(len(order) * params.density)
        for z in rows if dropped else ():
            z[k][z[k].abs() < order[dropped - 1]] = 0
    return [
        u @ _merged_oracle(z, params.merge_func) * params.lambda_
        for u, z in zip(bases, rows, strict=True)
    ]


def _merged_oracle(z: Tensor, merge_func: str) -> Tensor:
    import torch

    if merge_func in ("mean", "sum"):
        return z.mean(0) if merge_func == "mean" else z.sum(0)
    sign = z.sum(0).sign()
    sign = torch.where(sign == 0, 1.0 if sign.sum() >= 0 else -1.0, sign)
    agrees = z.sign() == sign
    total = torch.where(agrees, z, 0.0).sum(0)
    return total / agrees.sum(0).clamp_min(1) if merge_func == "dis-mean" else total
