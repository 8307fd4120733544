"""From settings in several scopes to one tensor's parameters: the narrowest with a value wins."""

from __future__ import annotations

import keyword
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastmerge.errors import RecipeError
from fastmerge.recipe.parameters import Depth, Setting, fallback
from fastmerge.registry import REQUIRED, MethodSpec, Param, Params


@dataclass(frozen=True)
class Owner:
    """Whose value it is, for errors: an input and its place, and where a value could be written."""

    name: str
    place: str
    remedy: str


@dataclass(frozen=True)
class Ladder:
    """One parameter's settings for one owner, narrowest scope first, and what holds below them."""

    param: Param
    settings: tuple[Setting, ...]
    fallback: Any
    owner: Owner | None

    @property
    def is_constant(self) -> bool:
        return not self.settings or self.settings[0].is_constant

    def value(self, spec: MethodSpec, name: str, depth: Depth) -> Any:
        for setting in self.settings:
            value = setting.value(self.param, name, depth)
            if value is not None:
                return value
        if self.fallback is REQUIRED:
            raise RecipeError(self._missing(spec, name))
        return self.fallback

    def _missing(self, spec: MethodSpec, name: str) -> str:
        parameter = self.param.name
        # With settings, it is their filters that leave this tensor out.
        what = f"{parameter} for {name!r}" if self.settings else parameter
        if self.owner is None:
            return f"method {spec.name} requires {what}; set parameters.{parameter}"
        return (
            f"{self.owner.place} ({self.owner.name}) has no {what}, which method {spec.name} "
            f"requires; set it in {self.owner.remedy}"
        )


class Binding:
    """A method's parameters bound to a recipe's settings."""

    def __init__(self, spec: MethodSpec, ladders: Mapping[str, Ladder | list[Ladder]]) -> None:
        self._spec = spec
        self._ladders = ladders
        rungs = [
            rung
            for entry in ladders.values()
            for rung in (entry if isinstance(entry, list) else [entry])
        ]
        # A required value that is written nowhere is missing for every tensor: say so now.
        for rung in rungs:
            if not rung.settings:
                rung.value(spec, "", float)
        self._constant: Params | None = None
        if all(rung.is_constant for rung in rungs):
            self._constant = self._resolve("", float)

    def params(self, name: str, depth: Depth) -> Params:
        """Return the parameters of one output tensor: one object where names do not matter."""
        return self._resolve(name, depth) if self._constant is None else self._constant

    def _resolve(self, name: str, depth: Depth) -> Params:
        spec = self._spec
        return Params(
            **{
                attribute: [rung.value(spec, name, depth) for rung in entry]
                if isinstance(entry, list)
                else entry.value(spec, name, depth)
                for attribute, entry in self._ladders.items()
            }
        )


def bind(
    spec: MethodSpec,
    shared: Mapping[str, Setting],
    operands: Sequence[tuple[Owner, Mapping[str, Setting]]],
    base_operand: int | None,
    preset: Mapping[str, Any],
) -> Binding:
    """Bind every parameter of a method.

    shared holds the settings for all models, operands those of each operand; base_operand is the
    position of the base among the operands, None where it is not one of them.

    Raises:
        RecipeError: a value has the wrong type or is out of bounds, or a required one is written
            nowhere.
    """
    ladders: dict[str, Ladder | list[Ladder]] = {}
    for param in spec.params:
        below = fallback(spec, param, preset)
        wide = [shared[param.name].converted(param)] if param.name in shared else []
        if param.scope == "shared":
            entry: Ladder | list[Ladder] = Ladder(param, _useful(wide), below, None)
        else:
            entry = []
            for position, (owner, own) in enumerate(operands):
                if param.scope == "expert" and position == base_operand:
                    continue
                narrow = [own[param.name].converted(param)] if param.name in own else []
                entry.append(Ladder(param, _useful([*narrow, *wide]), below, owner))
        ladders[attribute_name(param.name)] = entry
    return Binding(spec, ladders)


def attribute_name(name: str) -> str:
    """Return the spelling of a parameter in Python: `lambda` is `lambda_`."""
    return f"{name}_" if keyword.iskeyword(name) else name


def _useful(settings: Sequence[Setting]) -> tuple[Setting, ...]:
    return tuple(s for s in settings if not s.is_empty)
