"""Parameters given as Python keywords: the same checks as a recipe's, without names and depths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastmerge.errors import RecipeError
from fastmerge.recipe.binding import attribute_name
from fastmerge.recipe.inputs import check_inputs
from fastmerge.recipe.parameters import fallback, preset_values
from fastmerge.recipe.schema import PRESET
from fastmerge.recipe.wording import convert, show
from fastmerge.registry import REQUIRED, MethodSpec, Param, Params, nearest


def keyword_params(
    spec: MethodSpec, n_operands: int, has_base: bool, kwargs: Mapping[str, Any]
) -> Params:
    """Return the parameters that keywords give to a merge of tensors in memory.

    A scalar holds for all models; a sequence has one value per model: per expert for `expert`
    parameters, per operand for `input` ones. None is as good as not given. `lambda_` may also be
    spelt `lambda`.

    Args:
        n_operands: tensors that the method combines; a base counts where `spec.base_is_operand`.
        has_base: whether a base was given.
    Raises:
        RecipeError: unknown keyword, wrong type, out of bounds, wrong number of values, required
            one missing, or the method takes another number of models.
    """
    check_inputs(spec, n_operands, has_base)
    given = _by_parameter(spec, kwargs)
    preset = preset_values(spec, given.pop(PRESET), PRESET) if PRESET in given else {}
    n_experts = n_operands - (1 if spec.base_is_operand and has_base else 0)
    values: dict[str, Any] = {}
    for param in spec.params:
        n = {"shared": None, "expert": n_experts, "input": n_operands}[param.scope]
        attribute = attribute_name(param.name)
        if param.name in given:
            values[attribute] = _values(param, given[param.name], attribute, n)
            continue
        below = fallback(spec, param, preset)
        if below is REQUIRED:
            raise RecipeError(f"method {spec.name} requires {attribute}; pass {attribute}=...")
        values[attribute] = below if n is None else [below] * n
    return Params(**values)


def _by_parameter(spec: MethodSpec, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    names = {p.name: p.name for p in spec.params} | {
        attribute_name(p.name): p.name for p in spec.params
    }
    given: dict[str, Any] = {}
    for key, value in kwargs.items():
        if key != PRESET and key not in names:
            known = [*(attribute_name(p.name) for p in spec.params), PRESET]
            raise RecipeError(f"unknown keyword {key!r} of method {spec.name}{nearest(key, known)}")
        name = names.get(key, key)
        if value is None:
            continue
        if name in given:
            raise RecipeError(f"{name} is given twice, as {name!r} and {attribute_name(name)!r}")
        given[name] = value
    return given


def _values(param: Param, value: Any, place: str, n: int | None) -> Any:
    if hasattr(value, "tolist"):  # numpy and torch, scalars included
        value = value.tolist()
    if not isinstance(value, list | tuple):
        converted = convert(param, value, place)
        return converted if n is None else [converted] * n
    if n is None:
        raise RecipeError(f"{place} is one value for all models, got {show(value)}")
    if len(value) != n:
        raise RecipeError(f"{place} must have {n} values, one per model, got {len(value)}")
    return [convert(param, v, f"{place}[{i}]") for i, v in enumerate(value)]
