"""The shape of a recipe: its keys and their types, and what an unknown key probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from fastmerge.errors import RecipeError
from fastmerge.recipe.wording import show
from fastmerge.registry import MethodSpec, nearest

#: The parameter, of every method, that selects one of its presets.
PRESET = "preset"

_CONDITION_KEYS = ("filter", "value")
_REFERENCE_KEYS = ("lora", "model", "override_architecture")
_PATH_KEYS = ("path", "revision")


class _Shape(BaseModel):
    # Unknown keys are found by `unknown_keys`, which knows the method's parameters.
    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class ModelEntry(_Shape):
    """One entry of `models`."""

    model: Any
    parameters: dict[Any, Any] | None = None


class RecipeDocument(_Shape):
    """The top level of a recipe, as mergekit 0.1.5 spells it, and `name`."""

    merge_method: str
    models: list[ModelEntry] | None = None
    base_model: Any = None
    parameters: dict[Any, Any] | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    name: str | None = None
    tokenizer_source: Any = None
    tokenizer: Any = None
    chat_template: Any = None
    slices: Any = None
    modules: Any = None


def read_document(document: Any) -> RecipeDocument:
    """Check types and required keys, and refuse the sections that are not supported.

    Raises:
        RecipeError: names the first place that is wrong.
    """
    if not isinstance(document, Mapping):
        raise RecipeError(f"recipe must be a mapping of keys to values, got {show(document)}")
    known = {k: document[k] for k in RecipeDocument.model_fields if k in document}
    # Said before anything else: such recipes are right, and other complaints would mislead.
    for key in ("slices", "modules"):
        if known.get(key):
            raise RecipeError(f"{key} is not supported yet; merge whole models with models")
    if known.get("tokenizer") is not None:
        raise RecipeError(
            "tokenizer is not supported yet; remove it to keep the tokenizer of the base model"
        )
    if known.get("chat_template") is not None:
        raise RecipeError("chat_template is not supported yet; remove it to keep the model's own")
    try:
        checked = RecipeDocument.model_validate(known)
    except ValidationError as error:
        raise RecipeError(_first_line(error)) from None
    if not checked.models:
        raise RecipeError("recipe has no models; give models: a list of {model, parameters}")
    return checked


_EXPECTED = {
    "string_type": "a text",
    "list_type": "a list",
    "dict_type": "a mapping of names to values",
    "model_type": "a mapping {model, parameters}",
    "model_attributes_type": "a mapping {model, parameters}",
}


def _first_line(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    place = ""
    for part in first["loc"]:
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else part
    if first["type"] == "missing":
        owner, _, key = place.rpartition(".")
        return f"{owner or 'recipe'} has no {key}"
    if first["type"] in _EXPECTED:
        return f"{place} must be {_EXPECTED[first['type']]}, got {show(first['input'])}"
    return f"{place}: {first['msg'].lower()}"


def unknown_keys(document: Mapping[Any, Any], spec: MethodSpec) -> list[str]:
    """Return one line per key that means nothing where it stands, of a document that was read."""
    names = [p.name for p in spec.params]
    per_input = [p.name for p in spec.params if p.scope != "shared"]
    top_level = list(RecipeDocument.model_fields)
    lines = []
    for key in document:
        if key not in top_level:
            lines.append(_top_level_line(key, top_level, [*names, PRESET]))
    lines += _reference_lines(document.get("base_model"), "base_model")
    lines += _setting_lines(document.get("parameters"), "parameters", spec, [*names, PRESET])
    for i, entry in enumerate(document["models"]):
        place = f"models[{i}]"
        for key in entry:
            if key in names:
                home = f"{place}.parameters" if key in per_input else "parameters"
                lines.append(f"unknown key {show(key)} in {place}; it belongs under {home}")
            elif key not in ModelEntry.model_fields:
                known = list(ModelEntry.model_fields)
                lines.append(f"unknown key {show(key)} in {place}{_nearest(key, known)}")
        lines += _reference_lines(entry["model"], f"{place}.model")
        lines += _setting_lines(entry.get("parameters"), f"{place}.parameters", spec, per_input)
    return lines


def _nearest(key: Any, known: Sequence[str]) -> str:
    return nearest(key if isinstance(key, str) else show(key), known)


def _top_level_line(key: Any, top_level: Sequence[str], parameters: Sequence[str]) -> str:
    line = f"unknown key {show(key)} at top level"
    if key in parameters:
        return f"{line}; it belongs under parameters"
    word = key if isinstance(key, str) else show(key)
    if not difflib.get_close_matches(word, top_level, n=1, cutoff=0.6):
        near = difflib.get_close_matches(word, parameters, n=1, cutoff=0.6)
        if near:
            return f"{line}; did you mean {near[0]!r} under parameters?"
    return line + nearest(word, top_level)


def _setting_lines(
    settings: Mapping[Any, Any] | None, place: str, spec: MethodSpec, known: Sequence[str]
) -> list[str]:
    lines = []
    for key, value in (settings or {}).items():
        of_method = f"in {place} of method {spec.name}"
        if key not in known:
            if key == PRESET or spec.param(key) is not None:
                lines.append(
                    f"{show(key)} {of_method} is one value for all models; "
                    "it belongs under parameters at top level"
                )
            elif key in RecipeDocument.model_fields:
                lines.append(f"unknown key {show(key)} {of_method}; it belongs at top level")
            else:
                lines.append(f"unknown key {show(key)} {of_method}{_nearest(key, known)}")
            continue
        conditions = value if isinstance(value, list) else [value]
        for i, condition in enumerate(conditions):
            if isinstance(condition, Mapping):
                at = f"{place}.{key}[{i}]" if isinstance(value, list) else f"{place}.{key}"
                lines += _mapping_lines(condition, at, _CONDITION_KEYS)
    return lines


def _reference_lines(reference: Any, place: str) -> list[str]:
    if not isinstance(reference, Mapping):
        return []
    lines = _mapping_lines(reference, place, _REFERENCE_KEYS)
    for key in ("model", "lora"):
        if isinstance(reference.get(key), Mapping):
            lines += _mapping_lines(reference[key], f"{place}.{key}", _PATH_KEYS)
    return lines


def _mapping_lines(mapping: Mapping[Any, Any], place: str, known: Sequence[str]) -> list[str]:
    return [
        f"unknown key {show(key)} in {place}{_nearest(key, known)}"
        for key in mapping
        if key not in known
    ]
