"""Generated recipes: mergekit's own resolver agrees; bad ones give RecipeError alone."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import warnings

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recipe_toys import LINEAR, LOOSE, TIES, A, empty_folder, llama, params, ties, toy_methods  # noqa: F401 (fixtures)

from fastmerge import registry
from fastmerge.errors import RecipeError
from fastmerge.recipe import (
    LayerPositions,
    Recipe,
    keyword_params,
    load_recipe,
)
from fastmerge.recipe.schema import RecipeDocument
from fastmerge.registry import REQUIRED

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
