"""LoRA adapters: what they add to which weight, which are refused, and that nothing of one is passed over."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from adapters import PREFIX, SHAPES, UP, UP_1, USUAL, Q, factors, values, write_adapter, write_base
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastmerge.checkpoint import Checkpoint, difference, identity, open_checkpoint, read_adapter
from fastmerge.checkpoint.adapter import Adapter, with_adapter
from fastmerge.checkpoint.coded import CodedInfo, LowRank
from fastmerge.coding import Coding, Format
from fastmerge.dtypes import DType
from fastmerge.errors import CheckpointError, RecipeError
from fastmerge.planner import make_plan
from fastmerge.provenance import binding
from fastmerge.quant.opening import open_model
from fastmerge.recipe import load_recipe


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


def low_rank(checkpoint: Checkpoint, module: str) -> LowRank:
    info = checkpoint.tensors[f"{module}.weight"]
    assert isinstance(info, CodedInfo) and info.low_rank is not None
    return info.low_rank


def refusal(path: Path, base: Path | None = None) -> str:
    """Return the one line with which an adapter is refused."""
    with pytest.raises(CheckpointError) as caught:
        if base is None:
            read_adapter(path)
        else:
            open_model(base, path)
    message = str(caught.value)
    assert message.isprintable() and str(path) in message
    return message


# ---- what is added ------------------------------------------------------------------------------


def test_factors_are_added_to_their_weight_alone(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "lora", factors(Q) | factors(UP, seed=2))
    plain, found = open_model(base), open_model(base, adapter)
    assert list(found.tensors) == list(plain.tensors)
    stored = read_adapter(adapter)
    for name, info in found.tensors.items():
        module = name.removesuffix(".weight")
        if module not in (Q, UP):
            assert info == plain.tensors[name]
            continue
        assert info == CodedInfo(
            name,
            DType.F32,
            SHAPES[name],
            Coding(Format.DENSE, DType.F32),
            {"codes": plain.tensors[name]},
            low_rank=stored.low_rank[module],
        )
        low = low_rank(found, module)
        assert (low.a.name, low.b.name) == tuple(factors(module))
        assert (low.a.shape, low.b.shape, low.rank) == ((2, 8), (SHAPES[name][0], 2), 2)
        assert low.scale == 8
        a, b = factors(module, seed=1 if module == Q else 2).values()
        want = values(plain.tensors[name]) + 8.0 * (b.double() @ a.double()).numpy()
        np.testing.assert_allclose(values(info), want, rtol=1e-14)


def test_checkpoint_names_the_files_of_both(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "lora")
    file, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    plain, found = open_model(base), open_model(base, adapter)
    assert (found.path, found.adapter, plain.adapter) == (base, adapter, None)
    assert (str(plain), str(found)) == (str(base), f"{base}+{adapter}")
    assert found.weight_files == [base / "model.safetensors", file]
    assert found.identities == [*plain.identities, identity(file), identity(config)]
    found.check_unchanged()
    config.write_text(config.read_text() + " ")
    with pytest.raises(CheckpointError, match=r"adapter_config.json changed from \d+ to \d+ bytes"):
        found.check_unchanged()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("of_factors", [torch.float32, torch.float16, torch.bfloat16])
def test_result_has_the_type_of_the_base(
    dtype: torch.dtype, of_factors: torch.dtype, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", dtype)
    tensors = {n: t.to(of_factors) for n, t in factors(Q).items()}
    info = open_model(base, write_adapter(tmp_path / "lora", tensors)).tensors[f"{Q}.weight"]
    assert isinstance(info, CodedInfo) and info.low_rank is not None
    assert f"torch.{info.dtype.torch}" == f"torch.{info.coding.dtype.torch}" == str(dtype)
    assert f"torch.{info.low_rank.a.dtype.torch}" == str(of_factors)


def test_weight_that_is_coded_keeps_its_codes(base: Path, tmp_path: Path) -> None:
    plain = open_checkpoint(base)
    name = f"{Q}.weight"
    nf4 = Coding(Format.BNB_NF4, DType.BF16, group=64)
    coded = CodedInfo(name, DType.BF16, (8, 8), nf4, {"codes": plain.tensors["model.steps"]}, 0.5)
    quantised = dataclasses.replace(plain, tensors=plain.tensors | {name: coded})
    adapter = read_adapter(write_adapter(tmp_path / "lora"))
    found = with_adapter(quantised, adapter).tensors[name]
    assert found == dataclasses.replace(coded, low_rank=adapter.low_rank[Q])
    assert quantised.tensors[name] == coded


@pytest.mark.parametrize(
    ("changes", "scales"),
    [
        ({}, (8, 8)),
        ({"lora_alpha": 3}, (1.5, 1.5)),
        ({"lora_alpha": 0.5}, (0.25, 0.25)),
        ({"lora_alpha": 0}, (0, 0)),
        ({"use_rslora": True}, (16 / math.sqrt(2),) * 2),
        ({"use_rslora": None}, (8, 8)),
        ({"alpha_pattern": {"q_proj": 4}}, (2, 8)),
        ({"alpha_pattern": {"self_attn.q_proj": 4, "q_proj": 6}}, (2, 8)),
        ({"alpha_pattern": {"proj": 4}}, (8, 8)),  # a whole component, not the end of one
        ({"alpha_pattern": {".*_proj": 4}}, (2, 2)),
        ({"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 4}}, (2, 8)),
        ({"alpha_pattern": {"^layers.0.self_attn.q_proj": 4}}, (8, 8)),
        ({"alpha_pattern": {r"layers\.[01]\.mlp\.up_proj": 1.5}}, (8, 0.75)),
        ({"alpha_pattern": {"up_proj|q_proj": 4}, "use_rslora": True}, (4 / math.sqrt(2),) * 2),
        ({"alpha_pattern": {PREFIX + Q: 4}}, (8, 8)),  # patterns see the model without peft's own
        ({"r": 5, "rank_pattern": {"q_proj": 2, "mlp.up_proj": 2}}, (8, 8)),
        ({"r": 5, "rank_pattern": {"_proj": 1, ".*": 2}}, (8, 8)),
        ({"rank_pattern": None, "alpha_pattern": None}, (8, 8)),
        ({"alpha_pattern": {"[[q]_proj": 4}}, (2, 8)),  # of which Python warns
    ],
)
def test_scales(changes: dict[str, Any], scales: tuple[float, float], tmp_path: Path) -> None:
    adapter = read_adapter(write_adapter(tmp_path, factors(Q) | factors(UP), **changes))
    assert (adapter.low_rank[Q].scale, adapter.low_rank[UP].scale) == scales


def test_each_module_has_its_rank(tmp_path: Path) -> None:
    tensors = factors(Q) | factors(UP, rank=3) | factors(UP_1, rank=4)
    ranks = {"layers.0.mlp.up_proj": 3, "up_proj": 4}
    adapter = read_adapter(write_adapter(tmp_path, tensors, rank_pattern=ranks, use_rslora=True))
    assert {m: low.rank for m, low in adapter.low_rank.items()} == {Q: 2, UP: 3, UP_1: 4}
    assert adapter.low_rank[UP_1].scale == 16 / math.sqrt(4)


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_starts_that_leave_the_base_alone(start: object, tmp_path: Path) -> None:
    assert read_adapter(write_adapter(tmp_path, init_lora_weights=start)).low_rank[Q].scale == 8


def test_settings_that_are_off_or_idle_are_passed_over(tmp_path: Path) -> None:
    # Of old versions, and what newer ones have to come: nothing that is off changes a weight.
    settings = {"enable_lora": None, "merge_weights": False, "use_new": False, "new_config": {}}
    adapter = write_adapter(tmp_path, **settings, lora_dropout=0.1, ensure_weight_tying=True)
    assert list(read_adapter(adapter).low_rank) == [Q]
    few = {key: USUAL[key] for key in ("peft_type", "r", "lora_alpha")}
    (adapter / "adapter_config.json").write_text(json.dumps(few))
    assert read_adapter(adapter).low_rank[Q].scale == 8


# ---- tensors that take others' place ------------------------------------------------------------


def own(name: str, *shape: int) -> dict[str, torch.Tensor]:
    return {PREFIX + name: torch.full(shape, 0.5)}


@pytest.mark.parametrize(
    ("tensors", "changes", "name"),
    [
        (own("model.norm.weight", 8), {"modules_to_save": ["norm"]}, "model.norm.weight"),
        (own("model.conv.weight", 4, 8, 3), {"modules_to_save": ["conv"]}, "model.conv.weight"),
        (own(f"{Q}.base_layer.bias", 8), {"bias": "lora_only"}, f"{Q}.bias"),
        (own(f"{Q}.bias", 8), {"bias": "all"}, f"{Q}.bias"),
        (own("model.embed_tokens.weight", 7, 8), {}, "model.embed_tokens.weight"),  # resized
        (own("lm_head.weight", 6, 8), {"modules_to_save": ["lm_head"]}, "lm_head.weight"),
    ],
)
def test_whole_tensors(
    tensors: dict[str, torch.Tensor], changes: dict[str, Any], name: str, base: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "lora", factors(Q) | tensors, **changes)
    found = open_model(base, adapter).tensors
    assert found[name].name == name
    assert (values(found[name]) == 0.5).all()
    assert found[name].shape == tuple(next(iter(tensors.values())).shape)
    assert list(found) == list(open_model(base).tensors)


def test_weight_of_its_own_with_factors_beside_it(base: Path, tmp_path: Path) -> None:
    tensors = factors(Q) | own(f"{Q}.base_layer.weight", 8, 8)
    found = open_model(base, write_adapter(tmp_path / "lora", tensors)).tensors[f"{Q}.weight"]
    a, b = factors(Q).values()
    np.testing.assert_allclose(values(found), 0.5 + 8.0 * (b.double() @ a.double()).numpy())


def test_tied_head_comes_into_its_own(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", without=("lm_head.weight",))
    adapter = write_adapter(tmp_path / "lora", own("lm_head.weight", 6, 8))
    found = open_model(base, adapter).tensors
    assert (values(found["lm_head.weight"]) == 0.5).all()
    assert set(found) - set(open_model(base).tensors) == {"lm_head.weight"}
    write_adapter(adapter, factors("lm_head"))
    assert refusal(adapter, base).endswith(
        f"in {base} the output head is tied to the embedding; merge it into its base with peft's "
        "merge_and_unload() and give the result"
    )


@pytest.mark.parametrize("ties", [None, True, False])
def test_head_stays_what_it_was_tied_to(ties: bool | None, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", without=("lm_head.weight",))
    if ties is not None:
        (base / "config.json").write_text(json.dumps({"tie_word_embeddings": ties}))
    adapter = write_adapter(tmp_path / "lora", own("model.embed_tokens.weight", 6, 8))
    plain, found = open_model(base).tensors, open_model(base, adapter).tensors
    assert (values(found["model.embed_tokens.weight"]) == 0.5).all()
    if ties is False:  # a model without a head
        assert "lm_head.weight" not in found
        return
    assert found["lm_head.weight"].name == "lm_head.weight"
    np.testing.assert_array_equal(
        values(found["lm_head.weight"]), values(plain["model.embed_tokens.weight"])
    )


def test_names_without_the_prefix(base: Path, tmp_path: Path) -> None:
    tensors = {n.removeprefix(PREFIX): t for n, t in factors(Q).items()}
    found = open_model(base, write_adapter(tmp_path / "lora", tensors))
    assert low_rank(found, Q).a.name == f"{Q}.lora_A.weight"


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "has peft_type 'LOHA'; only LORA is supported; merge it into its"),
        ({"peft_type": None}, "has peft_type None"),
        ({"peft_type": ["LORA"]}, "has peft_type ['LORA']"),
        ({"r": 0}, "r must be a whole number above 0, got 0"),
        ({"r": True}, "r must be a whole number above 0, got True"),
        ({"r": None}, "r must be a whole number above 0, got None"),
        ({"r": 2.0}, "r must be a whole number above 0, got 2.0"),
        ({"lora_alpha": None}, "lora_alpha must be a number, got None"),
        ({"lora_alpha": "16"}, "lora_alpha must be a number, got '16'"),
        ({"lora_alpha": False}, "lora_alpha must be a number, got False"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a number, got 1000"),
        ({"use_rslora": 1}, "use_rslora must be true or false, got 1"),
        ({"rank_pattern": [2]}, "rank_pattern is not a map but [2]"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern['q_proj'] must be a whole number above 0"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern has '(', which is no regular expression"),
        ({"alpha_pattern": "x"}, "alpha_pattern is not a map but 'x'"),
        ({"alpha_pattern": {"q_proj": {}}}, "alpha_pattern['q_proj'] must be a number, got {}"),
        ({"alpha_pattern": {"*": 2}}, "alpha_pattern has '*', which is no regular expression"),
        ({"alpha_pattern": {"a{1,99999999999}": 2}}, "which is no regular expression"),
        ({"bias": "some"}, "bias must be none, all or lora_only, got 'some'"),
        ({"bias": None}, "bias must be none, all or lora_only, got None"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights 'pissa': its training began by"),
        ({"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion to get an"),
        ({"init_lora_weights": "corda"}, "has init_lora_weights 'corda'"),
        ({"init_lora_weights": "loftq"}, "has init_lora_weights 'loftq'"),
        ({"init_lora_weights": "lora_ga"}, "has init_lora_weights 'lora_ga'"),
        ({"init_lora_weights": {"x": 1}}, "has init_lora_weights {'x': 1}"),
        (
            {"use_dora": True},
            "the adapter is of DoRA, which also rescales columns (use_dora is True)",
        ),
        (
            {"fan_in_fan_out": True},
            "adapts weights that are stored transposed, [in, out] (fan_in_fan",
        ),
        ({"target_parameters": ["experts.down_proj"]}, "adapts parameters that are not weights of"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "belongs to a model with repeated layers"),
        ({"lora_bias": True}, "has biases of its own (lora_bias is True)"),
        ({"use_qalora": True}, "is of QALoRA"),
        ({"alora_invocation_tokens": [1]}, "works on some tokens only"),
        ({"trainable_token_indices": [1]}, "changes single rows of an embedding"),
        ({"use_novelty": True}, "has an unknown setting 'use_novelty': True; remove it if it does"),
        ({"arrow_config": {"top_k": 1}}, "has an unknown setting 'arrow_config': {'top_k': 1}"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    line = refusal(write_adapter(tmp_path, **changes))
    assert line.startswith(f"{tmp_path / 'adapter_config.json'}") and message in line


A_NAME, B_NAME = factors(Q)
A, B = factors(Q).values()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({A_NAME: A}, f"tensor '{A_NAME}' has no lora_B beside it"),
        ({B_NAME: B}, f"tensor '{B_NAME}' has no lora_A beside it"),
        ({A_NAME: A[:1], B_NAME: B}, "is [1, 8], not [rank, in] of the rank 2 that"),
        ({A_NAME: A, B_NAME: B[:, :1]}, "is [8, 1], not [out, rank] of the rank 2 that"),
        ({A_NAME: B, B_NAME: A}, "is [8, 2], not [rank, in] of the rank 2 that"),
        ({A_NAME: A[0], B_NAME: B}, "is [8], not [rank, in]"),
        (
            {A_NAME: A[..., None, None], B_NAME: B[..., None, None]},
            "is of a convolution ([2, 8, 1, 1])",
        ),
        ({A_NAME: A.double(), B_NAME: B}, "is float64; factors must be float32, float16 or"),
        ({A_NAME: A.char(), B_NAME: B}, "is int8; factors must be"),
        (
            {A_NAME: A.half(), B_NAME: B},
            f"'{A_NAME}' is float16 but '{B_NAME}' is float32; save both",
        ),
        ({}, "holds no tensors"),
        (
            factors(Q) | {A_NAME.removeprefix(PREFIX): A},
            f"'{A_NAME}' and '{Q}.lora_A.weight' are for",
        ),
        (
            own("model.norm.weight", 8) | own("model.norm.base_layer.weight", 8),
            f"'{PREFIX}model.norm.base_layer.weight' and '{PREFIX}model.norm.weight' are for the same",
        ),
        (
            {f"{PREFIX}model.embed_tokens.lora_embedding_A": A},
            "is of an embedding, whose factors are stored transposed",
        ),
        (
            factors(Q) | {f"{PREFIX}{Q}.lora_magnitude_vector": A[0]},
            "lora_magnitude_vector' is of DoRA, which also rescales columns",
        ),
        (
            factors(Q) | {f"{PREFIX}{Q}.lora_B.bias": B[:, 0]},
            "lora_B.bias' is a bias of its own of the adapter",
        ),
        ({f"{PREFIX}{Q}.lora_A.default.weight": A}, "is of a kind of LoRA that is not supported"),
        ({"lora_A.weight": A}, "'lora_A.weight' is of a kind of LoRA that is not supported"),
        (
            factors(Q) | {f"{PREFIX}{Q}.lora_diag": A[0]},
            "is of a kind of LoRA that is not supported",
        ),
    ],
)
def test_tensors_that_are_refused(
    tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    tensors = {name: t.contiguous().clone() for name, t in tensors.items()}
    line = refusal(write_adapter(tmp_path, tensors))
    assert line.startswith(f"{tmp_path / 'adapter_model.safetensors'}") and message in line


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            factors("model.layers.7.q_proj", shape=(8, 8)),
            "is for 'model.layers.7.q_proj.weight', which",
        ),
        (
            factors("layers.0.self_attn.q_proj", shape=(8, 8)),
            "the adapter belongs to another model",
        ),
        (factors("model.steps", shape=(8, 8)), "is for 'model.steps.weight', which"),
        (factors(UP, shape=(8, 12)), f"are for a weight [8, 12] but '{UP}.weight' is [12, 8] in"),
        (
            factors("model.conv", shape=(4, 24)),
            "a weight [4, 24] but 'model.conv.weight' is [4, 8, 3]",
        ),
        (factors("model.norm", shape=(8, 8)), "[8, 8] but 'model.norm.weight' is [8] in"),
        (own("score.weight", 2, 8), f"tensor '{PREFIX}score.weight' is for 'score.weight', which"),
        (
            own("model.norm.weight", 2, 8),
            "is [2, 8] float32 but 'model.norm.weight' is [8] float32 in",
        ),
        (
            own("model.embed_tokens.weight", 6, 7),
            "is [6, 7] float32 but 'model.embed_tokens.weight'",
        ),
        (own("model.steps", 1), "is [1] float32 but 'model.steps' is [1] int64 in"),
        (own(f"{Q}.modules_to_save.default.weight", 8, 8), "which"),
    ],
)
def test_tensors_that_do_not_fit_the_model(
    tensors: dict[str, torch.Tensor], message: str, base: Path, tmp_path: Path
) -> None:
    line = refusal(write_adapter(tmp_path / "lora", tensors), base)
    assert message in line and str(base) in line


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8, torch.float8_e4m3fn])
def test_weights_that_nothing_can_be_added_to(dtype: torch.dtype, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", dtype)
    line = refusal(write_adapter(tmp_path / "lora"), base)
    assert line.startswith(
        f"'{Q}.weight' in {base} is {str(dtype).removeprefix('torch.')}, to which"
    )


def test_folders_that_are_refused(base: Path, tmp_path: Path) -> None:
    assert "holds a whole model, not an adapter: it has no adapter_config.json" in refusal(base)
    adapter = write_adapter(tmp_path / "lora")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "'adapter_model.bin', which is not supported; load it with peft and" in refusal(adapter)
    (adapter / "adapter_model.bin").unlink()
    assert "holds no adapter: it has no adapter_model.safetensors; give" in refusal(adapter)
    (adapter / "adapter_config.json").unlink()
    assert "holds no adapter: it has no adapter_config.json; give" in refusal(adapter)
    assert "does not exist" in refusal(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    assert "is a file; give the folder that holds it" in refusal(tmp_path / "file")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"r": 1, "r": 2}', '{"lora_alpha": NaN}', "\0"])
def test_broken_settings(text: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path)
    (adapter / "adapter_config.json").write_text(text)
    assert refusal(adapter).startswith(str(adapter / "adapter_config.json"))


def test_model_folder_that_is_an_adapter(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "lora")
    with pytest.raises(CheckpointError, match="which belongs to a base; give both, as BASE") as e:
        open_model(adapter)
    assert "only an adapter ('adapter_model.safetensors')" in str(e.value)


# ---- damage -------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from([*USUAL, "lora_bias", "target_parameters", "use_qalora"]) | st.text()


def _read(adapter: Path, checkpoint: Checkpoint) -> Adapter | None:
    """Return the adapter, None if it was refused in one line."""
    try:
        found = read_adapter(adapter)
        with_adapter(checkpoint, found)
        return found
    except CheckpointError as error:
        assert str(error).isprintable()
        return None


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(KEYS, JSON, max_size=3))
def test_any_settings_are_read_or_refused(
    changes: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "lora", **changes)
    found = _read(adapter, open_checkpoint(base))
    if found is not None:
        assert math.isfinite(found.low_rank[Q].scale)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_a_file_is_read_or_refused(
    data: st.DataObject, base: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "lora", factors(Q) | own("model.norm.weight", 8))
    name = data.draw(st.sampled_from(["adapter_model.safetensors", "adapter_config.json"]))
    content = bytearray((adapter / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        if not content:
            break
        at = data.draw(st.integers(0, min(len(content), 700) - 1))
        how = data.draw(st.sampled_from(["change", "cut", "insert", "drop"]))
        if how == "cut":
            del content[max(at, 1) :]
        elif how == "drop":
            del content[at : at + data.draw(st.integers(1, 8))]
        else:
            content[at : at + (how == "change")] = data.draw(st.binary(min_size=1, max_size=4))
    (adapter / name).write_bytes(content)
    _read(adapter, open_checkpoint(base))


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    modules=st.lists(st.sampled_from([Q, UP, UP_1, "lm_head"]), unique=True, min_size=1),
    missing=st.integers(0, 7),
    stray=st.sampled_from(
        ["", "model.layers.9.mlp.up_proj.lora_A.weight", "model.other", f"{Q}.x"]
    ),
)
def test_every_tensor_is_used_or_named(
    modules: list[str], missing: int, stray: str, base: Path, tmp_path: Path
) -> None:
    tensors = {n: t for module in modules for n, t in factors(module).items()}
    lacking = list(tensors)[missing : missing + 1]
    tensors = {n: t for n, t in tensors.items() if n not in lacking}
    tensors |= {PREFIX + stray: torch.zeros(2, 8)} if stray else {}
    adapter = write_adapter(tmp_path / "lora", tensors)
    if lacking or stray:
        assert any(name in refusal(adapter, base) for name in tensors)
        return
    found = open_model(base, adapter)
    used = [t.name for m in modules for t in (low_rank(found, m).a, low_rank(found, m).b)]
    assert sorted(used) == sorted(tensors)


# ---- recipes ------------------------------------------------------------------------------------


@pytest.fixture
def recipe(base: Path, tmp_path: Path) -> Path:
    write_adapter(tmp_path / "lora")
    document = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": "base+lora", "parameters": {"weight": 1.0}}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))
    return tmp_path / "recipe.yaml"


def test_planner_opens_adapters(recipe: Path) -> None:
    plan = make_plan(load_recipe(recipe))
    assert plan.conflicts == []
    folder = recipe.parent
    assert plan.as_dict()["inputs"] == [
        f"{folder / 'base'}+{folder / 'lora'}",
        str(folder / "base"),
    ]
    (job,) = [j for j in plan.jobs if j.name == f"{Q}.weight"]
    assert isinstance(job.experts[0].info, CodedInfo) and job.experts[0].model == "base+lora"
    assert job.base is not None and not isinstance(job.base.info, CodedInfo)


def test_adapter_that_does_not_fit_is_an_error_of_the_plan(recipe: Path) -> None:
    write_adapter(recipe.parent / "lora", factors(UP, shape=(8, 12)))
    with pytest.raises(CheckpointError, match="the adapter belongs to another model"):
        make_plan(load_recipe(recipe))
    os.rename(recipe.parent / "lora", recipe.parent / "gone")
    with pytest.raises(RecipeError, match=r"models\[0\]: adapter 'lora' was not found"):
        make_plan(load_recipe(recipe))


def test_binding_names_the_adapters_files(recipe: Path) -> None:
    bound = binding(make_plan(load_recipe(recipe)), "error", 10**9)
    names = ["model.safetensors", "adapter_model.safetensors", "adapter_config.json"]
    assert [Path(f["path"]).name for f in bound["inputs"]] == [*names, "model.safetensors"]


def _touch(file: Path) -> None:
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


def _rewrite(file: Path) -> None:
    """Change a file's first digit of what it says, but neither its size nor its times."""
    status, content = file.stat(), file.read_bytes()
    header = content.index(b"16,") if file.suffix == ".json" else content.index(b"[2,8]") + 1
    changed = b"1" if file.suffix != ".json" else b"9"
    file.write_bytes(content[:header] + changed + content[header + 1 :])
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_binding_changes_with_the_adapters_files(name: str, recipe: Path) -> None:
    file = recipe.parent / "lora" / name
    before = binding(make_plan(load_recipe(recipe)), "error", 10**9)
    assert difference(before, binding(make_plan(load_recipe(recipe)), "error", 10**9)) is None
    _touch(file)
    after = binding(make_plan(load_recipe(recipe)), "error", 10**9)
    assert re.search(rf"the time of change of .*{name} changed", difference(before, after) or "")


def test_binding_sees_settings_that_differ_by_content_alone(recipe: Path) -> None:
    before = binding(make_plan(load_recipe(recipe)), "error", 10**9)
    _rewrite(recipe.parent / "lora" / "adapter_config.json")
    after = binding(make_plan(load_recipe(recipe)), "error", 10**9)
    assert "the header of" in (difference(before, after) or "")
