"""Merge methods as data: parameters, scope, contract, recipe and oracle, declared in one file each.

From a declaration come validation, YAML and keyword parsing, the README's method table and the test matrix.
Methods are found in `fastmerge/methods/` and under the entry-point group `fastmerge.methods`.
"""

from __future__ import annotations

import enum
import hashlib
import importlib
import importlib.metadata
import math
import pkgutil
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

from fastmerge.errors import RecipeError
from fastmerge.stages import GivenMask, Outcome, Request

Recipe = Generator[Request, Any, Outcome]
RecipeFunction = Callable[["Params", "TensorContext"], Recipe]
Oracle = Callable[..., Any]


class Scope(enum.Enum):
    """All the planner knows about a method."""

    ELEMENT = "element"  # any tile, one pass
    TENSOR = "tensor"  # a sweep for statistics over the tensor or its rows, then the walk
    WHOLE = "whole"  # as tensor, and the walk needs all of the tensor at once
    MATRIX = "matrix"  # all of the tensor, and room to decompose its deltas
    MODEL = "model"  # a first pass over all shards, then the walk


class Params(SimpleNamespace):
    """Resolved parameters of one tensor. Shared ones are scalars, per-input ones lists in operand order.

    `lambda` is spelt `lambda_`. Lists have one entry per expert operand of the recipe.
    """


@dataclass(frozen=True)
class TensorContext:
    """What a recipe may know about the tensor it merges.

    n_experts counts the operands other than the base of `add_base` walks. cols is the last dimension (a
    scalar has 1); 1-D tensors are one row. n_model is the number of merged elements of the model.
    """

    name: str
    shape: tuple[int, ...]
    n_experts: int
    has_base: bool = True
    seed: int = 0
    n_model: int = 0
    given: GivenMask | None = None

    @property
    def n(self) -> int:
        return math.prod(self.shape)

    @property
    def cols(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        return self.n // self.cols if self.cols else 0

    def keys(self, purpose: str) -> list[int]:
        """Return one Philox key per expert: a hash of (seed, output tensor name, expert ordinal, purpose)."""
        return [philox_key(self.seed, self.name, k, purpose) for k in range(self.n_experts)]


def philox_key(seed: int, name: str, expert: int, purpose: str) -> int:
    """Return the 64-bit key of one expert's draws; the draw's counter is the flat element index."""
    text = f"fastmerge-1\0{seed}\0{name}\0{expert}\0{purpose}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Cost:
    """What decomposing one tensor's deltas takes beside its operands: most bytes at a time, and
    operations."""

    memory: int
    flops: float


ParamScope = Literal["shared", "expert", "input"]


@dataclass(frozen=True)
class Param:
    """One parameter of a method.

    scope:   shared: one value per tensor; expert: one per input that is not the base; input: one per input.
    kind:    float, int, bool or str; values are converted from YAML scalars (`1e-5` reads as text there).
    default: REQUIRED makes a missing value an error.
    low, high: inclusive bounds of numbers; choices: the allowed texts.
    """

    name: str
    default: Any
    doc: str = ""
    scope: ParamScope = "shared"
    kind: type = float
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()

    def convert(self, value: Any, place: str) -> Any:
        """Return `value` as this parameter's type, or raise RecipeError naming `place`."""
        if value is None and self.default is None:
            return None
        out = _convert(self.kind, value)
        if out is None:
            raise RecipeError(f"{place} must be {_KIND_NAMES[self.kind]}, got {value!r}")
        if self.choices and out not in self.choices:
            raise RecipeError(f"{place} must be one of {', '.join(self.choices)}, got {value!r}")
        number = isinstance(out, float | int) and not isinstance(out, bool)
        below = number and self.low is not None and out < self.low
        above = number and self.high is not None and out > self.high
        if below or above or (number and out != out):
            low = "-inf" if self.low is None else f"{self.low:g}"
            high = "inf" if self.high is None else f"{self.high:g}"
            raise RecipeError(f"{place} must be in [{low}, {high}], got {value!r}")
        return out


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED = _Required()

_KIND_NAMES = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}
_TRUE = {"true", "yes", "on", "1", "y", "t"}
_FALSE = {"false", "no", "off", "0", "n", "f"}


def _convert(kind: type, value: Any) -> Any:
    if kind is str:
        return value if isinstance(value, str) else None
    if kind is bool:
        if isinstance(value, bool):
            return value
        text = str(value).lower()
        if value in (0, 1) or text in _TRUE | _FALSE:
            return value in (1, 1.0) if isinstance(value, int | float) else text in _TRUE
        return None
    if isinstance(value, bool):
        value = int(value)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    if kind is int:
        return int(number) if number.is_integer() else None
    return number


@dataclass(frozen=True)
class MethodSpec:
    """One merge method, as data and two functions.

    base:     required, optional or ignored. base_is_operand: the base is one of the inputs that the
              recipe combines (linear, slerp), not the origin of deltas; slerp-like methods put it first.
    n_inputs: (least, most) number of operands other than a delta base; most None means no limit.
    on_few:   what happens to a tensor that too few inputs have, when that is allowed at all:
              error, copy_single (the only one present is copied) or copy_base.
    scope:    Scope, or a function of the resolved parameters and the tensor.
    cost:     of a tensor, for methods of scope MATRIX.
    joins:    whether tensors of scope MATRIX wait for each other: their recipes yield `stages.Joined`.
    presets:  name -> parameter values, selected by the parameter `preset`.
    """

    name: str
    title: str
    summary: str
    paper: str
    base: Literal["required", "optional", "ignored"]
    params: tuple[Param, ...]
    recipe: RecipeFunction
    oracle: Oracle
    base_is_operand: bool = False
    n_inputs: tuple[int, int | None] = (1, None)
    on_few: Literal["error", "copy_single", "copy_base"] = "error"
    scope: Scope | Callable[[Params, TensorContext], Scope] = Scope.ELEMENT
    cost: Callable[[Params, TensorContext], Cost] | None = None
    joins: Callable[[Params], bool] | None = None
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def scope_for(self, params: Params, context: TensorContext) -> Scope:
        return self.scope if isinstance(self.scope, Scope) else self.scope(params, context)

    def param(self, name: str) -> Param | None:
        return next((p for p in self.params if p.name == name), None)


_METHODS: dict[str, MethodSpec] = {}
_discovered = False


class _Declaration:
    """What `@method(...)` leaves in a method's file: attach the oracle with `@name.oracle`."""

    def __init__(self, recipe: RecipeFunction, fields: dict[str, Any]) -> None:
        self.recipe = recipe
        self._fields = fields
        self.spec: MethodSpec | None = None

    def oracle(self, function: Oracle) -> Oracle:
        """Register the float64 oracle and, with it, the method.

        It is called as oracle(base, experts, params, context) with float64 torch tensors: base or None,
        and a list of experts; params as in the recipe. It returns a float64 tensor of the same shape.
        """
        self.spec = MethodSpec(recipe=self.recipe, oracle=function, **self._fields)
        register(self.spec)
        return function


def method(name: str, **fields: Any) -> Callable[[RecipeFunction], _Declaration]:
    """Declare a method; see MethodSpec for the fields. The decorated generator function is its recipe."""
    fields["params"] = tuple(fields.get("params", ()))

    def declare(recipe: RecipeFunction) -> _Declaration:
        return _Declaration(recipe, {"name": name, **fields})

    return declare


def register(spec: MethodSpec) -> None:
    """Add a method; a name that is taken by another module's method is an error."""
    known = _METHODS.get(spec.name)
    if known is not None and known.recipe.__module__ != spec.recipe.__module__:
        raise RecipeError(
            f"method {spec.name!r} of {spec.recipe.__module__} is already registered by "
            f"{known.recipe.__module__}; choose another name"
        )
    _METHODS[spec.name] = spec


def unregister(name: str) -> None:
    """Remove a method (for tests and notebooks that register one on the fly)."""
    _METHODS.pop(name, None)


def methods() -> dict[str, MethodSpec]:
    """Return every method by name: the built-in ones and those of installed packages."""
    global _discovered
    if not _discovered:
        package = importlib.import_module("fastmerge.methods")
        for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
            importlib.import_module(f"fastmerge.methods.{module}")
        _discovered = True
        for entry in importlib.metadata.entry_points(group="fastmerge.methods"):
            entry.load()
    return dict(sorted(_METHODS.items()))


def get(name: str) -> MethodSpec:
    """Return one method, or raise RecipeError with the nearest known names."""
    known = methods()
    if name not in known:
        raise RecipeError(f"merge_method {name!r} is unknown{nearest(name, list(known))}")
    return known[name]


def nearest(word: str, known: Sequence[str]) -> str:
    """Return `; did you mean 'x'?` or, with nothing near, the list of known words."""
    import difflib

    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"
