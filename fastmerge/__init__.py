"""fastmerge: fast, exact and bounded merging of model checkpoints.

fastmerge.merge("recipe.yaml", "out")                       model folders, as the command line does
fastmerge.plan("recipe.yaml")                               what that would read, write and need
fastmerge.merge_tensors(base, [a, b], method="ties", ...)   torch tensors or numpy arrays
fastmerge.merge_state_dicts(base, [a, b], method="ties")    whole state dicts in memory
fastmerge.quantize_4bit(w, "nf4"), dequantize_4bit(q)       tensors as codes of a few bits
fastmerge.merge_to_4bit(base, [a, b], method="ties")        merged and coded in one pass
fastmerge.pack(model, base, "out", strategy="graft")        what a model changes, compressed
fastmerge.extract_lora(base, tuned, "out", rank=16)         what a model changes, as an adapter
fastmerge.merge_adapters([a, b], "out", weights=0.5)        LoRA adapters made into one
fastmerge.list_methods()                                    every method with its parameters
fastmerge.ops                                               statistics, masks and the fused walk
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastmerge import ops as ops
    from fastmerge.api import merge as merge
    from fastmerge.api import plan as plan
    from fastmerge.coded_tensors import LoraTensor as LoraTensor
    from fastmerge.coded_tensors import QuantTensor as QuantTensor
    from fastmerge.coded_tensors import dequantize_4bit as dequantize_4bit
    from fastmerge.coded_tensors import quantize_4bit as quantize_4bit
    from fastmerge.errors import MergeError as MergeError
    from fastmerge.lora import extract_lora as extract_lora
    from fastmerge.lora import merge_adapters as merge_adapters
    from fastmerge.packs import apply_packs as apply_packs
    from fastmerge.packs import open_pack as open_pack
    from fastmerge.packs import pack as pack
    from fastmerge.packs import revert as revert
    from fastmerge.packs import rmm as rmm
    from fastmerge.packs import sum_packs as sum_packs
    from fastmerge.registry import methods as list_methods
    from fastmerge.tensors import merge_state_dicts as merge_state_dicts
    from fastmerge.tensors import merge_tensors as merge_tensors
    from fastmerge.tensors import merge_to_4bit as merge_to_4bit

#: Public name -> (module, name there). `fastmerge.methods` is the package of them once one is used.
_HOMES = {
    "merge": ("fastmerge.api", "merge"),
    "merge_state_dicts": ("fastmerge.tensors", "merge_state_dicts"),
    "merge_tensors": ("fastmerge.tensors", "merge_tensors"),
    "merge_to_4bit": ("fastmerge.tensors", "merge_to_4bit"),
    "quantize_4bit": ("fastmerge.coded_tensors", "quantize_4bit"),
    "dequantize_4bit": ("fastmerge.coded_tensors", "dequantize_4bit"),
    "LoraTensor": ("fastmerge.coded_tensors", "LoraTensor"),
    "QuantTensor": ("fastmerge.coded_tensors", "QuantTensor"),
    "plan": ("fastmerge.api", "plan"),
    "extract_lora": ("fastmerge.lora", "extract_lora"),
    "merge_adapters": ("fastmerge.lora", "merge_adapters"),
    "pack": ("fastmerge.packs", "pack"),
    "apply_packs": ("fastmerge.packs", "apply_packs"),
    "open_pack": ("fastmerge.packs", "open_pack"),
    "sum_packs": ("fastmerge.packs", "sum_packs"),
    "rmm": ("fastmerge.packs", "rmm"),
    "revert": ("fastmerge.packs", "revert"),
    "MergeError": ("fastmerge.errors", "MergeError"),
    "list_methods": ("fastmerge.registry", "methods"),
}

__all__ = [
    "LoraTensor",
    "MergeError",
    "QuantTensor",
    "apply_packs",
    "dequantize_4bit",
    "extract_lora",
    "list_methods",
    "merge",
    "merge_adapters",
    "merge_state_dicts",
    "merge_tensors",
    "merge_to_4bit",
    "open_pack",
    "ops",
    "pack",
    "plan",
    "quantize_4bit",
    "revert",
    "rmm",
    "sum_packs",
]


def __getattr__(name: str) -> Any:
    """Load a public name on first use: `import fastmerge` itself stays a few milliseconds."""
    if name == "ops":
        return importlib.import_module("fastmerge.ops")
    if name in _HOMES:
        module, known_as = _HOMES[name]
        return getattr(importlib.import_module(module), known_as)
    raise AttributeError(f"module 'fastmerge' has no attribute {name!r}")
