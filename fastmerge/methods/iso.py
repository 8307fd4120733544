"""Isotropic merging: the sum of the deltas with all singular values made the same (Iso-C), and with
directions of each expert beside those that the sum has (Iso-CTS)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastmerge.linalg import EPS, SVD, inner, polar, svd, times
from fastmerge.methods.matrices import (
    LAMBDA,
    MODE,
    WEIGHT,
    Flops,
    added,
    matrix_method,
    polar_oracle,
    triples_of_sum,
    weighted_sum,
)
from fastmerge.registry import Param, Params
from fastmerge.stages import Add, Deltas

if TYPE_CHECKING:
    from torch import Tensor


@matrix_method(
    "iso_c",
    title="Iso-C",
    summary="sums the deltas and gives the sum equal singular values",
    paper="arXiv:2502.04959",
    params=(
        WEIGHT,
        LAMBDA,
        Param(
            "iso_divisor",
            "side",
            "what the sum of singular values is divided by: the shorter side, or the numerical rank",
            kind=str,
            choices=("side", "rank"),
        ),
        MODE,
    ),
    blocks=6.0,
    flops=Flops(once=12.0),
)
def iso_c(params: Params, deltas: Deltas) -> Add:
    """out = base + lambda * mean(s) * Q(A), A = sum_k weight_k * delta_k; s are A's singular values.

    Q is the polar factor and mean(s) = <Q, A> / r, so that no singular value is ever computed; of adapters
    alone, Q and s come from their factors.
    """
    stable = params.mode == "stable"
    triples = triples_of_sum(deltas, params.weight) if stable else None
    if triples is not None:
        q, rank, mass = triples.u @ triples.vh, len(triples.s), float(triples.s.sum())
    else:
        total = deltas.total(params.weight)
        q, rank, _, _, _ = polar(
            total, floor=None if stable else 0.0, route="auto" if stable else "svd"
        )
        mass = inner(q, total)
    divisor = min(deltas.shape) if params.iso_divisor == "side" else max(1, rank)
    return Add(q, params.lambda_ * mass / divisor)


@iso_c.oracle
def iso_c_oracle(deltas: Sequence[Tensor], params: Params) -> Tensor:
    """The published steps in float64."""
    import torch

    total = weighted_sum(deltas, params.weight)
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    rank = len(s)
    if params.mode == "stable":
        rank = int((s > max(total.shape) * EPS[4] * s[0]).sum())
    divisor = len(s) if params.iso_divisor == "side" else max(1, rank)
    merged: Tensor = s[:rank].sum() / divisor * (u[:, :rank] @ vh[:rank])
    return merged * float(params.lambda_)


# ---- Iso-CTS -------------------------------------------------------------------------------------


def common_and_own(fraction: float, r: int, n_experts: int) -> tuple[int, int]:
    """Return (k_common, k_task): directions of the sum, and of each expert beside them."""
    own = min(round((r - int(r * fraction)) / n_experts) * n_experts, r // n_experts * n_experts)
    return r - own, own // n_experts


@matrix_method(
    "iso_cts",
    title="Iso-CTS",
    summary="as Iso-C, with directions of each expert in place of the sum's least ones",
    paper="arXiv:2502.04959",
    params=(
        WEIGHT,
        LAMBDA,
        Param(
            "common_space_fraction",
            0.8,
            "share of the directions that is the sum's",
            low=0.0,
            high=1.0,
        ),
        MODE,
    ),
    blocks=10.0,
    flops=Flops(each=14.0, once=48.0),
)
def iso_cts(params: Params, deltas: Deltas) -> Add:
    """out = base + lambda * sigma * Q(U) Q(V)^T.

    U, V: the leading k_common singular vectors of A = sum_k weight_k * delta_k, and the leading k_task
    ones of each delta less its part in the common left space; sigma is the mean of their singular values.
    """
    import torch

    shape = deltas.shape
    k_common, k_task = common_and_own(params.common_space_fraction, min(shape), len(deltas))
    stable = params.mode == "stable"

    def leading(a: Tensor, k: int, size: float) -> SVD:
        """The k leading triples, of those above what is noise in a matrix of that norm."""
        found = svd(a, k)
        noise = max(shape) * EPS[a.element_size()] * size
        kept = int((found.s > noise).sum()) if stable else k
        return SVD(found.u[:, :kept], found.s[:kept], found.vh[:kept])

    total = deltas.total(params.weight)
    common = leading(total, k_common, float(total.norm()))
    parts, basis = [], common.u.double()
    for k, weight in enumerate(params.weight) if k_task else ():
        delta = deltas[k].mul_(weight)
        size = float(delta.norm())  # what is left of it may be noise
        rest = times(lambda c: c - basis @ (basis.mT @ c), delta)
        parts.append(leading(rest, k_task, size))
    parts.append(common)
    u, vh = torch.cat([p.u for p in parts], 1), torch.cat([p.vh for p in parts])
    q_u, q_v = (polar(x) if stable else polar(x, floor=0.0, route="svd") for x in (u, vh))
    sigma = float(torch.cat([p.s for p in parts]).sum(dtype=torch.float64))
    return Add(q_u.q @ q_v.q, params.lambda_ * sigma / max(1, k_common + k_task * len(deltas)))


@iso_cts.oracle
def iso_cts_oracle(deltas: Sequence[Tensor], params: Params) -> Tensor:
    """The published steps in float64."""
    import torch

    shape = deltas[0].shape
    scaled = [w * d for w, d in zip(params.weight, deltas, strict=True)]
    k_common, k_task = common_and_own(params.common_space_fraction, min(shape), len(deltas))

    def leading(a: Tensor, k: int, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(a, full_matrices=False)
        if params.mode == "stable":
            k = min(k, int((s > max(shape) * EPS[4] * size).sum()))
        return u[:, :k], s[:k], vh[:k]

    total = added(scaled)
    u_c, s_c, v_c = leading(total, k_common, total.norm())
    us, ss, vs = [], [], []
    for delta in scaled:
        u, s, v = leading(delta - u_c @ u_c.mT @ delta, k_task, delta.norm())
        us.append(u)
        ss.append(s)
        vs.append(v)

    stable = params.mode == "stable"
    q_u, q_v = (
        polar_oracle(torch.cat([*us, u_c], 1), stable),
        polar_oracle(torch.cat([*vs, v_c]), stable),
    )
    sigma = torch.cat([*ss, s_c]).sum() / max(1, k_common + k_task * len(deltas))
    merged = sigma * q_u @ q_v
    return merged * float(params.lambda_)
