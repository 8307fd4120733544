"""Toy methods and short ways to load a recipe, for the tests of fastmerge.recipe."""

from __future__ import annotations

import pytest

from fastmerge import registry
from fastmerge.errors import RecipeError
from fastmerge.recipe import (
    load_recipe,
)
from fastmerge.registry import REQUIRED, MethodSpec, Param


def _recipe(params, context):
    raise AssertionError("these tests resolve parameters; no recipe is run")


def toy(name, params, **fields):
    return MethodSpec(
        name=name,
        title=name,
        summary="",
        paper="",
        params=tuple(params),
        recipe=_recipe,
        oracle=_recipe,
        **fields,
    )


TIES = toy(
    "toy_ties",
    [
        Param("weight", REQUIRED, scope="expert"),
        Param("density", 1.0, scope="expert", low=0.0, high=1.0),
        Param("lambda", 1),
        Param("normalize", True, kind=bool),
        Param("steps", 3, kind=int, low=1),
        Param("mode", "sum", kind=str, choices=("sum", "mean", "max")),
        Param("scale", None),
    ],
    base="required",
    presets={"paper": {"density": 0.2, "normalize": False, "lambda": 0.4}, "other": {"weight": 1}},
)
LINEAR = toy(
    "toy_linear",
    [Param("weight", REQUIRED, scope="input"), Param("normalize", True, kind=bool)],
    base="ignored",
    base_is_operand=True,
)
SLERP = toy(
    "toy_slerp",
    [
        Param("t", REQUIRED, low=0, high=1),
        Param("own", 0.0, scope="expert"),
        Param("each", 0.0, scope="input"),
    ],
    base="required",
    base_is_operand=True,
    n_inputs=(2, 2),
)
NUSLERP = toy(
    "toy_nuslerp", [Param("weight", REQUIRED, scope="expert")], base="optional", n_inputs=(2, 3)
)
SINGLE = toy("toy_single", [], base="ignored", base_is_operand=True, n_inputs=(1, 1))
TOYS = (TIES, LINEAR, SLERP, NUSLERP, SINGLE)


@pytest.fixture(autouse=True, scope="module")
def toy_methods():
    """Know the toy methods and no other, so that messages which list methods are stable."""
    before, known = registry._discovered, dict(registry._METHODS)
    registry._discovered = True
    registry._METHODS.clear()
    for spec in TOYS:
        registry.register(spec)
    yield
    registry._discovered = before
    registry._METHODS.clear()
    registry._METHODS.update(known)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def no_depth():
    raise AssertionError("the depth was asked for, but no gradient needs it")


def ties(**fields):
    document = {
        "merge_method": "toy_ties",
        "base_model": "base",
        "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {"weight": 0.5},
    }
    return {k: v for k, v in (document | fields).items() if v is not None}


def params(document, name="model.layers.0.w", t=0.0) -> registry.Params:
    return load_recipe(document, strict=True).params_for(name, lambda: t)


def error(document, **options) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(document, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


A = {"model": "a"}


def llama(n, prefix="model.layers"):
    return [f"{prefix}.{j}.{w}.weight" for j in range(n) for w in ("mlp.up", "attn.q")]


LOOSE = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
