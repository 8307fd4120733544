"""Which weights are coded: the default, what users say, and what they are told of the rest."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastmerge.errors import RecipeError
from fastmerge.quant import FORMATS, shares_scale
from fastmerge.quant.modules import is_head, layer_of
from fastmerge.quant.policy import Choice, Rules, choose

CONFIG = {"num_hidden_layers": 4}
INT4 = FORMATS["int4"]

#: Matrices of linear modules, in each of four blocks.
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")


def _model(**more: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (64, 256)}
    for i in range(4):
        shapes |= {f"model.layers.{i}.{m}.weight": (256, 256) for m in LINEARS}
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (256,)
        shapes[f"model.layers.{i}.self_attn.q_proj.bias"] = (256,)
    return shapes | {"model.norm.weight": (256,), "lm_head.weight": (64, 256)} | more


def _chosen(
    shapes: Mapping[str, tuple[int, ...]],
    rules: Rules | None = None,
    config: Mapping[str, Any] = CONFIG,
    name: str = "int4",
) -> Choice:
    return choose(shapes, config, FORMATS[name], rules or Rules())


def _coded(choice: Choice) -> set[str]:
    return {n for n, f in choice.formats.items() if f is not None}


def _blocks(*layers: int) -> set[str]:
    return {f"model.layers.{i}.{m}.weight" for i in layers for m in LINEARS}


def test_matrices_of_blocks_are_coded_by_default() -> None:
    shapes = _model()
    choice = _chosen(shapes)
    assert list(choice.formats) == list(shapes)
    assert _coded(choice) == _blocks(0, 1, 2, 3)
    assert {f for f in choice.formats.values() if f} == {INT4}
    assert choice.kept == ["lm_head.weight"] and choice.warnings == []


@pytest.mark.parametrize(
    ("name", "shape", "is_linear"),
    [
        ("model.layers.0.mlp.gate.weight", (8, 256), True),
        ("model.layers.0.mlp.router.weight", (8, 256), True),
        ("model.layers.0.block_sparse_moe.gate.weight", (8, 256), True),
        ("model.layers.0.mlp.shared_expert_gate.weight", (1, 256), True),
        ("blk.0.ffn_gate_inp.weight", (8, 256), True),
        ("transformer.wte.weight", (64, 256), False),
        ("model.embed_positions.weight", (64, 256), False),
        ("shared.weight", (64, 256), False),
        ("model.layers.0.mixer.conv1d.weight", (256, 256), False),
        ("model.layers.0.mixer.conv1d.weight", (256, 1, 4), False),
        ("model.layers.0.mixer.A_log", (256, 256), False),
        ("model.layers.0.post_norm.weight", (256, 256), False),
        ("model.layers.0.mlp.up_proj.weight", (0, 256), True),
    ],
)
def test_some_are_never_coded(name: str, shape: tuple[int, ...], is_linear: bool) -> None:
    for rules in (Rules(), Rules(quantize=[name]), Rules(overrides={name: "fp8"})):
        choice = _chosen(_model(**{name: shape}), rules)
        assert choice.formats[name] is None
        # What the readers would take for a linear module of theirs has to be listed.
        assert (name in choice.kept) == is_linear
        if rules.quantize or rules.overrides:
            (key,) = {"quantize", "overrides"} & {k for k, v in vars(rules).items() if v}
            assert len(choice.warnings) == 1
            assert choice.warnings[0].startswith(
                f"{key}: {name!r} matches only what is never coded"
            )
        else:
            assert choice.warnings == []


def test_names_that_only_look_alike_are_coded() -> None:
    names = ["model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.experts.7.gate_proj.weight"]
    names += ["model.layers.0.self_attn.output.weight", "model.layers.1.mlp.gate_up_proj.weight"]
    choice = _chosen({n: (256, 256) for n in names})
    assert _coded(choice) == set(names)


@pytest.mark.parametrize(
    "name",
    [
        "model.vision_tower.blocks.0.attn.qkv.weight",
        "visual.blocks.3.mlp.fc1.weight",
        "multi_modal_projector.linear_1.weight",
        "mtp.layers.0.mlp.up_proj.weight",
        "model.layers.4.mlp.up_proj.weight",  # past the last: multi-token prediction
    ],
)
def test_what_lies_beside_the_model_is_coded_when_asked_for(name: str) -> None:
    shapes = _model(**{name: (256, 256)})
    assert _chosen(shapes).formats[name] is None and name in _chosen(shapes).kept
    choice = _chosen(shapes, Rules(quantize=[name.removesuffix(".weight")]))
    assert choice.formats[name] is INT4 and choice.warnings == []


def test_head() -> None:
    shapes = _model()
    assert _chosen(shapes, Rules(head="same")).formats["lm_head.weight"] is INT4
    assert _chosen(shapes, Rules(head="q8")).formats["lm_head.weight"] is FORMATS["fp8"]
    assert _chosen(shapes, Rules(quantize=["lm_head"])).formats["lm_head.weight"] is INT4
    over = _chosen(shapes, Rules(overrides={"lm_head": "int4-g32"}))
    assert over.formats["lm_head.weight"] is FORMATS["int4-g32"] and over.kept == []
    with pytest.raises(RecipeError, match="head cannot be q8 beside nf4"):
        _chosen(shapes, Rules(head="q8"), name="nf4")
    with pytest.raises(RecipeError, match="head must be one of keep, q8, same, got 'q4'"):
        _chosen(shapes, Rules(head="q4"))


def test_tied_head_is_never_coded() -> None:
    choice = _chosen(_model(), Rules(head="same"), CONFIG | {"tie_word_embeddings": True})
    assert choice.formats["lm_head.weight"] is None and "lm_head.weight" in choice.kept
    assert choice.warnings == ["'lm_head.weight': stays in 16 bit: it is tied to the embedding"]
    assert _chosen(_model(), None, CONFIG | {"tie_word_embeddings": True}).warnings == []


def test_first_and_last_blocks() -> None:
    shapes = _model()
    assert _coded(_chosen(shapes, Rules(first_last_layers=1))) == _blocks(1, 2)
    assert _coded(_chosen(shapes, Rules(first_last_layers=1), {})) == _blocks(1, 2)  # by the names
    assert _coded(_chosen(shapes, Rules(first_last_layers=2))) == set()
    nested = {"text_config": {"num_hidden_layers": 4}, "num_hidden_layers": 99}
    assert _coded(_chosen(shapes, Rules(first_last_layers=1), nested)) == _blocks(1, 2)
    asked = Rules(first_last_layers=1, quantize=["model.layers.0.mlp.*"])
    more = {n for n in _blocks(0) if ".mlp." in n}
    assert _coded(_chosen(shapes, asked)) == _blocks(1, 2) | more
    with pytest.raises(RecipeError, match="first_last_layers must be 0 or more, got -1"):
        _chosen(shapes, Rules(first_last_layers=-1))


def test_keep_is_the_strongest() -> None:
    rules = Rules(keep=["*.q_proj"], quantize=["*.q_proj.weight"], overrides={"*q_proj*": "fp8"})
    choice = _chosen(_model(), rules)
    assert _coded(choice) == {n for n in _blocks(0, 1, 2, 3) if "q_proj" not in n}
    assert choice.warnings == []
    assert sorted(choice.kept) == sorted(
        {n for n in _blocks(0, 1, 2, 3) if "q_proj" in n} | {"lm_head.weight"}
    )


def test_keeping_what_is_never_coded_is_no_mistake() -> None:
    assert _chosen(_model(), Rules(keep=["*norm*"])).warnings == []
    assert _chosen(_model(), Rules(keep=["*nrom*"])).warnings == [
        "keep: '*nrom*' matches no weight"
    ]


def test_expressions_begin_at_the_start_of_a_name() -> None:
    choice = _chosen(_model(), Rules(keep=["re:mlp", r"re:.*\.mlp\.", r"re:model\.layers\.[01]\."]))
    assert _coded(choice) == {n for n in _blocks(2, 3) if ".mlp." not in n}
    assert choice.warnings == ["keep: 're:mlp' matches no weight"]
    with pytest.raises(RecipeError, match=r"keep has 're:\(', which is no regular expression"):
        _chosen(_model(), Rules(keep=["re:("]))


def test_overrides() -> None:
    rules = Rules(overrides={"*.down_proj": "fp8", "*.mlp.*": "int4-g32", "nothing": "nvfp4"})
    choice = _chosen(_model(), rules)
    down, gate = (
        choice.formats[f"model.layers.2.mlp.{m}.weight"] for m in ("down_proj", "gate_proj")
    )
    assert down is FORMATS["fp8"] and gate is FORMATS["int4-g32"]
    assert choice.formats["model.layers.2.self_attn.q_proj.weight"] is INT4
    assert choice.warnings == ["overrides: 'nothing' matches no weight"]
    with pytest.raises(RecipeError, match="overrides: nf4 cannot lie beside int4 in one folder"):
        _chosen(_model(), Rules(overrides={"x": "nf4"}))
    with pytest.raises(RecipeError, match="no format is called 'int5'; the nearest is 'int4'"):
        _chosen(_model(), Rules(overrides={"x": "int5"}))


@pytest.mark.parametrize("name", ["gptq", "awq", "fp8-block"])
def test_formats_of_one_description_stand_alone(name: str) -> None:
    for other in FORMATS:
        if FORMATS[other] is FORMATS[name]:
            continue
        with pytest.raises(RecipeError, match="cannot lie beside"):
            _chosen(_model(), Rules(overrides={"x": other}), name=name)


def test_matrix_that_does_not_fit_is_kept_and_said() -> None:
    odd = {f"model.layers.{i}.mlp.up_proj.weight": (256, 200) for i in range(3)}
    choice = _chosen(_model(**odd))
    assert not _coded(choice) & set(odd) and set(odd) <= set(choice.kept)
    assert choice.warnings == [
        "'model.layers.0.mlp.up_proj.weight' and 2 more: stays in 16 bit, as int4 cannot hold it: "
        "200 columns are no multiple of 128"
    ]


def test_columns_that_a_library_misreads_are_coded_and_said() -> None:
    choice = _chosen(_model(**{"model.layers.0.mlp.up_proj.weight": (256, 96)}), name="nf4")
    assert choice.formats["model.layers.0.mlp.up_proj.weight"] is FORMATS["nf4"]
    assert len(choice.warnings) == 1 and "has 96 columns" in choice.warnings[0]


@pytest.mark.parametrize(("name", "warns"), [("nf4", True), ("nvfp4", True), ("int4", False)])
def test_experts_that_a_reader_fuses_badly_are_coded_and_said(name: str, warns: bool) -> None:
    experts = {f"model.layers.0.mlp.experts.{i}.up_proj.weight": (256, 256) for i in range(2)}
    choice = _chosen(_model(**experts), name=name)
    assert all(choice.formats[e] is FORMATS[name] for e in experts)
    assert [w for w in choice.warnings if "experts" in w and "fuses" in w] == choice.warnings
    assert bool(choice.warnings) is warns


def test_experts_in_one_tensor_are_kept_and_said() -> None:
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    choice = _chosen(_model(**{experts: (4, 256, 256)}))
    assert choice.formats[experts] is None and experts not in choice.kept
    assert choice.warnings == [
        f"{experts!r}: stays in 16 bit: experts in one tensor fit no format of matrices"
    ]


def test_matrices_of_inputs_by_outputs_are_kept_and_said() -> None:
    shapes = {"h.0.attn.c_attn.weight": (256, 768), "h.0.mlp.c_fc.weight": (256, 1024)}
    choice = _chosen(shapes, None, {"model_type": "gpt2"})
    assert _coded(choice) == set() and len(choice.warnings) == 1
    assert "and 1 more: stays in 16 bit: this kind of model stores matrices" in choice.warnings[0]


WORDS = st.sampled_from(
    ["model", "layers", "0", "3", "mlp", "up_proj", "q_proj", "gate", "lm_head"]
)
NAMES = st.lists(WORDS, min_size=1, max_size=5).map(lambda w: ".".join([*w, "weight"]))


@given(
    shapes=st.dictionaries(NAMES, st.sampled_from([(256, 256), (256,), (48, 100), (2, 256, 256)])),
    keep=st.lists(st.sampled_from(["*", "*.mlp.*", "lm_head", "re:.*proj"]), max_size=2),
    quantize=st.lists(st.sampled_from(["*", "*gate*", "lm_head*"]), max_size=2),
    first=st.integers(0, 3),
    head=st.sampled_from(["keep", "same"]),
    name=st.sampled_from(sorted(FORMATS)),
)
def test_whatever_is_asked_only_what_fits_is_coded(
    shapes: dict[str, tuple[int, ...]],
    keep: list[str],
    quantize: list[str],
    first: int,
    head: str,
    name: str,
) -> None:
    rules = Rules(keep, quantize, head, first)
    choice = choose(shapes, CONFIG, FORMATS[name], rules)
    assert list(choice.formats) == list(shapes)
    for weight, found in choice.formats.items():
        if found is None:
            continue
        assert len(shapes[weight]) == 2 and found.refuses(shapes[weight]) is None
        globs = [k for k in keep if not k.startswith("re:")]
        module = weight.removesuffix(".weight")
        assert not any(fnmatchcase(n, k) for k in globs for n in (weight, module))
        assert not weight.endswith("gate.weight")
        assert weight not in choice.kept
    assert all("\n" not in w for w in choice.warnings)


# ---- names --------------------------------------------------------------------------------------


def test_weights_that_runtimes_fuse_share_a_scale() -> None:
    layer = "model.layers.3"
    for words, key in {
        ("q_proj", "k_proj", "v_proj"): "self_attn.qkv_proj",
        ("q_a_proj", "kv_a_proj_with_mqa"): "self_attn.fused_qkv_a_proj",
    }.items():
        assert {shares_scale(f"{layer}.self_attn.{w}.weight") for w in words} == {f"{layer}.{key}"}
    assert {shares_scale(f"{layer}.mlp.{w}.weight") for w in ("gate_proj", "up_proj")} == {
        f"{layer}.mlp.gate_up_proj"
    }
    expert = f"{layer}.block_sparse_moe.experts.5"
    assert shares_scale(f"{expert}.w1.weight") == shares_scale(f"{expert}.w3.weight") != None  # noqa: E711
    assert shares_scale(f"{expert}.w1.weight") != shares_scale(
        f"{layer}.block_sparse_moe.experts.6.w1.weight"
    )
    for alone in ("self_attn.o_proj", "mlp.down_proj", "mlp.gate", "mlp.gate_up_proj"):
        assert shares_scale(f"{layer}.{alone}.weight") is None
    assert shares_scale("q_proj.weight") is None  # of no module that others share


@pytest.mark.parametrize(
    ("name", "head", "layer"),
    [
        ("lm_head.weight", True, None),
        ("model.lm_head.weight", True, None),
        ("embed_out.weight", True, None),
        ("output.weight", True, None),
        ("model.layers.0.output.weight", False, 0),
        ("model.layers.12.mlp.up_proj.weight", False, 12),
        ("transformer.h.7.attn.c_attn.weight", False, 7),
        ("blk.30.attn_q.weight", False, 30),
        ("model.embed_tokens.weight", False, None),
    ],
)
def test_heads_and_blocks_by_name(name: str, head: bool, layer: int | None) -> None:
    assert is_head(name) is head and layer_of(name) == layer
