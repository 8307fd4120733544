"""Golden vectors as cases: a file's inputs as tensors, and what is expected of them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vector_runners import Runner

#: Computes one expected value; None where the runner does not expose it.
Check = Callable[[Runner], Any]
Checks = dict[str, Check]

#: Cases whose reference decomposes in float32 without saying so, and files whose reference rounds factors
#: such as weights to it.
SINGLE = {"smile_linear"}
SINGLE_FILES = {"della", "peft_lora"}


@dataclass(frozen=True)
class Case:
    """One case of a vector file; `inputs` are float64 tensors, `expected` as the file has them."""

    file: str
    folder: str
    name: str
    params: Mapping[str, Any]
    raw_inputs: Mapping[str, Any]
    expected: Mapping[str, Any]
    notes: str

    @functools.cached_property
    def inputs(self) -> Mapping[str, Any]:
        return {key: tensor(value) for key, value in self.raw_inputs.items()}

    @property
    def tolerance(self) -> float:
        """Relative and absolute; looser where the reference went through float32."""
        single = "float32" in self.notes or self.file in SINGLE_FILES or self.name in SINGLE
        return 3e-6 if single else 1e-9


def tensor(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"shape", "data"}:
        return torch.tensor(value["data"], dtype=torch.float64).reshape(value["shape"])
    if isinstance(value, dict):
        return {name: tensor(v) for name, v in value.items()}
    if isinstance(value, list) and any(isinstance(v, dict) for v in value):
        return [tensor(v) for v in value]
    return value if value is None else torch.tensor(value, dtype=torch.float64)


def _resolved(inputs: Any, everything: Mapping[str, Any]) -> Any:
    """Return a case's inputs with `same as X`, in whole or for one key, replaced by X's."""
    if isinstance(inputs, str):
        return _resolved(everything[inputs.removeprefix("same as ")], everything)
    return {
        key: _resolved(everything[value.removeprefix("same as ")], everything)[key]
        if isinstance(value, str) and value.startswith("same as ")
        else value
        for key, value in inputs.items()
    }


def read_cases(path: Path) -> list[Case]:
    """Return the cases of a JSON file; none if it is not one of this shape."""
    content = json.loads(path.read_text())
    cases = content.get("cases", [])
    everything = {c["name"]: c["inputs"] for c in cases}
    return [
        Case(
            path.stem,
            path.parent.name,
            c["name"],
            c.get("params", {}),
            _resolved(c["inputs"], everything),
            c["expected"],
            c.get("notes", ""),
        )
        for c in cases
    ]
