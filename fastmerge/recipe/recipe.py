"""A recipe: a merge as YAML describes it (mergekit 0.1.5's schema), checked against its method."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fastmerge import registry
from fastmerge.dtypes import DType, parse_dtype
from fastmerge.errors import RecipeError
from fastmerge.recipe.binding import Binding, Owner, bind
from fastmerge.recipe.inputs import ModelInput, check_inputs, operand_order
from fastmerge.recipe.parameters import Setting, parse_setting, preset_values
from fastmerge.recipe.references import (
    ModelRef,
    parse_reference,
    resolve_adapter,
    resolve_path,
)
from fastmerge.recipe.schema import PRESET, RecipeDocument, read_document, unknown_keys
from fastmerge.recipe.source import Source, read_source
from fastmerge.recipe.wording import located, show
from fastmerge.registry import MethodSpec, Params


@dataclass(frozen=True, eq=False)
class Recipe:
    """One checked merge.

    inputs:     the models as written; a base that is not among them comes last.
    base:       index of the base among the inputs, None without one.
    dtype:      the type that inputs are cast to when read; out_dtype: outputs, when written.
    parameters: the settings for all models, by name; `preset` is not among them.
    text:       the YAML as it was read, or written out from a mapping.
    folder:     what relative model paths are relative to, after the current directory.
    source:     the recipe's file as the caller spelt it, for messages; else empty.
    found:      the inputs' folders, absolute, where they were looked for already;
    adapters:   those of their adapters, as many.

    It can be pickled: a process that merges a share of it needs no file.
    """

    method: str
    inputs: tuple[ModelInput, ...]
    base: int | None
    dtype: DType | None
    out_dtype: DType | None
    parameters: Mapping[str, Setting]
    text: str
    folder: Path
    warnings: tuple[str, ...] = ()
    preset: str | None = None
    name: str | None = None
    source: str = ""
    found: tuple[Path, ...] = ()
    adapters: tuple[Path | None, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        # Bound again where it arrives: the methods' functions do not travel.
        return {key: value for key, value in vars(self).items() if key != "_binding"}

    def spec(self) -> MethodSpec:
        return registry.get(self.method)

    def operands(self) -> list[int]:
        """Return the indices of the inputs that the method combines, in the order it sees them."""
        return operand_order(self.spec(), len(self.inputs), self.base)

    def path(self, index: int) -> Path:
        """Return the folder of one input, or raise RecipeError with what is wrong with it."""
        if self.found:
            return self.found[index]
        model = self.inputs[index]
        with located(self.source, model.place):
            return resolve_path(model.ref, self.folder)

    def adapter(self, index: int) -> Path | None:
        """Return the folder of one input's adapter, None without one, or raise RecipeError."""
        if self.adapters:
            return self.adapters[index]
        model = self.inputs[index]
        with located(self.source, model.place):
            return resolve_adapter(model.ref, self.folder)

    def params_for(self, output_name: str, t: Callable[[], float]) -> Params:
        """Return the method's parameters for one output tensor.

        `t` returns the tensor's relative depth, in [0, 1]; it is called only where a gradient
        counts. The object is shared by all tensors where no filter and no gradient does: do not
        change it.

        Raises:
            RecipeError: no filter gives a required parameter a value for this tensor, or an
                interpolated value is not one that the parameter takes.
        """
        with located(self.source):
            return self._binding.params(output_name, t)

    @cached_property
    def _binding(self) -> Binding:
        spec = self.spec()
        operands = self.operands()
        return bind(
            spec,
            self.parameters,
            [(_owner(self.inputs[i]), self.inputs[i].parameters) for i in operands],
            operands.index(self.base) if self.base in operands else None,
            {} if self.preset is None else preset_values(spec, self.preset, "parameters.preset"),
        )


def load_recipe(
    source: str | os.PathLike[str] | Mapping[Any, Any] | Source, *, strict: bool = False
) -> Recipe:
    """Read and check a recipe: a YAML file's path, a YAML text (with a newline), or a mapping.

    Keys that mean nothing where they stand give warnings, or with `strict` an error. Model folders
    are not looked at: see `Recipe.path`.

    Raises:
        RecipeError: one line that names the file and the place in it.
    """
    read = source if isinstance(source, Source) else read_source(source)
    with located(read.label):
        recipe = _build(read)
        if strict and recipe.warnings:
            more = len(recipe.warnings) - 1
            raise RecipeError(recipe.warnings[0] + (f" (and {more} more)" if more else ""))
    return recipe


def _build(source: Source) -> Recipe:
    document = read_document(source.document)
    spec = registry.get(document.merge_method)
    warnings = (*source.warnings, *unknown_keys(source.document, spec))
    inputs, base = _inputs(document, spec, source.folder)
    _check_tokenizer_source(document, None if base is None else inputs[base].ref, source.folder)
    parameters = document.parameters or {}
    # A method's own parameter of that name would come first.
    has_preset = PRESET in parameters and spec.param(PRESET) is None
    recipe = Recipe(
        method=spec.name,
        inputs=inputs,
        base=base,
        dtype=_dtype(document.dtype, "dtype"),
        out_dtype=_dtype(document.out_dtype, "out_dtype"),
        parameters=_settings(parameters, "parameters", [p.name for p in spec.params]),
        text=source.text,
        folder=source.folder,
        warnings=warnings,
        preset=parameters[PRESET] if has_preset else None,
        name=document.name,
        source=source.label,
    )
    if has_preset:
        preset_values(spec, parameters[PRESET], "parameters.preset")
    operands = recipe.operands()
    check_inputs(spec, len(operands), base is not None, [str(inputs[i].ref) for i in operands])
    # Bind now, so that values that are wrong for every tensor are refused before any work.
    _ = recipe._binding
    return recipe


def _inputs(
    document: RecipeDocument, spec: MethodSpec, folder: Path
) -> tuple[tuple[ModelInput, ...], int | None]:
    """Return the inputs, and which of them is the base."""
    per_input = [p.name for p in spec.params if p.scope != "shared"]
    inputs: list[ModelInput] = []
    places: dict[tuple[str | None, ...], int] = {}
    for i, entry in enumerate(document.models or ()):
        place = f"models[{i}]"
        ref = parse_reference(entry.model, f"{place}.model", folder)
        if ref.key in places:
            raise RecipeError(
                f"{place} is the same model as models[{places[ref.key]}] ({ref}); "
                "list each model once"
            )
        places[ref.key] = i
        settings = _settings(entry.parameters or {}, f"{place}.parameters", per_input)
        inputs.append(ModelInput(ref, settings, place))
    if document.base_model is None:
        return tuple(inputs), None
    ref = parse_reference(document.base_model, "base_model", folder)
    if ref.key not in places:
        places[ref.key] = len(inputs)
        inputs.append(ModelInput(ref, {}, "base_model"))
    return tuple(inputs), places[ref.key]


def _settings(parameters: Mapping[Any, Any], place: str, names: list[str]) -> dict[str, Setting]:
    return {n: parse_setting(parameters[n], f"{place}.{n}") for n in names if n in parameters}


def _check_tokenizer_source(document: RecipeDocument, base: ModelRef | None, folder: Path) -> None:
    value = document.tokenizer_source
    if value is None or value == "base":
        return
    if base is not None and parse_reference(value, "tokenizer_source", folder).key == base.key:
        return
    raise RecipeError(
        f"tokenizer_source {show(value)} is not supported yet; remove it, or set it to base, "
        "to keep the tokenizer of the base model"
    )


def _dtype(text: str | None, place: str) -> DType | None:
    return None if text is None else parse_dtype(text, place)


def _owner(model: ModelInput) -> Owner:
    if model.place == "base_model":
        return Owner(str(model.ref), model.place, "parameters, or list the base in models")
    return Owner(str(model.ref), model.place, f"{model.place}.parameters or in parameters")
