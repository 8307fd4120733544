"""Settings: what a recipe writes for one parameter, and its value for one tensor.

A setting is a scalar, a list of scalars (a gradient over depth), one mapping {value, filter}, or a
list of such mappings (the first whose filter matches counts). All four are a tuple of `Case`s here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from fastmerge.errors import RecipeError
from fastmerge.recipe.wording import convert, show
from fastmerge.registry import REQUIRED, MethodSpec, Param

Scalar: TypeAlias = bool | int | float | str

#: Returns the relative depth t of the tensor at hand; called only where a gradient needs it.
Depth: TypeAlias = Callable[[], float]


@dataclass(frozen=True)
class Case:
    """What holds for the tensors that `filter` selects: one value, a gradient, or nothing."""

    values: tuple[Scalar, ...]
    place: str
    filter: str | None = None

    @property
    def matches_all(self) -> bool:
        return self.filter in (None, "*", "")

    def matches(self, name: str) -> bool:
        """Whether the filter is a substring of the name: no glob, `layers.1` is in `layers.10`."""
        return self.matches_all or (self.filter is not None and self.filter in name)


@dataclass(frozen=True)
class Setting:
    """What a recipe writes for one parameter in one place."""

    place: str
    cases: tuple[Case, ...]

    @property
    def is_constant(self) -> bool:
        """Whether every tensor gets the same value."""
        return bool(self.cases) and self.cases[0].matches_all and len(self.cases[0].values) == 1

    @property
    def is_empty(self) -> bool:
        """Whether no tensor gets a value, as with an empty list."""
        return not self.cases or (self.cases[0].matches_all and not self.cases[0].values)

    def converted(self, param: Param) -> Setting:
        """Return the setting with every value as the type of `param`, or raise RecipeError."""
        return replace(self, cases=tuple(_converted(case, param) for case in self.cases))

    def value(self, param: Param, name: str, depth: Depth) -> Any:
        """Return the value for tensor `name`, or None where the setting has none for it.

        None means that the next wider scope decides: no filter matched, or the list is empty. The
        setting must have been `converted`.
        """
        for case in self.cases:
            if case.matches(name):
                if not case.values:
                    return None
                if len(case.values) == 1:
                    return case.values[0]
                return _interpolate(case, param, name, depth())
        return None


def parse_setting(value: Any, place: str) -> Setting:
    """Return the setting that a YAML value spells; its values are of no particular type yet.

    Raises:
        RecipeError: it is none of the four forms; names `place`.
    """
    if isinstance(value, list) and any(isinstance(v, Mapping) for v in value):
        cases = tuple(_parse_condition(v, f"{place}[{i}]") for i, v in enumerate(value))
    elif isinstance(value, Mapping):
        cases = (_parse_condition(value, place),)
    else:
        cases = (Case(_parse_values(value, place), place),)
    return Setting(place, cases)


def preset_values(spec: MethodSpec, name: Any, place: str) -> Mapping[str, Any]:
    """Return the parameter values that preset `name` of a method stands for."""
    if not isinstance(name, str):
        raise RecipeError(f"{place} must be the name of a preset, got {show(name)}")
    if not spec.presets:
        raise RecipeError(f"{place} is {show(name)}, but method {spec.name} has no presets")
    if name not in spec.presets:
        known = ", ".join(sorted(spec.presets))
        raise RecipeError(f"{place} of method {spec.name} must be one of {known}, got {show(name)}")
    return spec.presets[name]


def fallback(spec: MethodSpec, param: Param, preset: Mapping[str, Any]) -> Any:
    """Return what holds where nothing is written: the preset's value, else the default."""
    if param.name in preset:
        place = f"preset of method {spec.name}: {param.name}"
        return convert(param, preset[param.name], place)
    if param.default is REQUIRED or param.default is None:
        return param.default
    return convert(param, param.default, f"default of {param.name} of method {spec.name}")


def _parse_condition(value: Any, place: str) -> Case:
    if not isinstance(value, Mapping):
        raise RecipeError(
            f"{place} must be a mapping {{value, filter}} like its neighbours, got {show(value)}"
        )
    if "value" not in value:
        raise RecipeError(f"{place} has no value; write {{value: ..., filter: ...}}")
    pattern = value.get("filter")
    if not isinstance(pattern, str | None):
        raise RecipeError(
            f"{place}.filter must be a text that tensor names hold, got {show(pattern)}"
        )
    place = f"{place}.value"
    return Case(_parse_values(value["value"], place), place, pattern)


def _parse_values(value: Any, place: str) -> tuple[Scalar, ...]:
    if isinstance(value, list):
        return tuple(_parse_scalar(v, f"{place}[{i}]") for i, v in enumerate(value))
    return (_parse_scalar(value, place),)


def _parse_scalar(value: Any, place: str) -> Scalar:
    if isinstance(value, bool | int | float | str):
        return value
    raise RecipeError(
        f"{place} must be a number, a text, true or false, or a list of those, got {show(value)}"
    )


def _converted(case: Case, param: Param) -> Case:
    if len(case.values) == 1:
        return replace(case, values=(convert(param, case.values[0], case.place),))
    values = [convert(param, v, f"{case.place}[{i}]") for i, v in enumerate(case.values)]
    return replace(case, values=tuple(values))


def _interpolate(case: Case, param: Param, name: str, t: float) -> Any:
    """Return the gradient at depth t in [0, 1].

    s = t (n - 1),  i = floor(s),  f = s - i:  (1 - f) v[i] + f v[min(i + 1, n - 1)]    for numbers
    v[floor(s)]                                                                         otherwise
    """
    values = case.values
    position = t * (len(values) - 1)
    i = int(position)
    if param.kind not in (int, float):
        return values[i]
    fraction = position - i
    low: Any = values[i]
    high: Any = values[min(i + 1, len(values) - 1)]
    # Bounds hold between two valid numbers, but a whole number may become a fraction.
    return convert(
        param,
        (1 - fraction) * low + fraction * high,
        f"{case.place}, interpolated for {name!r},",
    )
