"""A recipe for going on: the merge that is there already comes first, and what it knows goes with it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import yaml

from fastmerge.errors import RecipeError
from fastmerge.recipe.source import Source, read_source
from fastmerge.recipe.wording import located, show


def appended(
    recipe: str | os.PathLike[str] | Mapping[Any, Any], previous: str, known: Mapping[str, Any]
) -> Source:
    """Return a recipe with the folder of a merge as its first model.

    Args:
        known: what that merge's manifest says of it under `joined`: `merged_experts` and `merged_lambda`.
    Raises:
        RecipeError: the recipe lists no models, or says itself what the earlier merge was.
    """
    source = read_source(recipe)
    with located(source.label):
        document = source.document
        if not isinstance(document, dict) or not isinstance(document.get("models"), list):
            raise RecipeError("append needs a recipe with a list of models: those to be added")
        parameters = document.get("parameters") or {}
        state = {key: known[key] for key in ("merged_experts", "merged_lambda")}
        if isinstance(parameters, dict):
            for key in state:
                if key in parameters:
                    raise RecipeError(
                        f"parameters.{key} is what append looks up in {show(previous)}; leave it out"
                    )
            document = {**document, "parameters": {**parameters, **state}}
        document["models"] = [{"model": os.path.abspath(previous)}, *document["models"]]
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    return dataclasses.replace(source, text=text, document=document)
