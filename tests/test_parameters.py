"""Parameters: settings, gradients, filters, layers and keywords."""

from __future__ import annotations

import datetime

import numpy as np
import pytest
import yaml
from recipe_toys import (  # noqa: F401
    LINEAR,
    LOOSE,
    SLERP,
    TIES,
    A,
    empty_folder,
    error,
    llama,
    no_depth,
    params,
    ties,
    toy_methods,
)

from fastmerge.errors import RecipeError
from fastmerge.recipe import (
    LayerPositions,
    keyword_params,
    load_recipe,
)

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
