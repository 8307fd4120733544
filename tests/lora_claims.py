"""Which function of LoRA extraction and of merges of adapters each golden vector is."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from vector_cases import Case, Checks, tensor

from fastmerge.lora.combine import Part, Rule, combine
from fastmerge.lora.extract import Goal, balanced
from fastmerge.lora.folder import Factors, write_adapter


def extraction(case: Case) -> Checks:
    assert case.params["distribute_scale"]
    found = Goal(case.params["max_rank"]).truncated(case.inputs["delta"])
    a, b = balanced(found.svd)
    return {
        "BA": lambda run: b @ a,
        "AAt": lambda run: a @ a.mT,
        "BtB": lambda run: b.mT @ b,
    }


def _parts(
    a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float], weights: Sequence[float]
) -> list[Part]:
    return [Part(*part) for part in zip(a, b, scales, weights, strict=True)]


def of_layers(case: Case) -> Checks:
    """A release of peft that applied the scale of an adapter twice."""
    rules = case.params
    a, b = ([tensor(x) for x in case.raw_inputs[f"lora_{letter}"]] for letter in "AB")
    parts = _parts(a, b, rules["scaling"], rules["weights"])
    rule = Rule(
        case.name.removeprefix("peft_"),
        rank=rules["svd_rank"],
        density=rules["density"],
        majority_sign=rules["majority_sign_method"],
        scaling_power=2,
    )
    a, b = combine(parts, rule).factors
    identity = torch.eye(len(a), dtype=torch.float64)
    return {
        "BA": lambda run: b @ a,
        "AAt_is_identity": lambda run: torch.tensor(torch.allclose(a @ a.mT, identity, atol=1e-12)),
        "BtB": lambda run: b.mT @ b,
    }


def of_adapters(case: Case) -> Checks:
    """peft 0.21.2, which applies it once."""
    adapters: Sequence[Mapping[str, Tensor]] = list(case.inputs.values())
    parts = _parts(
        [x["A"] for x in adapters],
        [x["B"] for x in adapters],
        [float(x["scaling"]) for x in adapters],
        case.params["weights"],
    )
    rule = Rule(case.params["combination_type"], density=case.params.get("density"))
    a, b = combine(parts, rule).factors

    def scaling(run: object) -> Tensor:
        """What the adapter's files say of its scale, alpha / r."""
        with tempfile.TemporaryDirectory() as folder:
            write_adapter(Path(folder), {"linear": Factors(a, b)}, {}, ["linear"], {})
            config = json.loads((Path(folder) / "adapter_config.json").read_text())
        return tensor(config["lora_alpha"] / config["r"])

    return {
        "rank": lambda run: tensor(len(a)),
        "scaling": scaling,
        "delta_weight": lambda run: b @ a,
    }


LORA: dict[tuple[str, str], Callable[[Case], Checks]] = {
    ("lowrank", "lora_extract"): extraction,
    ("lowrank", "peft_*"): of_layers,
    ("peft_lora", "*"): of_adapters,
}
