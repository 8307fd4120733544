"""Recipes: mergekit's YAML, and keywords, to checked parameters of every tensor."""

from fastmerge.recipe.appending import appended
from fastmerge.recipe.inputs import ModelInput
from fastmerge.recipe.keywords import keyword_params
from fastmerge.recipe.layers import LayerPositions
from fastmerge.recipe.parameters import Setting, parse_setting
from fastmerge.recipe.recipe import Recipe, load_recipe
from fastmerge.recipe.references import ModelRef, parse_reference, resolve_adapter, resolve_path
from fastmerge.recipe.source import Source

__all__ = [
    "LayerPositions",
    "ModelInput",
    "ModelRef",
    "Recipe",
    "Setting",
    "Source",
    "appended",
    "keyword_params",
    "load_recipe",
    "parse_reference",
    "parse_setting",
    "resolve_adapter",
    "resolve_path",
]
