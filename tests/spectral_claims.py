"""Which method of the SVD family each golden vector is; its deltas are experts of a base of zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vector_cases import Case, Checks

from fastmerge.linalg import svd
from fastmerge.methods.knots import aligned_factors
from fastmerge.methods.star import kept_rank
from fastmerge.methods.svc import calibrated
from fastmerge.methods.tsv import orthogonal_triples
from fastmerge.methods.wudi import quadratic_of


def _as_merge(deltas: Tensor) -> tuple[Tensor, list[Tensor]]:
    return torch.zeros_like(deltas[0]), list(deltas)


def tsv_m(case: Case) -> Checks:
    base, deltas = _as_merge(case.inputs["deltas"])
    zeros, vectors = _as_merge(case.inputs["vec"])
    k = case.params["kept_rank_per_task"]

    def first(run: Any) -> Tensor:
        u, s, v = (x[0] for x in orthogonal_triples(deltas, [1.0] * len(deltas), k, stable=False))
        return (u * s) @ v.mT

    return {
        "merged": lambda run: run.merge("tsv_m", base, deltas),
        "merged_eigen_variant": lambda run: run.merge("tsv_m", base, deltas, mode="compat"),
        "vec_mean": lambda run: run.merge("tsv_m", zeros, vectors),
        "singular_values": lambda run: torch.linalg.svdvals(run.merge("tsv_m", base, deltas))[
            : k * len(deltas)
        ],
        "single_task_0": first,
    }


def tsv_c(case: Case) -> Checks:
    deltas = case.inputs["deltas"]
    k = int(min(deltas[0].shape) * case.params["sv_reduction"])
    return {
        "reconstruction": lambda run: torch.stack([svd(d, k).product() for d in deltas]),
        "s": lambda run: torch.stack([svd(d, k).s for d in deltas]),
    }


def iso(case: Case) -> Checks:
    base, deltas = _as_merge(case.inputs["deltas"])
    rule = {"common_space_fraction": case.params["common_space_fraction"]}

    def level(merged: Tensor) -> Tensor:
        return torch.linalg.svdvals(merged).mean()

    return {
        "iso_c": lambda run: run.merge("iso_c", base, deltas),
        "iso_c_sigma": lambda run: level(run.merge("iso_c", base, deltas)),
        "iso_cts": lambda run: run.merge("iso_cts", base, deltas, **rule),
        "iso_cts_sigma": lambda run: level(run.merge("iso_cts", base, deltas, **rule)),
    }


def star(case: Case) -> Checks:
    base, deltas = _as_merge(case.inputs["deltas"])
    eta = case.params["eta_percent"]

    def each(run: Any) -> Tensor:
        alone = [
            run.merge(
                "star", base, deltas, eta=eta, weight=[len(deltas) * (j == k) for j in range(3)]
            )
            for k in range(3)
        ]
        return torch.stack(alone)

    return {
        "merged": lambda run: run.merge("star", base, deltas, eta=eta),
        "per_task": each,
        "ranks": lambda run: torch.tensor(
            [kept_rank(torch.linalg.svdvals(d), eta) for d in deltas], dtype=torch.float64
        ),
    }


def svc(case: Case) -> Checks:
    """The merged model is task arithmetic at 0.3; also from the merged model itself."""
    base, experts = case.inputs["W0"], list(case.inputs["W_tasks"])
    alpha = case.params["alpha"]

    def after(run: Any) -> Tensor:
        found = run.merge("svc", base, experts, weight=0.3, alpha=alpha)
        merged = case.inputs["W_merged"] - base
        torch.testing.assert_close(
            found, base + calibrated(merged, [e - base for e in experts], alpha)
        )
        return found

    return {"calibrated": after}


def twin(case: Case) -> Checks:
    """One expert beside a shared model that is the base."""
    base, expert = case.inputs["theta_shared"], case.inputs["theta_t"]
    rule = {"shared_scale": 0.0, "mask_rate": 1 - case.params["density"]}
    return {
        "exclusive": lambda run: run.merge("twin_merging", base, [expert], **rule) - base,
        "rank": lambda run: torch.linalg.matrix_rank(
            run.merge("twin_merging", base, [expert], **rule) - base, rtol=1e-9
        ).double(),
    }


def subspace_boosting(case: Case) -> Checks:
    delta = case.inputs["merged_delta"]
    base, beta = torch.zeros_like(delta), case.params["beta"]

    def cutoff(run: Any) -> Tensor:
        raised = torch.linalg.svdvals(run.merge("subspace_boosting", base, [delta], beta=beta))
        return (torch.linalg.svdvals(delta) > raised.min() * (1 + 1e-9)).sum().double()

    return {
        "boosted": lambda run: run.merge("subspace_boosting", base, [delta], beta=beta),
        "cutoff_index": cutoff,
    }


def lore(case: Case) -> Checks:
    """What the experts are distances from does not matter; the estimates are what single weights add."""
    experts = list(case.inputs["W_tasks"])
    base = torch.ones_like(experts[0])
    rule = {"mu": case.params["mu"], "sweeps": case.params["iters"]}

    def theta(run: Any) -> Tensor:
        return run.merge("lore", base, experts, lambda_=0.0, **rule)

    def each(run: Any) -> Tensor:
        alone = [
            run.merge("lore", base, experts, weight=[3.0 * (j == k) for j in range(3)], **rule)
            for k in range(3)
        ]
        return torch.stack(alone) - theta(run)

    return {
        "merged": lambda run: run.merge(
            "lore", base, experts, lambda_=case.params["lambda"], **rule
        ),
        "theta0": theta,
        "deltas": each,
    }


def wudi(case: Case) -> Checks:
    base, deltas = _as_merge(case.inputs["deltas"])
    rule = {"steps": case.params["iter"], "lr": case.params["lr"]}
    start, c, d = quadratic_of(deltas, [1.0] * len(deltas))

    def loss(x: Tensor) -> Tensor:
        own = [(((x - t) @ t.mT) ** 2).sum() / (t * t).sum() for t in deltas]
        return torch.stack(own).sum()

    return {
        "merged": lambda run: run.merge("wudi", base, deltas, **rule),
        "vec_mean": lambda run: run.merge("wudi", base[0], [x[0] for x in deltas]),
        "loss_init": lambda run: loss(start),
        "loss_final": lambda run: loss(run.merge("wudi", base, deltas, **rule)),
        "C": lambda run: c,
        "D": lambda run: d,
        "grad_at_init": lambda run: 2 * (start @ c - d),
    }


def optmerge(case: Case) -> Checks:
    base, deltas = _as_merge(case.inputs["deltas"])
    rule = {
        "steps": case.params["iter"],
        "lr": case.params["lr"],
        "momentum": case.params["momentum"],
    }
    k = case.params["rank_per_task"]
    leading = [svd(t, k) for t in deltas]
    shares = [1 / (t * t).sum() for t in deltas]
    return {
        "merged": lambda run: run.merge("optmerge", base, deltas, **rule),
        "C": lambda run: sum(
            w * (t.vh.mT * t.s**2) @ t.vh for w, t in zip(shares, leading, strict=True)
        ),
        "D": lambda run: sum(
            w * (t.u * t.s**3) @ t.vh for w, t in zip(shares, leading, strict=True)
        ),
    }


def swudi(case: Case) -> Checks:
    base, experts = case.inputs["W0"], list(case.inputs["W"])
    rule = {"time": case.params["exp_time"], "rank_ratio": case.params["truncate_rank_ratio"]}
    return {
        "swudi_weight": lambda run: run.merge("wudi", base, experts, solver="swudi", **rule),
        "aswudi_weight": lambda run: run.merge("wudi", base, experts, solver="aswudi"),
    }


def adarank(case: Case) -> Checks:
    base, deltas = case.inputs["W0"], case.inputs["deltas"]
    masks = list(case.inputs["mask_logit"])
    rule = {"weight": case.params["prior"]}
    return {
        "merged": lambda run: run.merge(
            "adarank", base, [base + d for d in deltas], masks=masks, **rule
        )
    }


def opcm(case: Case) -> Checks:
    """Each step is the merge of so many experts, and of the step before with one more."""
    base = {"W": case.inputs["W0"], "b": case.inputs["b0"]}
    experts = [
        {"W": base["W"] + w, "b": base["b"] + b}
        for w, b in zip(case.inputs["delta_W"], case.inputs["delta_b"], strict=True)
    ]
    steps = case.expected["steps"]
    rule = {"alpha": case.params["alpha"]}

    def each(run: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for k in range(2, 2 + len(steps)):
            merged = run.merge("opcm", base, experts[:k], **rule)
            if found:
                before = {"merged_experts": k - 1, "merged_lambda": steps[k - 3]["lambda_t"]}
                again = run.merge("opcm", base, [found[-1], experts[k - 1]], **before, **rule)
                for name, value in merged.items():
                    torch.testing.assert_close(again[name], value)
            moved = {n: x - base[n] for n, x in merged.items()}
            # The bias is no matrix: its deltas are summed as they are, then divided.
            divided = sum(e["b"] - base["b"] for e in experts[:k]).norm() / moved["b"].norm()
            whole = torch.cat([x.flatten() for x in moved.values()]).norm()
            found.append({**merged, "lambda_t": divided, "avg_norm": whole})
        return found

    return {"steps": each}


def knots(case: Case) -> Checks:
    layers = (0, 1)
    factors = {
        n: list(zip(case.inputs[f"lora_B_layer{n}"], case.inputs[f"lora_A_layer{n}"], strict=True))
        for n in layers
    }
    deltas = {n: [b @ a for b, a in factors[n]] for n in layers}
    base = {f"{n}.w": torch.zeros_like(deltas[n][0]) for n in layers}
    experts = [{f"{n}.w": deltas[n][k] for n in layers} for k in range(3)]
    rule = {
        "density": case.params["topK_percent"] / 100,
        "lambda": case.params["scaling"],
        "scope": "model",
        "least_singular_value": case.params["eps"],
    }

    def merged(n: int) -> Any:
        def check(run: Any) -> Tensor:
            found: Tensor = run.merge("knots", base, experts, **rule)[f"{n}.w"]
            return found

        return check

    def values(n: int) -> Tensor:
        s = torch.linalg.svdvals(torch.cat(deltas[n], 1))
        return s[s > case.params["eps"]]

    def projector(run: Any) -> Tensor:
        basis, aligned = aligned_factors(factors[0], case.params["eps"])
        for (b, a), z in zip(factors[0], aligned, strict=True):
            torch.testing.assert_close(basis @ z, b @ a)
        return basis @ basis.mT

    return {
        "merged_layer0": merged(0),
        "merged_layer1": merged(1),
        "S_layer0": lambda run: values(0),
        "S_layer1": lambda run: values(1),
        "projector_layer0": projector,
    }


SPECTRAL: dict[tuple[str, str], Callable[[Case], Checks]] = {
    ("tsvm", "tsvm_*"): tsv_m,
    ("tsvm", "tsvc"): tsv_c,
    ("iso", "*"): iso,
    ("spectral_misc", "star"): star,
    ("spectral_misc", "svc"): svc,
    ("spectral_misc", "twin_svd"): twin,
    ("spectral_misc", "subspace_boost"): subspace_boosting,
    ("spectral_misc", "lore"): lore,
    ("spectral_misc", "adarank_recombine"): adarank,
    ("opcm", "*"): opcm,
    ("knots", "*"): knots,
    ("wudi", "wudi_adam"): wudi,
    ("wudi", "optmerge_sgd"): optmerge,
    ("wudi", "swudi_aswudi"): swudi,
}
