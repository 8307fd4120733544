"""Recipes on toy methods: schema, references, parameters, layer positions and keywords."""

from __future__ import annotations

import contextlib
import datetime
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastmerge import registry
from fastmerge.dtypes import DType
from fastmerge.errors import RecipeError
from fastmerge.recipe import (
    LayerPositions,
    ModelRef,
    Recipe,
    keyword_params,
    load_recipe,
    parse_reference,
    resolve_path,
)
from fastmerge.recipe.schema import RecipeDocument
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


# --- sources -------------------------------------------------------------------------------------


def test_file_text_and_mapping_agree(tmp_path):
    text = yaml.safe_dump(ties(name="mine", dtype="bfloat16", out_dtype="torch.float16"))
    (tmp_path / "sub").mkdir()
    file = tmp_path / "sub" / "config.yaml"
    file.write_text(text)
    for source in (file, str(file), "sub/config.yaml", text, yaml.safe_load(text)):
        recipe = load_recipe(source)
        assert recipe.method == "toy_ties"
        assert recipe.spec() is TIES
        assert [str(i.ref) for i in recipe.inputs] == ["a", "b", "base"]
        assert [i.place for i in recipe.inputs] == ["models[0]", "models[1]", "base_model"]
        assert recipe.base == 2
        assert (recipe.dtype, recipe.out_dtype) == (DType.BF16, DType.F16)
        assert recipe.name == "mine"
        assert recipe.warnings == ()
        assert yaml.safe_load(recipe.text) == yaml.safe_load(text)
    assert load_recipe(file).folder == tmp_path / "sub"
    assert load_recipe("sub/config.yaml").folder == tmp_path / "sub"
    assert load_recipe(text).folder == tmp_path


def test_text_is_kept_verbatim(tmp_path):
    text = "# a comment\n" + yaml.safe_dump(ties()) + "\n\n"
    assert load_recipe(text).text == text
    (tmp_path / "c.yaml").write_bytes(text.replace("\n", "\r\n").encode())
    assert load_recipe("c.yaml").text == text.replace("\n", "\r\n")


def test_mapping_may_hold_paths_and_numpy_scalars():
    recipe = load_recipe(
        ties(models=({"model": Path("a"), "parameters": {"weight": np.float32(0.5)}},))
    )
    assert yaml.safe_load(recipe.text)["models"] == [{"model": "a", "parameters": {"weight": 0.5}}]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent.yaml", "recipe 'absent.yaml' was not found"),
        (".", "recipe '.' is a folder; give the path of a YAML file"),
        ("a\0b", "was not found"),
        ("x" * 5000, "was not found"),
        (3, "recipe must be a path, a YAML text or a mapping, got 3"),
        (None, "got null"),
        ("\n", "recipe is empty"),
        ("a: 1\n---\nb: 2\n", "holds 2 merge documents; give each a file of its own"),
        ("- 1\n", "recipe must be a mapping of keys to values, got [1]"),
        ("word\n", "recipe must be a mapping of keys to values, got 'word'"),
        ("models:\n  a: [1\n", "line 3, column 1: not valid YAML: expected ',' or ']'"),
        ("a: b: c\n", "line 1, column 5: not valid YAML: mapping values are not allowed here"),
        ("a: !!python/object:os.system x\n", "not valid YAML: could not determine a constructor"),
        ("a: 2020-13-45\n", "not valid YAML: month must be in 1..12"),
        ("a: " + "1" * 5000 + "\n", "not valid YAML"),
        ("a: !!bool 7\n", "not valid YAML"),
        ("a: \x01\n", "not valid YAML"),
        ("[" * 100_000 + "\n", "nested too deeply"),
        ({"a": {1}}, "a must be a text, number"),
        ({(1, 2): 1}, "keys of recipe must be texts, got (1, 2)"),
    ],
)
def test_unreadable_sources(source, message):
    assert message in error(source)


def test_unreadable_file_names_file_and_line(tmp_path):
    (tmp_path / "c.yaml").write_text("a: b: c\n")
    assert error("c.yaml").startswith("c.yaml: line 1, column 5: not valid YAML")
    (tmp_path / "d.yaml").write_bytes(b"a: \xff\xfe\n")
    assert "recipe 'd.yaml' is not UTF-8 text (byte 3)" in error("d.yaml")


def test_mapping_that_holds_itself():
    document = ties()
    document["parameters"] = document
    assert "nested too deeply" in error(document)
    assert "nested too deeply" not in error("models: &a [*a]\nmerge_method: toy_ties\n")


def test_trailing_document_marker_is_no_second_document():
    assert load_recipe("---\n" + yaml.safe_dump(ties()) + "---\n").method == "toy_ties"


def test_repeated_key():
    text = yaml.safe_dump(ties()) + "dtype: float16\ndtype: float32\n"
    recipe = load_recipe(text)
    assert recipe.dtype is DType.F32
    assert recipe.warnings == (
        "key 'dtype' is written twice in the same mapping (line 9); the last one counts",
    )
    assert "is written twice" in error(text, strict=True)


def test_merge_keys_repeat_nothing():
    text = (
        "merge_method: toy_ties\nbase_model: base\nmodels:\n"
        "- model: a\n  parameters: &p {weight: 1, density: 0.5}\n"
        "- model: b\n  parameters: {<<: *p, weight: 2}\n"
    )
    got = params(text)
    assert (got.weight, got.density) == ([1.0, 2.0], [0.5, 0.5])


# --- schema --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"merge_method": None}, "recipe has no merge_method"),
        ({"merge_method": 5}, "merge_method must be a text, got 5"),
        ({"merge_method": "toy_tise"}, "'toy_tise' is unknown; did you mean 'toy_ties'?"),
        ({"models": None}, "recipe has no models"),
        ({"models": []}, "recipe has no models"),
        ({"models": "a"}, "models must be a list, got 'a'"),
        ({"models": ["a"]}, "models[0] must be a mapping {model, parameters}, got 'a'"),
        ({"models": [{"parameters": {}}]}, "models[0] has no model"),
        ({"models": [{"model": None}]}, "models[0].model must be a text"),
        ({"models": [{"model": ""}]}, "models[0].model must be the path of a model, got ''"),
        (
            {"models": [{"model": "a", "parameters": [1]}]},
            "models[0].parameters must be a mapping of names to values, got [1]",
        ),
        ({"parameters": 1}, "parameters must be a mapping of names to values, got 1"),
        ({"base_model": 1}, "base_model must be a text"),
        ({"dtype": "fp16"}, "dtype must be one of float16, bfloat16, float32, float64, got 'fp16'"),
        ({"out_dtype": 16}, "out_dtype must be a text, got 16"),
        ({"name": 1}, "name must be a text, got 1"),
        ({"slices": [{"sources": []}]}, "slices is not supported yet"),
        ({"modules": {"text": {}}}, "modules is not supported yet"),
        ({"tokenizer": {"source": "base"}}, "tokenizer is not supported yet"),
        ({"tokenizer": {}}, "tokenizer is not supported yet"),
        ({"chat_template": "auto"}, "chat_template is not supported yet"),
        ({"tokenizer_source": "union"}, "tokenizer_source 'union' is not supported yet"),
        ({"tokenizer_source": "a"}, "tokenizer_source 'a' is not supported yet"),
    ],
)
def test_wrong_documents(fields, message, tmp_path):
    document = ties(**fields)
    assert message in error(document)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(document))
    assert error("c.yaml") == f"c.yaml: {error(document)}"


def test_slices_without_models_are_refused_for_slices():
    assert "slices is not supported yet" in error(ties(models=None, slices=[{}], merge_method=None))


def test_absent_sections_may_be_spelt_out():
    text = yaml.safe_dump(ties()) + (
        "slices: []\nmodules:\ntokenizer:\nchat_template:\ntokenizer_source: ./base\nname:\n"
    )
    assert load_recipe(text, strict=True).base == 2
    load_recipe(ties(tokenizer_source="base"), strict=True)
    load_recipe(ties(tokenizer_source={"model": {"path": "base"}}), strict=True)


A = {"model": "a"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"merge_metod": "x"},
            "unknown key 'merge_metod' at top level; did you mean 'merge_method'",
        ),
        ({"weight": 1}, "unknown key 'weight' at top level; it belongs under parameters"),
        ({"normalize": True}, "unknown key 'normalize' at top level; it belongs under parameters"),
        ({"preset": "paper"}, "unknown key 'preset' at top level; it belongs under parameters"),
        (
            {"normalise": True},
            "unknown key 'normalise' at top level; did you mean 'normalize' under parameters?",
        ),
        ({7: 1}, "unknown key 7 at top level; known: base_model"),
        ({"zzz": 1}, "unknown key 'zzz' at top level; known: base_model"),
        (
            {"models": [A, {"model": "b", "parameters": {"wieght": 1}}]},
            "unknown key 'wieght' in models[1].parameters of method toy_ties; "
            "did you mean 'weight'?",
        ),
        (
            {"models": [A, {"model": "b", "weight": 1}]},
            "unknown key 'weight' in models[1]; it belongs under models[1].parameters",
        ),
        (
            {"models": [A, {"model": "b", "normalize": True}]},
            "unknown key 'normalize' in models[1]; it belongs under parameters",
        ),
        (
            {"models": [A, {"model": "b", "paramters": {}}]},
            "unknown key 'paramters' in models[1]; did you mean 'parameters'?",
        ),
        (
            {"models": [{"model": "a", "parameters": {"normalize": True}}]},
            "'normalize' in models[0].parameters of method toy_ties is one value for all models; "
            "it belongs under parameters at top level",
        ),
        (
            {"models": [{"model": "a", "parameters": {"preset": "paper"}}]},
            "'preset' in models[0].parameters of method toy_ties is one value for all models",
        ),
        (
            {"parameters": {"weight": 1, "dtype": "float16"}},
            "unknown key 'dtype' in parameters of method toy_ties; it belongs at top level",
        ),
        (
            {"parameters": {"weight": 1, True: 1}},
            "unknown key true in parameters of method toy_ties; known: density",
        ),
        (
            {"parameters": {"weight": {"value": 1, "fliter": "x"}}},
            "unknown key 'fliter' in parameters.weight; did you mean 'filter'?",
        ),
        (
            {"parameters": {"weight": [{"value": 1}, {"value": 1, "name": "x"}]}},
            "unknown key 'name' in parameters.weight[1]; known: filter, value",
        ),
        (
            {"base_model": {"model": {"path": "base", "revison": "x"}}},
            "unknown key 'revison' in base_model.model; did you mean 'revision'?",
        ),
        (
            {"models": [{"model": {"model": "a", "override_arch": "X"}}]},
            "unknown key 'override_arch' in models[0].model; did you mean 'override_architecture'?",
        ),
    ],
)
def test_unknown_keys(fields, message):
    document = ties() | fields
    (warning,) = load_recipe(document).warnings
    assert warning.startswith(message)
    assert error(document, strict=True) == warning


def test_strict_counts_the_other_unknown_keys():
    assert error(ties(zzz=1, normalize=2), strict=True).endswith("(and 1 more)")


# --- references ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("org/name", ModelRef("org/name")),
        ("a@main", ModelRef("a", "main")),
        ("a+l", ModelRef("a", lora=ModelRef("l"))),
        ("a@r+l@s", ModelRef("a", "r", ModelRef("l", "s"))),
        ("a+l@s", ModelRef("a", None, ModelRef("l", "s"))),
        ({"model": "a@r"}, ModelRef("a", "r")),
        ({"model": {"path": "a+b@c"}}, ModelRef("a+b@c")),
        (
            {
                "model": {"path": "a", "revision": "r"},
                "lora": {"path": "l", "revision": None},
                "override_architecture": "X",
            },
            ModelRef("a", "r", ModelRef("l"), "X"),
        ),
    ],
)
def test_references(text, ref):
    assert parse_reference(text, "here") == ref
    if isinstance(text, str):
        assert str(ref) == text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a+b+c", "here has more than one '+', got 'a+b+c'"),
        ("a@b@c", "here must name one revision after '@', got 'a@b@c'"),
        ("a@", "here must name one revision"),
        ("@b", "here must be the path of a model, got ''"),
        ("a+", "here must be the path of a model, got ''"),
        ("a\0", "here must be the path"),
        (7, "here must be a text PATH[@REVISION][+LORA[@REVISION]] or a mapping"),
        ({"path": "a"}, "here must be a text"),
        ({"model": 7}, "here.model must be a path or a mapping {path, revision}, got 7"),
        ({"model": {"revision": "x"}}, "here.model must be a path or a mapping"),
        ({"model": {"path": ""}}, "here.model.path must be the path of a model"),
        ({"model": "a", "lora": 7}, "here.lora must be a path or a mapping"),
        ({"model": "a", "override_architecture": 7}, "here.override_architecture must be a text"),
    ],
)
def test_wrong_references(value, message):
    with pytest.raises(RecipeError) as caught:
        parse_reference(value, "here")
    assert str(caught.value).startswith(message)


def test_existing_folder_is_taken_as_it_stands(tmp_path):
    (tmp_path / "a+b@c").mkdir()
    (tmp_path / "sub" / "x@y").mkdir(parents=True)
    assert parse_reference("a+b@c", "here") == ModelRef("a+b@c")
    assert parse_reference({"model": "a+b@c"}, "here") == ModelRef("a+b@c")
    assert parse_reference("x@y", "here") == ModelRef("x", "y")
    assert parse_reference("x@y", "here", tmp_path / "sub") == ModelRef("x@y")
    assert resolve_path(ModelRef("a+b@c"), tmp_path) == tmp_path / "a+b@c"


def test_paths_resolve_from_here_then_from_the_recipe(tmp_path, monkeypatch):
    sub = tmp_path / "sub"
    for folder in (tmp_path / "both", sub / "both", sub / "only", tmp_path / "home" / "m"):
        folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert resolve_path(ModelRef("both"), sub) == tmp_path / "both"
    assert resolve_path(ModelRef("only"), sub) == sub / "only"
    assert resolve_path(ModelRef("~/m"), sub) == tmp_path / "home" / "m"
    assert resolve_path(ModelRef(str(sub / "only")), tmp_path) == sub / "only"
    (sub / "c.yaml").write_text(yaml.safe_dump(ties(base_model="only")))
    recipe = load_recipe("sub/c.yaml")
    assert recipe.path(2) == sub / "only"
    with pytest.raises(RecipeError, match=r"^sub/c.yaml: models\[0\]: model 'a' was not found"):
        recipe.path(0)


def test_recipe_path_expands_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.yaml").write_text(yaml.safe_dump(ties()))
    assert load_recipe("~/sub/c.yaml").folder == tmp_path / "sub"


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        (ModelRef("org/name"), "'org/name' was not found; models must be local folders; download"),
        (ModelRef("a", "main"), "'a@main' names a revision; models must be local folders"),
        (ModelRef("a", lora=ModelRef("l")), "'a+l' names a LoRA adapter; models must be local"),
        (ModelRef("f.gguf"), "'f.gguf' is a file; give the folder that holds it"),
    ],
)
def test_only_local_folders_resolve(ref, message, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "f.gguf").touch()
    with pytest.raises(RecipeError) as caught:
        resolve_path(ref, tmp_path)
    assert message in str(caught.value)


# --- inputs, base and operands -------------------------------------------------------------------


def test_listed_base_keeps_its_place():
    models = [{"model": "a"}, {"model": "./base/"}, {"model": "b"}]
    recipe = load_recipe(ties(models=models))
    assert recipe.base == 1
    assert len(recipe.inputs) == 3
    assert recipe.operands() == [0, 2]


def test_same_model_twice():
    message = error(ties(models=[{"model": "a"}, {"model": "b"}, {"model": "./a/"}]))
    assert message.startswith("models[2] is the same model as models[0]")
    # Another revision or adapter is another model.
    load_recipe(ties(models=[{"model": "a"}, {"model": "a@x"}, {"model": "a+l"}]))


def test_required_base():
    assert error(ties(base_model=None)).startswith("method toy_ties needs a base; set base_model")
    nuslerp = ties(merge_method="toy_nuslerp", base_model=None)
    assert load_recipe(nuslerp).base is None
    assert load_recipe(nuslerp).operands() == [0, 1]


def test_operands_of_methods_that_combine_the_base():
    def operands(method, models, base):
        document = {
            "merge_method": method,
            "models": [{"model": m} for m in models],
            "parameters": {"weight": 1, "t": 0.5},
        }
        return load_recipe(document | ({"base_model": base} if base else {})).operands()

    assert operands("toy_linear", "abc", None) == [0, 1, 2]
    assert operands("toy_linear", "abc", "b") == [0, 1, 2]
    assert operands("toy_linear", "ab", "c") == [0, 1, 2]
    assert operands("toy_slerp", "ab", "a") == [0, 1]
    assert operands("toy_slerp", "ab", "b") == [1, 0]
    assert operands("toy_slerp", "a", "b") == [1, 0]


@pytest.mark.parametrize(
    ("method", "models", "base", "message"),
    [
        ("toy_slerp", "abc", "a", "takes exactly 2 models (the base included), got 3: a, b, c"),
        ("toy_slerp", "a", "a", "takes exactly 2 models (the base included), got 1: a"),
        ("toy_ties", "a", "a", "takes at least 1 model other than the base, got 0"),
        ("toy_nuslerp", "a", None, "takes 2 to 3 models, got 1: a"),
        ("toy_nuslerp", "abcd", "e", "takes 2 to 3 models other than the base, got 4: a, b, c, d"),
        # As in mergekit, a base that is not listed is one more input of such methods.
        ("toy_single", "a", "b", "takes exactly 1 model (the base included), got 2: a, b"),
    ],
)
def test_number_of_models(method, models, base, message):
    document = {"merge_method": method, "models": [{"model": m} for m in models]}
    assert error(document | {"base_model": base}) == f"method {method} {message}"


# --- parameters ----------------------------------------------------------------------------------


def test_scopes_and_defaults():
    got = params(
        ties(
            models=[
                {"model": "a", "parameters": {"weight": "1e-3", "density": 0.25}},
                {"model": "b"},
            ],
            parameters={"weight": 2, "lambda": 0.5, "mode": "mean", "normalize": "no"},
        )
    )
    assert vars(got) == {
        "weight": [0.001, 2.0],
        "density": [0.25, 1.0],
        "lambda_": 0.5,
        "normalize": False,
        "steps": 3,
        "mode": "mean",
        "scale": None,
    }
    assert isinstance(params(ties()).lambda_, float)


def test_values_of_the_base():
    """On the base an expert's parameter is ignored, whatever it is; an input's is required."""
    models = [{"model": "base", "parameters": {"weight": "nonsense", "density": 9}}, {"model": "a"}]
    assert params(ties(models=models)).weight == [0.5]
    linear = {"merge_method": "toy_linear", "models": models, "base_model": "base"}
    assert error(linear).startswith("models[0].parameters.weight must be a number")
    each = [{"model": "a", "parameters": {"weight": 1}}]
    assert error(linear | {"models": each}) == (
        "base_model (base) has no weight, which method toy_linear requires; "
        "set it in parameters, or list the base in models"
    )
    each.insert(0, {"model": "base", "parameters": {"weight": 3}})
    assert params(linear | {"models": each}).weight == [3.0, 1.0]


def test_lists_follow_the_order_of_operands():
    got = params(
        {
            "merge_method": "toy_slerp",
            "models": [
                {"model": "a", "parameters": {"own": 1, "each": 1}},
                {"model": "b", "parameters": {"own": 2, "each": 2}},
            ],
            "base_model": "b",
            "parameters": {"t": 0.5},
        }
    )
    assert (got.t, got.own, got.each) == (0.5, [1.0], [2.0, 1.0])


def test_missing_required():
    models = [{"model": "a", "parameters": {"weight": 1}}, {"model": "./math"}]
    assert error(ties(models=models, parameters=None)) == (
        "models[1] (./math) has no weight, which method toy_ties requires; "
        "set it in models[1].parameters or in parameters"
    )
    slerp = {"merge_method": "toy_slerp", "models": [A], "base_model": "b"}
    assert error(slerp) == "method toy_slerp requires t; set parameters.t"
    recipe = load_recipe(slerp | {"parameters": {"t": {"filter": "mlp", "value": 1}}})
    assert recipe.params_for("x.mlp.w", no_depth).t == 1.0
    with pytest.raises(RecipeError, match=r"requires t for 'x\.attn\.w'; set"):
        recipe.params_for("x.attn.w", no_depth)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"density": 1.5}, "parameters.density must be in [0, 1], got 1.5"),
        ({"density": [0, 0.5, -1]}, "parameters.density[2] must be in [0, 1], got -1"),
        ({"density": {"value": 2, "filter": "x"}}, "parameters.density.value must be in [0, 1]"),
        ({"density": [{"value": [0, 2]}]}, "parameters.density[0].value[1] must be in [0, 1]"),
        ({"density": "half"}, "parameters.density must be a number, got 'half'"),
        (
            {"density": None},
            "parameters.density must be a number, a text, true or false, or a list",
        ),
        ({"density": float("nan")}, "parameters.density must be in [0, 1], got nan"),
        ({"density": [[1]]}, "parameters.density[0] must be a number, a text"),
        ({"density": [0.1, {"value": 1}]}, "parameters.density[0] must be a mapping"),
        ({"density": {"filter": "x"}}, "parameters.density has no value"),
        ({"density": {"value": {"value": 1}}}, "parameters.density.value must be a number"),
        ({"density": {"value": 1, "filter": 3}}, "parameters.density.filter must be a text"),
        ({"density": datetime.date(2020, 1, 1)}, "parameters.density must be a number"),
        ({"steps": 1.5}, "parameters.steps must be a whole number, got 1.5"),
        ({"steps": 0}, "parameters.steps must be in [1, inf], got 0"),
        ({"steps": float("inf")}, "parameters.steps must be a whole number, got inf"),
        ({"lambda": 10**400}, "parameters.lambda must be a number"),
        ({"mode": "summ"}, "parameters.mode must be one of sum, mean, max, got 'summ'"),
        ({"mode": True}, "parameters.mode must be a text, got True"),
        ({"normalize": 2}, "parameters.normalize must be true or false, got 2"),
    ],
)
def test_wrong_values(parameters, message):
    text = yaml.safe_dump(ties(parameters={"weight": 1} | parameters))
    assert error(text).startswith(message)


def test_integers_too_long_to_print():
    message = error(ties(parameters={"weight": 1, "steps": 10**5000, "lambda": 1}))
    assert message == "parameters.steps must be a number within range, got a huge int"


def test_place_of_a_models_value():
    models = [{"model": "a"}, {"model": "b", "parameters": {"density": 1.5}}]
    assert error(ties(models=models)) == "models[1].parameters.density must be in [0, 1], got 1.5"


def test_conditions_take_the_first_match_and_fall_through():
    recipe = load_recipe(
        ties(
            models=[
                {
                    "model": "a",
                    "parameters": {
                        "weight": [
                            {"filter": "layers.1", "value": 1},
                            {"filter": "mlp", "value": 2},
                        ]
                    },
                },
                {"model": "b", "parameters": {"weight": [{"filter": "*", "value": 7}]}},
            ],
            parameters={"weight": [{"filter": "Norm", "value": 3}, {"value": 4}], "density": []},
        )
    )

    def weight(name):
        return recipe.params_for(name, no_depth).weight

    assert weight("layers.1.mlp") == [1.0, 7.0]
    assert weight("layers.10.attn") == [1.0, 7.0]  # a substring, not a whole part of the name
    assert weight("layers.2.mlp") == [2.0, 7.0]
    assert weight("layers.2.Norm") == [3.0, 7.0]
    assert weight("layers.2.norm") == [4.0, 7.0]
    assert weight("a*b") == [4.0, 7.0]
    assert recipe.params_for("x", no_depth).density == [1.0, 1.0]


def test_matched_condition_without_values_falls_through():
    setting = [{"filter": "mlp", "value": []}, {"value": 1}]
    models = [{"model": "a", "parameters": {"weight": setting}}]
    recipe = load_recipe(ties(models=models))
    assert recipe.params_for("mlp", no_depth).weight == [0.5]
    assert recipe.params_for("attn", no_depth).weight == [1.0]


def test_gradients():
    def at(t, **parameters):
        return params(ties(parameters={"weight": 1} | parameters), t=t)

    assert [at(t, density=[0, 1]).density[0] for t in (0, 0.25, 1)] == [0.0, 0.25, 1.0]
    assert [at(t, density=["0", 1, 0.5]).density[0] for t in (0.25, 0.5, 0.75, 1)] == [
        0.5,
        1.0,
        0.75,
        0.5,
    ]
    assert [at(t, mode=["sum", "mean", "max"]).mode for t in (0, 0.49, 0.5, 0.99, 1)] == [
        "sum",
        "sum",
        "mean",
        "mean",
        "max",
    ]
    assert [at(t, normalize=[False, True]).normalize for t in (0.99, 1)] == [False, True]
    assert at(0.5, steps=[5, 11]).steps == 8
    with pytest.raises(RecipeError) as caught:
        at(0.25, steps=[5, 11])
    assert str(caught.value) == (
        "parameters.steps, interpolated for 'model.layers.0.w', must be a whole number, got 6.5"
    )


def test_gradient_inside_a_condition():
    setting = {"filter": "mlp", "value": [0, 1]}
    recipe = load_recipe(ties(parameters={"weight": 1, "density": setting}))
    assert recipe.params_for("mlp", lambda: 0.5).density == [0.5, 0.5]
    assert recipe.params_for("attn", no_depth).density == [1.0, 1.0]


def test_depth_is_not_asked_for_without_a_gradient():
    recipe = load_recipe(ties(parameters={"weight": [1], "density": {"value": [0.5]}}))
    assert recipe.params_for("x", no_depth).density == [0.5, 0.5]


def test_parameters_without_filters_and_gradients_are_one_object():
    recipe = load_recipe(ties(parameters={"weight": {"filter": "*", "value": 1}, "density": []}))
    assert recipe.params_for("x", no_depth) is recipe.params_for("y", no_depth)
    # A wider scope's filter counts for nothing below a value for all tensors.
    models = [{"model": "a", "parameters": {"weight": 1}}]
    recipe = load_recipe(ties(models=models, parameters={"weight": {"filter": "q", "value": 2}}))
    assert recipe.params_for("x", no_depth) is recipe.params_for("q", no_depth)


def test_errors_of_tensors_name_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(ties(parameters={"weight": [1, 2]})))
    positions = LayerPositions.from_names(["x.0.w", "x.1.w"], {"n_layer": 7})
    with pytest.raises(RecipeError, match=r"^c.yaml: cannot tell the depth of 'x.0.w'"):
        load_recipe("c.yaml").params_for("x.0.w", lambda: positions.t("x.0.w"))


def test_presets():
    got = params(ties(parameters={"weight": 1, "preset": "paper", "lambda": 2}))
    assert (got.density, got.normalize, got.lambda_) == ([0.2, 0.2], False, 2.0)
    assert not hasattr(got, "preset")
    # A preset stands below everything written, and can give a required value.
    models = [{"model": "a", "parameters": {"density": 0.9}}, {"model": "b"}]
    assert params(ties(models=models, parameters={"weight": 1, "preset": "paper"})).density == [
        0.9,
        0.2,
    ]
    assert params(ties(parameters={"preset": "other"})).weight == [1.0, 1.0]


@pytest.mark.parametrize(
    ("method", "preset", "message"),
    [
        ("toy_ties", "papre", "parameters.preset of method toy_ties must be one of other, paper"),
        ("toy_ties", ["paper"], "parameters.preset must be the name of a preset, got ['paper']"),
        ("toy_ties", None, "parameters.preset must be the name of a preset, got null"),
        ("toy_nuslerp", "paper", "but method toy_nuslerp has no presets"),
    ],
)
def test_wrong_presets(method, preset, message):
    document = ties(merge_method=method, parameters={"weight": 1, "preset": preset})
    assert message in error(document)


# --- layers --------------------------------------------------------------------------------------


def llama(n, prefix="model.layers"):
    return [f"{prefix}.{j}.{w}.weight" for j in range(n) for w in ("mlp.up", "attn.q")]


LOOSE = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "num_layers", "n_layers"])
def test_positions(key):
    for config in (None, {}, {key: 5}, {"text_config": {key: 5}}, {"n_layer": True}):
        positions = LayerPositions.from_names(LOOSE + llama(5), config)
        assert [positions.t(n) for n in LOOSE] == [0.0, 0.0, 0.0]
        assert [positions.t(n) for n in llama(5)[::2]] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_one_layer_is_at_the_end():
    names = [*LOOSE, "model.layers.0.experts.0.w", "model.layers.0.experts.7.w"]
    for config in ({"num_hidden_layers": 1}, None):
        assert LayerPositions.from_names(names, config).t(names[3]) == 1.0
    alone = LayerPositions.from_names(["model.layers.0.a.w", "model.layers.0.b.w"])
    assert alone.t("model.layers.0.a.w") == 1.0


def test_layer_is_the_first_index_that_is_not_common_to_all_names():
    names = [f"module.0.h.{j}.experts.{e}.w" for j in range(3) for e in range(5)]
    positions = LayerPositions.from_names([*names, "module.0.wte.weight"])
    assert positions.t("module.0.h.1.experts.4.w") == 0.5
    assert positions.t("module.0.wte.weight") == 0.0


def test_names_without_layers():
    for names in ([], ["w"], ["0.weight"], ["a.b", "a.c", "block.3"], ["x.12345678901.w"]):
        positions = LayerPositions.from_names(names, {"n_layer": 4})
        assert [positions.t(n) for n in names] == [0.0] * len(names)


def test_two_stacks_of_one_length():
    names = llama(3, "encoder.layers") + llama(3, "decoder.layers")
    assert LayerPositions.from_names(names).t("decoder.layers.1.attn.q.weight") == 0.5


@pytest.mark.parametrize(
    ("names", "config", "message"),
    [
        (
            llama(4) + llama(2, "vision.layers"),
            {"num_hidden_layers": 4},
            "stacks of different numbers of layers (model.layers.* has 4, vision.layers.* has 2)",
        ),
        (llama(4), {"n_layer": 3}, "config.json says 3 layers, but model.layers.* has 4"),
        (llama(4), {"text_config": {"n_layer": 5}}, "config.json says 5 layers"),
    ],
)
def test_uncertain_layers_are_an_error_only_when_asked_for(names, config, message):
    positions = LayerPositions.from_names(LOOSE + names, config)
    assert positions.t("lm_head.weight") == 0.0
    with pytest.raises(RecipeError) as caught:
        positions.t(names[0])
    assert message in str(caught.value)


# --- keywords ------------------------------------------------------------------------------------


def test_keywords():
    got = keyword_params(TIES, 2, True, {"weight": 0.5, "density": [0.1, "0.2"], "lambda_": 2})
    assert vars(got) == {
        "weight": [0.5, 0.5],
        "density": [0.1, 0.2],
        "lambda_": 2.0,
        "normalize": True,
        "steps": 3,
        "mode": "sum",
        "scale": None,
    }
    assert keyword_params(TIES, 1, True, {"weight": 1, "lambda": 3}).lambda_ == 3.0
    assert keyword_params(TIES, 1, True, {"weight": 1, "density": None}).density == [1.0]


def test_keywords_take_arrays():
    got = keyword_params(
        TIES, 2, True, {"weight": np.array([1, 2]), "density": np.float32(0.5), "steps": np.int8(4)}
    )
    assert (got.weight, got.density, got.steps) == ([1.0, 2.0], [0.5, 0.5], 4)


def test_keywords_count_operands():
    slerp = {"t": 0.5, "own": [1], "each": [1, 2]}
    got = keyword_params(SLERP, 2, True, slerp)
    assert (got.own, got.each) == ([1.0], [1.0, 2.0])
    assert keyword_params(LINEAR, 3, False, {"weight": (1, 2, 3)}).weight == [1.0, 2.0, 3.0]


def test_keyword_presets():
    got = keyword_params(TIES, 2, True, {"weight": 1, "preset": "paper", "lambda_": 2})
    assert (got.density, got.normalize, got.lambda_) == ([0.2, 0.2], False, 2.0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"wieght": 1}, "unknown keyword 'wieght' of method toy_ties; did you mean 'weight'?"),
        ({"lamda_": 1}, "unknown keyword 'lamda_' of method toy_ties; did you mean 'lambda_'?"),
        ({}, "method toy_ties requires weight; pass weight=..."),
        ({"weight": None}, "method toy_ties requires weight; pass weight=..."),
        ({"weight": [1, 2, 3]}, "weight must have 2 values, one per model, got 3"),
        ({"weight": [1, "x"]}, "weight[1] must be a number, got 'x'"),
        ({"weight": 1, "density": 1.5}, "density must be in [0, 1], got 1.5"),
        ({"weight": 1, "lambda_": [1, 2]}, "lambda_ is one value for all models, got [1, 2]"),
        ({"weight": {"value": 1}}, "weight must be a number, got {'value': 1}"),
        ({"weight": 1, "lambda": 1, "lambda_": 1}, "lambda is given twice"),
        ({"weight": 1, "preset": "x"}, "preset of method toy_ties must be one of other, paper"),
    ],
)
def test_wrong_keywords(kwargs, message):
    with pytest.raises(RecipeError) as caught:
        keyword_params(TIES, 2, True, kwargs)
    assert str(caught.value).startswith(message)


def test_keywords_check_the_models():
    with pytest.raises(RecipeError, match="method toy_ties needs a base"):
        keyword_params(TIES, 2, False, {"weight": 1})
    with pytest.raises(RecipeError, match="takes exactly 2 models"):
        keyword_params(SLERP, 3, True, {"t": 1})


# --- against mergekit's own resolver -------------------------------------------------------------

NAMES = [*LOOSE, *llama(12)]
FILTERS = st.sampled_from([None, "*", "", "mlp", "attn", "layers.1", "lm_head", "MLP", "no such"])
SCALARS = {
    float: st.sampled_from([0, 1, 0.25, 0.7, "1e-3", "0.5", True]),
    int: st.sampled_from([1, 2, 5, 10, 3.0, "4"]),
    bool: st.sampled_from([True, False, "yes", "off", 0, 1]),
    str: st.sampled_from(["sum", "mean", "max"]),
}


def setting_strategy(kind):
    value = st.one_of(SCALARS[kind], st.lists(SCALARS[kind], max_size=4))
    condition = st.fixed_dictionaries({"value": value}, optional={"filter": FILTERS})
    return st.one_of(value, condition, st.lists(condition, max_size=3))


def parameters_strategy(spec, per_input):
    return st.fixed_dictionaries(
        {},
        optional={
            p.name: setting_strategy(p.kind)
            for p in spec.params
            if not per_input or p.scope != "shared"
        },
    )


@st.composite
def documents(draw):
    spec = draw(st.sampled_from([TIES, LINEAR]))
    models = draw(st.permutations(["a", "b", "base"]))
    if draw(st.booleans()):
        models.remove("base")
    entries = []
    for model in models:
        entry = {"model": model}
        if draw(st.booleans()):
            entry["parameters"] = draw(parameters_strategy(spec, per_input=True))
        entries.append(entry)
    shared = draw(parameters_strategy(spec, per_input=False))
    if draw(st.integers(0, 4)):  # mostly give the required one, so that most recipes resolve
        shared.setdefault("weight", draw(SCALARS[float]))
    return {
        "merge_method": spec.name,
        "base_model": "base",
        "models": entries,
        "parameters": shared,
    }


@pytest.fixture(scope="module")
def mergekit_resolve():
    """Resolve one tensor's parameters with mergekit: (document, name, t) -> (shared, per input)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of its own dependencies
        pytest.importorskip("mergekit")
        from mergekit.common import ModelReference
        from mergekit.config import (
            ConfigReader,
            InputSliceDefinition,
            MergeConfiguration,
            OutputSliceDefinition,
        )
        from mergekit.merge_methods.base import MergeMethodSpec, ParameterScope, ParameterSpec
        from mergekit.parameter_resolver import resolve_parameters

    def mergekit_spec(spec):
        scopes = {
            "shared": ParameterScope.SHARED,
            "input": ParameterScope.INPUT,
            "expert": ParameterScope.NON_BASE,
        }
        own = []
        for p in spec.params:
            kind = p.kind | None if p.default is None else p.kind
            default = {} if p.default is REQUIRED else {"default": p.default}
            own.append(ParameterSpec(p.name, kind, scopes[p.scope], **default))
        from mergekit.merge_methods.base import BasePolicy, InputContract

        return MergeMethodSpec(spec.name, tuple(own), InputContract(base=BasePolicy(spec.base)))

    def resolve(document, name, t):
        config = MergeConfiguration.model_validate(document)
        entries = [(m.model, m.parameters) for m in config.models]
        if config.base_model not in [model for model, _ in entries]:
            entries.append((config.base_model, None))
        output = OutputSliceDefinition(
            sources=[
                InputSliceDefinition(model=model, layer_range=(0, 12), parameters=parameters)
                for model, parameters in entries
            ]
        )
        reader = ConfigReader(config=config, t=t, slice_out=output)
        shared, per_input = resolve_parameters(
            mergekit_spec(registry.get(document["merge_method"])),
            tensor_name=name,
            inputs={model: name for model, _ in entries},
            sources=reader.parameter_sources,
            base_model=ModelReference.model_validate("base"),
            t=t,
        )
        return shared, {str(model): values for model, values in per_input.items()}

    return resolve


def resolve_here(document, name, t):
    """Return (shared, per input) in the shape of `mergekit_resolve`."""
    recipe = load_recipe(document)
    spec, got = recipe.spec(), vars(recipe.params_for(name, lambda: t))
    shared, per_input = {}, {str(i.ref): {} for i in recipe.inputs}
    for p in spec.params:
        value = got["lambda_" if p.name == "lambda" else p.name]
        if p.scope == "shared":
            shared[p.name] = value
            continue
        owners = [i for i in recipe.operands() if p.scope == "input" or i != recipe.base]
        for owner, own in zip(owners, value, strict=True):
            per_input[str(recipe.inputs[owner].ref)][p.name] = own
    return shared, per_input


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    document=documents(),
    name=st.sampled_from(NAMES),
    t=st.one_of(st.sampled_from([j / 11 for j in range(12)]), st.floats(0, 1)),
)
def test_resolution_is_mergekits(mergekit_resolve, document, name, t):
    try:
        expected = mergekit_resolve(document, name, t)
    except (RuntimeError, ValueError):  # a required value missing, a fraction for a whole number
        with pytest.raises(RecipeError):
            resolve_here(document, name, t)
        return
    got = resolve_here(document, name, t)
    assert got == expected
    assert [type(v) for v in got[0].values()] == [
        # Defaults are converted here and not there.
        type(v)
        for v in expected[0].values()
    ]


def test_depth_is_mergekits(mergekit_resolve):
    """A gradient over twelve layers, tensor by tensor, through names and positions."""
    document = ties(parameters={"weight": [0, 0.3, 1], "mode": ["sum", "mean", "max"]})
    positions = LayerPositions.from_names(NAMES, {"num_hidden_layers": 12})
    recipe = load_recipe(document)
    for j in range(12):
        name = f"model.layers.{j}.mlp.up.weight"
        shared, per_input = mergekit_resolve(document, name, j / 11)
        got = recipe.params_for(name, lambda name=name: positions.t(name))
        assert got.weight == [per_input["a"]["weight"], per_input["b"]["weight"]]
        assert got.mode == shared["mode"]


# --- nothing but RecipeError ---------------------------------------------------------------------

KEYS = st.sampled_from(
    sorted(
        {"model", "lora", "override_architecture", "path", "revision", "value", "filter", "preset"}
        | set(RecipeDocument.model_fields)
        | {p.name for p in TIES.params}
    )
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.builds(pow, st.just(10), st.just(5000)),  # too long for Python to print
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["toy_ties", "toy_linear", "toy_slerp", "a", "base", "a+b", "a@b", "~x/y"]),
    st.dates(),
    st.binary(max_size=3),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(KEYS, st.text(max_size=4), st.integers()), inner, max_size=4),
    ),
    max_leaves=12,
)


@st.composite
def nearly_right(draw):
    """Right recipes with wild values in some places, so that every check is reached."""
    document = draw(documents())
    for _ in range(draw(st.integers(1, 3))):
        spot = document
        while True:
            keys = list(spot) if isinstance(spot, dict) else list(range(len(spot)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(spot[key], dict | list) and draw(st.booleans()):
                spot = spot[key]
                continue
            spot[key] = draw(TREES)
            break
    return document


def survive(source):
    try:
        recipe = load_recipe(source)
    except RecipeError as caught:
        assert "\n" not in str(caught)
        return
    assert isinstance(recipe, Recipe)
    for name in NAMES[:4]:
        try:
            recipe.params_for(name, lambda: 0.3)
        except RecipeError as caught:
            assert "\n" not in str(caught)


FUZZ = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(st.one_of(TREES, nearly_right()))
def test_any_mapping_gives_a_recipe_or_one_line(tree):
    survive(tree if isinstance(tree, dict) else {"models": tree, "merge_method": "toy_ties"})


@FUZZ
@given(st.one_of(TREES, nearly_right()))
def test_any_yaml_gives_a_recipe_or_one_line(tree):
    try:
        text = yaml.safe_dump(tree)
    except ValueError:  # an integer too long to print
        return
    survive(text if "\n" in text else text + "\n")


@FUZZ
@given(st.text(alphabet="ab:-[]{}&*!|>%@`'\"#,? \n\t0179.~<=\x00\ud800", max_size=40))
def test_any_text_gives_a_recipe_or_one_line(text):
    survive(text)
    survive(text + "\n")


@FUZZ
@given(TREES)
def test_any_keywords_give_parameters_or_an_error(value):
    for key in ("weight", "lambda_", "steps", "mode", "normalize", "preset"):
        with contextlib.suppress(RecipeError):
            keyword_params(TIES, 2, True, {"weight": 1} | {key: value})


def test_recipes_need_no_torch():
    code = "import sys, fastmerge.recipe; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
