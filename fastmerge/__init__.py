"""fastmerge: fast, exact and bounded merging of model checkpoints.

fastmerge.merge("recipe.yaml", "out")                       model folders, as the command line does
fastmerge.plan("recipe.yaml")                               what that would read, write and need
fastmerge.merge_tensors(base, [a, b], method="ties", ...)   torch tensors or numpy arrays
fastmerge.merge_state_dicts(base, [a, b], method="ties")    whole state dicts in memory
fastmerge.methods()                                         every method with its parameters
fastmerge.ops                                               statistics, masks and the fused walk
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastmerge import ops as ops
    from fastmerge.api import merge as merge
    from fastmerge.api import merge_state_dicts as merge_state_dicts
    from fastmerge.api import merge_tensors as merge_tensors
    from fastmerge.api import plan as plan
    from fastmerge.errors import MergeError as MergeError
    from fastmerge.registry import methods as methods

_HOMES = {
    "merge": "fastmerge.api",
    "merge_state_dicts": "fastmerge.api",
    "merge_tensors": "fastmerge.api",
    "plan": "fastmerge.api",
    "MergeError": "fastmerge.errors",
    "methods": "fastmerge.registry",
}

__all__ = ["MergeError", "merge", "merge_state_dicts", "merge_tensors", "methods", "ops", "plan"]


def __getattr__(name: str) -> Any:
    """Load a public name on first use: `import fastmerge` itself stays a few milliseconds."""
    if name == "ops":
        return importlib.import_module("fastmerge.ops")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fastmerge' has no attribute {name!r}")
