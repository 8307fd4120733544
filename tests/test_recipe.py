"""Recipes: sources, schema, references and inputs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import yaml
from recipe_toys import TIES, A, empty_folder, error, params, ties, toy_methods  # noqa: F401 (fixtures)

from fastmerge.dtypes import DType
from fastmerge.errors import RecipeError
from fastmerge.recipe import (
    ModelRef,
    load_recipe,
    parse_reference,
    resolve_adapter,
    resolve_path,
)

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
        (ModelRef("f.bin"), "'f.bin' is a file; give the folder that holds it"),
    ],
)
def test_only_local_folders_resolve(ref, message, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "f.bin").touch()
    with pytest.raises(RecipeError) as caught:
        resolve_path(ref, tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (ModelRef("org/l"), "adapter 'org/l' was not found; adapters must be local folders; down"),
        (
            ModelRef("l", "main"),
            "adapter 'l@main' names a revision; adapters must be local folders",
        ),
        (ModelRef("l.gguf"), "adapter 'l.gguf' is a file; give the folder that holds it"),
    ],
)
def test_only_local_adapters_resolve(lora, message, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "l").mkdir()
    (tmp_path / "l.gguf").touch()
    ref = ModelRef("a", lora=lora)
    assert resolve_path(ref, tmp_path) == tmp_path / "a"
    with pytest.raises(RecipeError) as caught:
        resolve_adapter(ref, tmp_path)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("spelling", ["a+l", {"model": "a", "lora": "l"}])
def test_adapters_resolve_as_models_do(spelling, tmp_path, monkeypatch):
    for folder in ("a", "l", "base", "b"):
        (tmp_path / "sub" / folder).mkdir(parents=True)
    models = [{"model": spelling}, {"model": "b"}]
    (tmp_path / "sub" / "c.yaml").write_text(yaml.safe_dump(ties(models=models)))
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("sub/c.yaml")
    assert recipe.path(0) == tmp_path / "sub" / "a"
    assert recipe.adapter(0) == tmp_path / "sub" / "l"
    assert recipe.adapter(1) is None and recipe.adapter(recipe.base) is None
    (tmp_path / "sub" / "l").rmdir()
    with pytest.raises(RecipeError, match=r"^sub/c.yaml: models\[0\]: adapter 'l' was not found"):
        recipe.adapter(0)
    found = dataclasses.replace(recipe, found=(Path("/1"),) * 3, adapters=(Path("/2"), None, None))
    assert (found.path(0), found.adapter(0), found.adapter(1)) == (Path("/1"), Path("/2"), None)


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
