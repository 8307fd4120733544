"""Which method of ours each golden vector is, with the one line why where the two differ in form.

A claim turns a case into functions of a runner, one for each key that its `expected` may hold.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import torch
from lora_claims import LORA
from pack_claims import PACKS
from spectral_claims import SPECTRAL
from torch import Tensor
from vector_cases import Case, Checks
from vector_runners import Runner

# ---- one claim per kind of case ------------------------------------------------------------------


def _operands(case: Case) -> tuple[Any, list[Any]]:
    return case.inputs["base"], list(case.inputs["experts"])


def _as_merge(case: Case) -> tuple[Tensor, list[Tensor]]:
    """A vector of one delta is a merge of one expert onto zeros."""
    delta = case.inputs["delta"]
    return torch.zeros_like(delta), [delta]


def ties_official(case: Case) -> Checks:
    base, experts = _operands(case)
    density = case.params["K"] / 100 if case.params["K"] > 1 else case.params["K"]
    params = {
        "preset": "paper",
        "density": density,
        "elect": case.params["resolve"],
        "merge_func": case.params["merge_func"],
    }
    lam = case.params["lam"]
    return {
        "mask": lambda run: run.mask("ties", base, experts, **params),
        "elected_sign": lambda run: run.elected_sign("ties", base, experts, **params),
        "merged_tv": lambda run: run.merge("ties", base, experts, **params) - base,
        "merged": lambda run: run.merge("ties", base, experts, lambda_=lam, **params),
    }


def _mergelm_rules(mask_rate: float, over_model: bool) -> dict[str, Any]:
    return {
        "preset": "paper",
        "density": 1 - mask_rate,
        "count_rule": "mask_rate",
        "zero_selects": "none",
        "scope": "model" if over_model else "tensor",
        "zero_sign": "global_majority" if over_model else "tensor_majority",
    }


def ties_mergelm(case: Case) -> Checks:
    base, experts = _operands(case)
    params = _mergelm_rules(
        case.params["param_value_mask_rate"], case.params["scope"].startswith("whole")
    )
    lam = case.params["scaling_coefficient"]
    return {"merged": lambda run: run.merge("ties", base, experts, lambda_=lam, **params)}


def ties_mergekit(case: Case) -> Checks:
    base, experts = _operands(case)
    params = {key: case.params[key] for key in ("weight", "density", "normalize")}
    lam = case.params["lam"]
    return {"merged": lambda run: run.merge("ties", base, experts, lambda_=lam, **params)}


def dare_official(case: Case) -> Checks:
    """The reference writes the rescaled experts back and merges those in a second step."""
    base, experts = _operands(case)
    masks = list(case.inputs["keep_masks"])
    rule = {"rescale_mode": "inverse_keep", "density": 1 - case.params["drop_rate"]}
    lam = case.params["scaling_coefficient"]
    second = case.params["mask_apply_method"]

    def rescaled(run: Runner) -> Tensor:
        each = [
            run.merge("dare_linear", base, [e], masks=[m], weight=1.0, **rule)
            for e, m in zip(experts, masks, strict=True)
        ]
        return torch.stack(each)

    def merged(run: Runner) -> Any:
        if second == "ties_merging":
            trim = _mergelm_rules(case.params["param_value_mask_rate"], over_model=True)
            return run.merge("ties", base, list(rescaled(run)), lambda_=lam, **trim)
        # One step: the rescaled deltas are summed as they are.
        average = second == "average_merging"
        weight = 1 / len(experts) if average else 1.0
        scale = 1.0 if average else lam
        return run.merge(
            "dare_linear", base, experts, masks=masks, weight=weight, lambda_=scale, **rule
        )

    assert second in ("average_merging", "task_arithmetic", "ties_merging")
    return {"rescaled_experts": rescaled, "merged": merged}


def dare_mergekit(case: Case) -> Checks:
    base, experts = _operands(case)
    method = case.name.removeprefix("mergekit_")
    return {
        "merged": lambda run: run.merge(
            method,
            base,
            experts,
            masks=list(case.inputs["keep_masks"]),
            weight=case.params["weight"],
            density=case.params["density"],
        )
    }


def della_prune(rank_by: str) -> Callable[[Case], Checks]:
    """MagPrune alone: the sparsified delta is the merge of one expert of weight 1 onto zeros."""

    def claim(case: Case) -> Checks:
        base, experts = _as_merge(case)
        params = {"density": case.params["density"], "rank_by": rank_by, "weight": 1.0}
        if "window_size" in case.params:
            params |= {"window": case.params["window_size"], "rescale_mode": "inverse_keep"}
        else:
            params |= {"epsilon": case.params["epsilon"]}

        def probability(run: Runner) -> Tensor:
            return run.probability("della_linear", base, experts, **params)[0]

        def mask(run: Runner) -> Tensor:
            uniform: Tensor = case.inputs["uniform"]
            return uniform < probability(run)

        def out(run: Runner) -> Any:
            return run.merge("della_linear", base, experts, masks=[mask(run)], **params)

        return {"keep_prob": probability, "mask": mask, "out": out}

    return claim


def della_full(case: Case) -> Checks:
    base, experts = _operands(case)
    params = {
        "density": case.params["density"],
        "window": case.params["window_size"],
        "weight": case.params["weight"],
        "normalize": case.params["normalize"],
        "rescale_mode": "inverse_keep",
    }

    def merged(run: Runner) -> Any:
        masks = case.inputs["uniform"] < run.probability("della", base, experts, **params)
        lam = case.params["lam"]
        return run.merge("della", base, experts, masks=list(masks), lambda_=lam, **params)

    return {"merged": merged}


def breadcrumbs_official(case: Case) -> Checks:
    base, experts = _as_merge(case)
    assert case.params["remove_first"]
    params = {
        "preset": "paper",
        "density": case.params["top_k_keep"],
        "gamma": case.params["top_k_remove"],
    }
    return {"out": lambda run: run.merge("breadcrumbs", base, experts, **params)}


def breadcrumbs_mergellm(case: Case) -> Checks:
    """MergeLLM's rates count from both ends, each end included; the same counts as fractions."""
    base, experts = _operands(case)
    n = base.numel()
    n_removed = int(n * (1 - case.params["param_density"]))
    n_small = int(n * case.params["param_value_mask_rate"])
    n_large = n_removed - n_small
    n_kept = n - n_large - n_small + 1  # the n_small-th smallest itself is kept
    params = {
        "weight": 1.0,
        "density": (n_kept + 0.5) / n,
        "gamma": (n_large + 0.5) / n,
        "lambda_": case.params["scaling_coefficient"],
    }
    return {"merged": lambda run: run.merge("breadcrumbs", base, experts, **params)}


def breadcrumbs_mergekit(case: Case) -> Checks:
    base, experts = _operands(case)
    method = "breadcrumbs_ties" if "_ties" in case.name else "breadcrumbs"
    return {"merged": lambda run: run.merge(method, base, experts, **case.params)}


def model_stock(case: Case) -> Checks:
    base, experts = _operands(case)
    return {"merged": lambda run: run.merge("model_stock", base, experts, **case.params)}


def peft_rule(case: Case) -> Checks:
    """PEFT's functions merge task tensors: deltas onto zeros, a sign elected before weights."""
    experts = list(case.inputs["task_tensors"])
    base = torch.zeros_like(experts[0])
    weight, density = case.params["weights"], case.params["density"]
    elected = {"elect_on": "unweighted", "divide_by": "count", "weight": weight}
    masks = list(case.inputs["keep_masks"]) if "keep_masks" in case.inputs else None
    drop = {"density": density, "rescale_mode": "inverse_keep"}

    def merged(run: Runner) -> Any:
        if case.name == "linear":
            return run.merge("task_arithmetic", base, experts, weight=weight)
        if case.name == "magnitude_prune":  # a trim without election: breadcrumbs, no outliers
            return run.merge(
                "breadcrumbs", base, experts, weight=weight, density=density, gamma=0.0
            )
        if case.name == "dare_linear":
            return run.merge("dare_linear", base, experts, masks=masks, weight=weight, **drop)
        if case.name == "dare_ties":  # our dare_ties elects on weighted changes, so in two steps
            assert masks is not None
            dropped = [
                run.merge("dare_linear", base, [e], masks=[m], weight=1.0, **drop)
                for e, m in zip(experts, masks, strict=True)
            ]
            return run.merge("ties", base, dropped, **elected)
        elect = {"ties_total": "mass", "ties_frequency": "count"}[case.name]
        return run.merge("ties", base, experts, density=density, elect=elect, **elected)

    return {"merged": merged}


def _sce(preset: dict[str, str]) -> Callable[[Case], Checks]:
    def claim(case: Case) -> Checks:
        base, experts = _operands(case)
        params = {**preset, "select_topk": case.params["select_topk"]}
        # As a mask on what is merged, which is where a walk shows it.
        shown = {**params, "select_applies_to": "all"}

        def selected(run: Runner) -> Any:
            mask = run.mask("sce", base, experts, **shown)[0]
            # The reference makes no mask where everything is selected.
            return None if case.params["select_topk"] >= 1 and bool(mask.all()) else mask

        return {
            "weights": lambda run: run.weights("sce", base, experts, **params),
            "select_mask": selected,
            "merged": lambda run: run.merge("sce", base, experts, **params),
        }

    return claim


#: (file, pattern of the case's name) -> claim; the first that matches.
CLAIMS: dict[tuple[str, str], Callable[[Case], Checks]] = {
    ("ties", "*"): ties_official,
    ("ties_scopes", "mergel*"): ties_mergelm,
    ("mergekit_ties", "*"): ties_mergekit,
    ("dare", "mergekit_*"): dare_mergekit,
    ("dare", "*"): dare_official,
    ("della", "row_*"): della_prune("row"),
    ("della", "layer_*"): della_prune("tensor"),
    ("della", "norank_*"): della_prune("value"),
    ("della", "mergekit_*"): della_prune("row"),
    ("della", "full_merge*"): della_full,
    ("breadcrumbs", "official_*"): breadcrumbs_official,
    ("breadcrumbs", "mergellm_*"): breadcrumbs_mergellm,
    ("breadcrumbs", "mergekit_*"): breadcrumbs_mergekit,
    ("model_stock", "*"): model_stock,
    ("peft", "*"): peft_rule,
    ("sce", "mergekit_*"): _sce({}),
    ("sce", "*"): _sce({"preset": "paper"}),
    **SPECTRAL,
    **PACKS,
    **LORA,
}

#: (file or folder, case or *) -> why no method of ours claims it.
UNCLAIMED: dict[tuple[str, str], str] = {
    ("localize_stitch", "mergebench_*"): "records a defect of the reference: its overlap loop "
    "overwrites the intersection, so that it counts one other expert only",
    ("consensus", "*"): "TALL masks and consensus merging are not implemented",
    ("emr", "*"): "EMR is not implemented",
    ("evo_merging", "*"): "Evo-Merging is not implemented",
    ("fisher", "*"): "Fisher-weighted averaging is not implemented",
    ("fw_hard", "*"): "FW-Merging is not implemented",
    ("localize_stitch", "*"): "Localize-and-Stitch is not implemented",
    ("magmax", "*"): "MagMax is not implemented",
    ("pcb", "*"): "PCB-Merging is not implemented",
    ("widen", "*"): "WIDEN is not implemented",
    ("spectral_misc", "adarank_*"): "AdaRank is not implemented",
    ("svd", "*"): "this method of the SVD family is not implemented",
    ("aligned", "*"): "methods that align or search are not implemented",
    ("quant", "*"): "4-bit formats are not implemented",
}


def claim_of(case: Case) -> Callable[[Case], Checks] | None:
    found = (
        claim
        for (file, pattern), claim in CLAIMS.items()
        if file == case.file and fnmatchcase(case.name, pattern)
    )
    return next(found, None)


def unclaimed_reason(file: str, folder: str, name: str) -> str | None:
    """Return why a case is not run, or None; a listed file goes before its folder."""
    for place in (file, folder):
        for (listed, pattern), reason in UNCLAIMED.items():
            if listed == place and fnmatchcase(name, pattern):
                return reason
    return None
