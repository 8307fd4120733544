"""An adapter's folder as peft reads it: names of tensors, ranks by module, modules that are targets."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastmerge.checkpoint.adapter import ADAPTER, ADAPTER_CONFIG, PREFIX
from fastmerge.checkpoint.durable import write_file
from fastmerge.checkpoint.new_folder import NewFolder
from fastmerge.dtypes import DType
from fastmerge.errors import MergeError, RecipeError
from fastmerge.stored_tensors import narrowed, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

_FILES = re.compile(r"adapter_config\.json|adapter_model\.(safetensors|bin)|README\.md")

#: What factors are stored as.
FACTOR_TYPES = ("float32", "bfloat16", "float16")


class Factors(NamedTuple):
    """What a weight [out, in] gains: b a. a: [r, in]; b: [out, r]."""

    a: Tensor
    b: Tensor


def new_adapter(path: str | Path, *, overwrite: bool, inputs: Sequence[Path]) -> NewFolder:
    """Return the folder of an adapter that is to be written."""
    return NewFolder(
        path,
        what="an adapter",
        mark=ADAPTER_CONFIG,
        files=_FILES,
        overwrite=overwrite,
        inputs=inputs,
    )


def check_rank(what: str, value: object) -> None:
    """Raise RecipeError unless a rank is a whole number from 1 on."""
    if not isinstance(value, int):
        raise RecipeError(f"{what} must be a whole number, got {value!r}")
    if value < 1:
        raise RecipeError(f"{what} must be at least 1, got {value}")


def factor_type(name: str) -> DType:
    """Return the type of factors of that name.

    Raises:
        RecipeError: there is no such type of factors.
    """
    if name not in FACTOR_TYPES:
        raise RecipeError(f"dtype must be one of {', '.join(FACTOR_TYPES)}, got {name!r}")
    return DType[{"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[name]]


def stored(module: str, factors: Factors, dtype: DType) -> Factors:
    """Return factors in the type that they are stored in.

    Raises:
        MergeError: a factor is beyond what that type holds.
    """
    found = Factors(narrowed(factors.a, dtype), narrowed(factors.b, dtype))
    for letter, factor in (("A", found.a), ("B", found.b)):
        if not bool(factor.isfinite().all()):
            raise MergeError(
                f"lora_{letter} of {module!r} is beyond what {dtype.torch} holds; pass --dtype float32"
            )
    return found


def write_adapter(
    folder: Path,
    factors: Mapping[str, Factors],
    whole: Mapping[str, Tensor],
    targets: Collection[str],
    settings: Mapping[str, Any],
) -> int:
    """Write adapter_model.safetensors and adapter_config.json; return their bytes.

    whole: tensors of the model that take others' place, by name. targets: what peft is to adapt. settings:
    what the configuration says beside that.
    """
    tensors: dict[str, Tensor] = {}
    for module, pair in factors.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = pair.a.contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = pair.b.contiguous()
    saved, biases = [], False
    for name, tensor in whole.items():
        module, _, kind = name.rpartition(".")
        if kind == "bias" and f"{module}.weight" not in whole:
            # peft takes modules entire, but single biases; those of adapted layers are inside its own.
            inner = f"{module}.base_layer" if module in factors else module
            tensors[f"{PREFIX}{inner}.bias"] = tensor
            biases = True
        else:
            tensors[f"{PREFIX}{name}"] = tensor
            saved.append(module)
    config = _config({m: len(pair.a) for m, pair in factors.items()}, targets) | {
        "bias": "all" if biases else "none",
        "modules_to_save": sorted(set(saved)) or None,
        **settings,
    }
    text = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    written = write_tensors(folder / ADAPTER, tensors, {"format": "pt"})
    write_file(folder / ADAPTER_CONFIG, text, len(text))
    return written + len(text)


def _config(ranks: Mapping[str, int], targets: Collection[str]) -> dict[str, Any]:
    """Return the configuration of an adapter whose products are added as they are: alpha = r."""
    r = max(ranks.values())
    clashes = Counter(suffix for module in ranks for suffix in _suffixes(module))
    pattern = {
        # peft takes the first pattern that matches the end of a module's name.
        f"^{module}" if clashes[module] > 1 else module: rank
        for module, rank in ranks.items()
        if rank != r
    }
    return {
        "alpha_pattern": pattern,
        "base_model_name_or_path": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": pattern,
        "target_modules": sorted(targets),
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _suffixes(module: str) -> list[str]:
    """Return a module's name and what follows each of its dots."""
    words = module.split(".")
    return [".".join(words[i:]) for i in range(len(words))]


def target_names(adapted: Collection[str], others: Collection[str]) -> set[str]:
    """Return last words of the names of adapted modules, or whole names where one of `others`, linear
    modules that are not adapted, ends in such a word."""
    words = {module.rpartition(".")[2] for module in adapted}
    shared = any(other.rpartition(".")[2] in words for other in others)
    return set(adapted) if shared else words
