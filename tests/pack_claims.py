"""Which function of packs and of mixtures of experts each golden vector is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vector_cases import Case, Checks

from fastmerge import ops
from fastmerge.linalg import svd
from fastmerge.linalg.tiny import principal
from fastmerge.methods.dop import disturbance, split_rank
from fastmerge.packs.smile import SmileExpert, SmileLinear


def mcsmoe(case: Case) -> Checks:
    w = case.inputs["W"]

    def split(run: Any) -> Any:
        return ops.low_rank_sparse(w, ratio=case.params["parameter_ratio"], keep_rows=1.0)

    return {
        "LR": lambda run: split(run).left @ split(run).right,
        "residual": lambda run: split(run).values,
        "rank": lambda run: torch.tensor(split(run).left.shape[1], dtype=torch.float64),
        "gram_L": lambda run: split(run).left.mT @ split(run).left,
    }


def graft(case: Case) -> Checks:
    found = svd(case.inputs["delta"], case.params["dim"])
    return {"reconstruction": lambda run: found.product(), "S": lambda run: found.s}


def submoe(case: Case) -> Checks:
    experts, rule = case.inputs["experts"], case.params

    def merged(run: Any) -> Any:
        return ops.merge_experts(experts, rule["freq"], rule["rank"])

    def by_vectors(run: Any) -> Any:
        """The published steps: V_k explicitly, and their average."""
        return ops.merge_experts(experts, rule["freq"], rule["rank"], rule="task_arithmetic")

    return {"merged": by_vectors, "projected_average": merged}


def dop_loss(case: Case) -> Checks:
    target = case.inputs["task_delta"]
    epsilon, space = case.params["svd_epsilon"], case.params["svd_proj_space"]
    loss, gradient = disturbance(target, epsilon, space).gradient(
        target + case.inputs["merged_minus_finetuned"]
    )
    return {
        "loss": lambda run: torch.tensor(loss, dtype=torch.float64),
        "split_rank": lambda run: torch.tensor(
            split_rank(torch.linalg.svdvals(target), epsilon), dtype=torch.float64
        ),
        "grad": lambda run: gradient,
    }


def rmm_rows(case: Case) -> Checks:
    """[T, positions, r]: the vectors of all models at each position are decomposed together."""
    rows = case.inputs["A_rows"]

    def reconstructed(run: Any) -> Any:
        return principal(rows.permute(1, 2, 0), case.params["p"]).product().permute(2, 0, 1)

    return {"reconstructed": reconstructed}


def smile(case: Case) -> Checks:
    base, bias = case.inputs["W0"], case.inputs["b0"]
    experts = []
    for weight, own_bias in zip(case.inputs["W"], case.inputs["b"], strict=True):
        found = svd(weight - base, case.params["k"])
        gate = svd(weight - base, case.params["gate_k"]).vh
        experts.append(SmileExpert(found.u, found.s[:, None] * found.vh, own_bias - bias, gate))
    layer = SmileLinear(base, bias, experts, case.params["top_k"])
    return {
        "router_norms": lambda run: layer.router_logits(case.inputs["x"]),
        "y": lambda run: layer(case.inputs["x"]),
    }


PACKS: dict[tuple[str, str], Callable[[Case], Checks]] = {
    ("lowrank", "mcsmoe_lowrank"): mcsmoe,
    ("lowrank", "graft_truncate"): graft,
    ("lowrank", "submoe_union"): submoe,
    ("lowrank", "dop_loss"): dop_loss,
    ("lowrank", "rmm_rows"): rmm_rows,
    ("lowrank", "smile_linear"): smile,
}
