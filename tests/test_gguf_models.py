"""GGUF files as models: what an opened file holds, and what each tensor of a model becomes in one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import llama_tensors, llama_values, make, write_by_package
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

gguf = pytest.importorskip(
    "gguf", reason="the package gguf (extra fastmerge[gguf]) is the oracle here"
)
transformers = pytest.importorskip(
    "transformers", reason="transformers (extra demo) is the oracle here"
)

from gguf_models import LLAMA3_ROPE, save_model, tiny_model  # noqa: E402

from fastmerge.checkpoint.coded import CodedInfo  # noqa: E402
from fastmerge.checkpoint.gguf import GgufValue, ValueType, lay_out_gguf, read_gguf  # noqa: E402
from fastmerge.coding import Coding, Format  # noqa: E402
from fastmerge.dtypes import DType  # noqa: E402
from fastmerge.errors import CheckpointError  # noqa: E402
from fastmerge.quant.gguf import find_gguf, open_gguf  # noqa: E402
from fastmerge.quant.gguf_names import hf_name  # noqa: E402
from fastmerge.quant.gguf_writer import (  # noqa: E402
    copied_metadata,
    gguf_constants,
    gguf_layout,
    gguf_metadata,
    gguf_targets,
)

TYPE = gguf.GGMLQuantizationType

# ---- opening ------------------------------------------------------------------------------------


def test_open_gives_codes_and_names(tmp_path: Path) -> None:
    path = make(tmp_path / "model.gguf")
    found = open_gguf(tmp_path)
    assert found == open_gguf(str(tmp_path)) and open_gguf(path).tensors == found.tensors
    assert found.path == tmp_path and found.weight_files == [path]
    embedding = found.tensors["model.embed_tokens.weight"]
    assert not isinstance(embedding, CodedInfo)
    assert (embedding.dtype, embedding.shape, embedding.n_bytes) == (DType.F16, (50, 32), 3200)
    q = found.tensors["model.layers.0.self_attn.q_proj.weight"]
    assert isinstance(q, CodedInfo) and q.coding == Coding(Format.Q8_0, DType.BF16, rotary=8)
    assert (q.dtype, q.shape, q.n_bytes, q.file) == (DType.BF16, (32, 32), 32 * 34, path)
    k = found.tensors["model.layers.0.self_attn.k_proj.weight"]
    assert isinstance(k, CodedInfo) and k.coding == Coding(Format.DENSE, DType.F32, rotary=8)
    assert k.dtype is DType.F32 and k.parts["codes"].shape == (16, 32)
    assert list(found.tensors) == [hf_name(n) for n in read_gguf(path).tensors]
    found.check_unchanged()


def test_config_says_what_most_elements_are(tmp_path: Path) -> None:
    many = (np.zeros((900, 34), np.uint8), 8)
    path = make(tmp_path / "a.gguf", tensors=llama_tensors(output__weight=many))
    config = open_gguf(path).config
    assert config is not None
    assert config["torch_dtype"] == "bfloat16" and config["tie_word_embeddings"] is False
    config = open_gguf(make(tmp_path / "b.gguf")).config
    assert config is not None
    assert config["torch_dtype"] == "float16" and config["tie_word_embeddings"] is True
    assert config["rms_norm_eps"] == 1e-6 and config["head_dim"] == 8


def test_scale_of_a_tensor_is_read(tmp_path: Path) -> None:
    blocks = (np.zeros((4, 36), np.uint8), 40)
    more = {
        "blk__0__ffn_up__weight": blocks,
        "blk__0__ffn_up__scale": np.array([0.25], np.float32),
        "blk__0__ffn_up__input_scale": np.array([3.0], np.float32),
        "blk__0__ffn_gate__weight": blocks,
    }
    found = open_gguf(make(tmp_path / "a.gguf", tensors=llama_tensors(**more)))
    up = found.tensors["model.layers.0.mlp.up_proj.weight"]
    gate = found.tensors["model.layers.0.mlp.gate_proj.weight"]
    assert isinstance(up, CodedInfo) and isinstance(gate, CodedInfo)
    assert (up.tensor_scale, gate.tensor_scale, up.shape) == (0.25, 1.0, (4, 64))
    assert found.warnings == () and not any("scale" in name for name in found.tensors)
    more["blk__0__ffn_up__scale"] = np.array([0.25, 0.5], np.float32)
    with pytest.raises(CheckpointError, match=r"ffn_up\.scale' is not one finite factor"):
        open_gguf(make(tmp_path / "b.gguf", tensors=llama_tensors(**more)))


def test_unknown_architecture_keeps_names(tmp_path: Path) -> None:
    found = open_gguf(make(tmp_path / "a.gguf", architecture="mamba"))
    assert set(found.tensors) == set(llama_tensors()) and found.config is None
    assert found.tensors["blk.0.attn_q.weight"].coding.rotary == 0
    (warning,) = found.warnings
    assert "architecture 'mamba', whose tensors keep their GGUF names" in warning


def test_unknown_names_are_told(tmp_path: Path) -> None:
    more = {f"blk__0__ffn_{n}_exps__weight": np.zeros((2, 3, 4), np.float32) for n in "ab"}
    found = open_gguf(make(tmp_path / "a.gguf", tensors=llama_tensors(**more)))
    assert found.tensors["blk.0.ffn_a_exps.weight"].shape == (2, 3, 4)
    (warning,) = found.warnings
    assert "holds 'blk.0.ffn_a_exps.weight' and 1 more, which keep" in warning


def _without(key: str) -> dict[str, Any]:
    return {k: v for k, v in llama_values().items() if k != key}


@pytest.mark.parametrize(
    ("values", "tensors", "expect"),
    [
        (
            {},
            {"blk__0__ffn_up__weight": (np.zeros((2, 176), np.uint8), 13)},
            "tensor 'blk.0.ffn_up.weight' is Q5_K, which is not decoded; take a file of F32, F16, Q4_0",
        ),
        ({"general.type": ("string", "adapter")}, {}, "holds 'adapter', not a model"),
        ({"split.count": ("uint16", 3)}, {}, "is one of 3 parts; join them with llama-gguf-split"),
        ({"llama.block_count": ("int32", -1)}, {}, "'llama.block_count' is -1, not a whole number"),
        ({"llama.block_count": ("string", "2")}, {}, "'llama.block_count' is '2', not a whole"),
        ({"llama.attention.head_count": ("array", [4, 2])}, {}, "head_count' is [4, 2], not a"),
        ({"llama.attention.head_count": ("uint32", 3)}, {}, "is not rows of 3 heads"),
        ({"llama.attention.head_count": ("uint32", 32)}, {}, "is not rows of 32 heads"),
        ({"llama.rope.freq_base": ("float32", math.inf)}, {}, "freq_base' is inf, not a positive"),
        (
            {},
            {"blk__1__attn_q__weight": np.zeros((2, 8, 4), np.float32)},
            "is [2, 8, 4], which is not",
        ),
        (
            {},
            {"model__norm__weight": np.zeros(3, np.float32)},
            "'model.norm.weight' under two names",
        ),
        ({}, {"rope_freqs__weight": np.zeros(3, np.float16)}, "F16 of 6 bytes; float32 of at most"),
        ({}, {"rope_freqs__weight": np.zeros(9999, np.float32)}, "F32 of 39996 bytes"),
        ({}, {"token_embd__weight": np.zeros(9, np.float32)}, "has no matrix token_embd.weight"),
    ],
)
def test_open_refuses(tmp_path: Path, values: Any, tensors: Any, expect: str) -> None:
    path = make(tmp_path / "a.gguf", llama_values(**values), llama_tensors(**tensors))
    with pytest.raises(CheckpointError) as caught:
        open_gguf(path)
    assert expect in str(caught.value) and str(path) in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("key", [k for k in llama_values() if not k.endswith("head_count_kv")])
def test_missing_values_are_named(tmp_path: Path, key: str) -> None:
    path = make(tmp_path / "a.gguf", _without(key))
    with pytest.raises(CheckpointError, match=f"key '{key}' is missing"):
        open_gguf(path)


def test_a_number_per_layer_is_taken_where_all_are_equal(tmp_path: Path) -> None:
    values = llama_values(**{"llama.attention.head_count_kv": ("array", [2, 2])})
    config = open_gguf(make(tmp_path / "a.gguf", values)).config
    assert config is not None and config["num_key_value_heads"] == 2


def test_unknown_scaling_is_told(tmp_path: Path) -> None:
    values = llama_values(**{"llama.rope.scaling.type": ("string", "longrope")})
    (warning,) = open_gguf(make(tmp_path / "a.gguf", values)).warnings
    assert "scales rotary embeddings by 'longrope', which config.json cannot say" in warning


def test_which_file_a_path_means(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no \.gguf files; give the path of one"):
        find_gguf(tmp_path)
    (tmp_path / "a.gguf").touch()
    (tmp_path / "._b.gguf").touch()
    assert find_gguf(tmp_path) == find_gguf(tmp_path / "a.gguf") == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").touch()
    with pytest.raises(CheckpointError, match=r"holds 2 \.gguf files: 'a\.gguf, b\.gguf'; give"):
        find_gguf(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_gguf(tmp_path / "none")


_KEYS = [*llama_values(), "llama.rope.freq_base", "llama.rope.scaling.type", "general.type"]
_KEYS += ["general.architecture", "tokenizer.ggml.bos_token_id", "split.count"]
_KEYS += ["llama.rope.scaling.factor", "llama.rope.dimension_count"]
_VALUES = st.one_of(
    st.builds(GgufValue, st.just(ValueType.I64), st.integers(-2, 5) | st.just(2**62)),
    st.builds(GgufValue, st.just(ValueType.F64), st.floats()),
    st.builds(GgufValue, st.just(ValueType.BOOL), st.booleans()),
    st.builds(
        GgufValue, st.just(ValueType.STRING), st.sampled_from(["", "yarn", "llama", "model"])
    ),
    st.builds(
        GgufValue,
        st.just(ValueType.ARRAY),
        st.lists(st.integers(0, 4), max_size=3),
        st.just(ValueType.U32),
    ),
)


@settings(
    deadline=2000,
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.dictionaries(st.sampled_from(_KEYS), _VALUES, max_size=4), st.booleans())
@example({"llama.attention.layer_norm_rms_epsilon": GgufValue(ValueType.F64, 3.4025e38)}, False)
@example({"llama.attention.layer_norm_rms_epsilon": GgufValue(ValueType.F64, 1e300)}, False)
def test_no_metadata_does_anything_but_raise(
    tmp_path: Path, values: dict[str, GgufValue], factors: bool
) -> None:
    path = tmp_path / "a.gguf"
    more = {"rope_freqs__weight": np.array([1, 2, 0, 8], np.float32)} if factors else {}
    source = read_gguf(make(path, tensors=llama_tensors(**more)))
    tensors = [(t.name, t.type, t.shape) for t in source.tensors.values()]
    header, _, size = lay_out_gguf(source.metadata | values, tensors, "a.gguf")
    path.write_bytes(header + bytes(size - len(header)))
    try:
        open_gguf(path)
    except CheckpointError as error:
        assert str(error).isprintable()


# ---- what each tensor becomes -------------------------------------------------------------------

CONFIG = {
    "model_type": "llama",
    "hidden_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "torch_dtype": "bfloat16",
}
Q, K = (f"model.layers.0.self_attn.{x}_proj.weight" for x in "qk")
UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("what", "cols", "becomes"),
    [
        (Format.Q4_K, 512, Format.Q4_K),
        (Format.Q4_K, 96, Format.Q8_0),
        (Format.Q4_K, 48, DType.F16),
        (Format.Q6_K, 96, Format.Q8_0),
        (Format.GGUF_NVFP4, 64, Format.GGUF_NVFP4),
        (Format.GGUF_NVFP4, 96, Format.Q8_0),
        (Format.GGUF_MXFP4, 96, Format.GGUF_MXFP4),
        (Format.Q4_0, 48, DType.F16),
        (Format.Q4_1, 96, Format.Q4_1),
        (DType.BF16, 7, DType.BF16),
        (DType.F32, 7, DType.F32),
    ],
    ids=str,
)
def test_rows_that_are_not_blocks_fall_back(what: Any, cols: int, becomes: Any) -> None:
    target = gguf_targets(CONFIG, {UP: (8, cols)}, what)[UP]
    assert target.name == "blk.0.ffn_up.weight" and target.coding.rotary == 0
    if isinstance(becomes, DType):
        assert target.coding == Coding(Format.DENSE, becomes)
        assert TYPE(target.type).name == becomes.safetensors
    else:
        assert target.coding == Coding(becomes, DType.BF16)  # rounded to the config's type first
        assert TYPE(target.type).name == becomes.name.removeprefix("GGUF_")


def test_what_stays_in_more_bits() -> None:
    shapes = {EMBED: (50, 96), HEAD: (50, 96), NORM: (96,), Q: (96, 96), K: (48, 96)}
    found = gguf_targets(CONFIG, shapes, Format.Q4_0)
    assert list(found) == list(shapes)
    formats = {n: t.coding.format for n, t in found.items()}
    assert formats == {
        EMBED: Format.Q8_0,
        HEAD: Format.Q8_0,
        NORM: Format.DENSE,
        Q: Format.Q4_0,
        K: Format.Q4_0,
    }
    assert found[NORM].coding.dtype is DType.F32
    assert found[Q].coding.rotary == found[K].coding.rotary == 24
    found = gguf_targets(
        CONFIG, shapes, Format.Q4_0, dtype=DType.F16, embedding=Format.Q4_1, head=DType.F16
    )
    assert found[EMBED].coding == Coding(Format.Q4_1, DType.F16)
    assert found[HEAD].coding == Coding(Format.DENSE, DType.F16)
    found = gguf_targets(CONFIG, {EMBED: (50, 96)}, DType.F16)
    assert found[EMBED].coding == Coding(Format.DENSE, DType.F16)


def test_what_is_left_out() -> None:
    inverse = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tied = {**CONFIG, "tie_word_embeddings": True}
    shapes = {EMBED: (50, 96), HEAD: (50, 96), inverse: (12,)}
    assert set(gguf_targets(tied, shapes, Format.Q8_0)) == {EMBED}
    assert set(gguf_targets(CONFIG, shapes, Format.Q8_0)) == {EMBED, HEAD}


def test_biases_of_q_and_k_change_places_with_their_rows() -> None:
    bias = Q.replace("weight", "bias")
    assert gguf_targets(CONFIG, {bias: (96,)}, Format.Q4_0)[bias].coding.rotary == 24
    qwen = {**CONFIG, "model_type": "qwen2"}
    assert gguf_targets(qwen, {bias: (96,), Q: (96, 96)}, Format.Q4_0)[bias].coding.rotary == 0


@pytest.mark.parametrize(
    ("config", "shapes", "expect"),
    [
        (
            {**CONFIG, "model_type": "gemma2"},
            {},
            "models of type 'gemma2' cannot be written as GGUF",
        ),
        ({}, {}, "models of type None cannot"),
        ({**CONFIG, "model_type": ["llama"]}, {}, "cannot be written as GGUF"),
        (
            CONFIG,
            {"model.layers.0.mlp.gate.weight": (1, 32)},
            "'model.layers.0.mlp.gate.weight' has",
        ),
        (CONFIG, {Q: (95, 96)}, "is [95, 96], but config.json says 4 heads of 24 rows"),
        ({"model_type": "llama"}, {Q: (96, 96)}, "config.json has no num_attention_heads"),
        (
            {**CONFIG, "num_attention_heads": "x"},
            {Q: (96, 96)},
            "a value that a GGUF file cannot take",
        ),
        (
            {**CONFIG, "num_attention_heads": 0},
            {Q: (96, 96)},
            "a value that a GGUF file cannot take",
        ),
    ],
)
def test_targets_refuse(config: Any, shapes: Any, expect: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        gguf_targets(config, shapes, Format.Q4_0)
    assert expect in str(caught.value)


def test_metadata_needs_numbers_of_config() -> None:
    with pytest.raises(CheckpointError, match=r"config\.json has no intermediate_size"):
        gguf_metadata(CONFIG, Format.Q4_0, {})
    config = tiny_model("llama").config.to_dict()
    with pytest.raises(CheckpointError, match="a value that a GGUF file cannot take"):
        gguf_metadata({**config, "rope_parameters": 3}, Format.Q4_0, {})
    with pytest.raises(CheckpointError, match="cannot take: 'heads of 10000000000'"):
        gguf_constants({**config, "rope_parameters": LLAMA3_ROPE, "head_dim": 10**10})
    rope = {"rope_type": "dynamic", "factor": 2.0}
    _, (warning,) = gguf_metadata({**config, "rope_parameters": rope}, Format.Q4_0, {})
    assert "scales rotary embeddings by 'dynamic', which a GGUF file cannot say" in warning


_JUNK = (
    st.none()
    | st.integers(-3, 9)
    | st.floats()
    | st.text(max_size=3)
    | st.lists(st.integers(), max_size=2)
)
_JUNK |= st.dictionaries(st.sampled_from(["rope_type", "rope_theta", "factor"]), _JUNK, max_size=3)
_CONFIG_KEYS = [
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
]
_CONFIG_KEYS += ["rope_parameters", "rope_scaling", "rope_theta", "rms_norm_eps", "model_type"]
_CONFIG_KEYS += ["torch_dtype", "tie_word_embeddings"]
_GOOD_CONFIG = {**CONFIG, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 50}
_GOOD_CONFIG |= {"max_position_embeddings": 64}


@settings(deadline=2000, max_examples=300)
@given(st.dictionaries(st.sampled_from(_CONFIG_KEYS), _JUNK, max_size=4))
def test_no_config_does_anything_but_raise(changes: dict[str, Any]) -> None:
    config = {**_GOOD_CONFIG, **changes}
    shapes = {EMBED: (50, 96), Q: (96, 96), NORM: (96,)}
    try:
        targets = gguf_targets(config, shapes, Format.Q4_0)
        metadata, _ = gguf_metadata(config, Format.Q4_0, {})
        gguf_layout(metadata, targets, shapes, gguf_constants(config))
    except CheckpointError as error:
        assert str(error).isprintable()


def test_yarn_comes_back(tmp_path: Path) -> None:
    rope = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16.0,
        "rope_theta": 10000.0,
    }
    model = tiny_model("qwen2", rope_parameters=rope)
    found = open_gguf(save_model(tmp_path / "model.gguf", DType.F32, model))
    assert found.config is not None
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
    assert scaling.items() <= found.config["rope_scaling"].items()


# ---- GGUF to GGUF -------------------------------------------------------------------------------


def test_metadata_of_a_gguf_source_is_kept(tmp_path: Path) -> None:
    values = llama_values(
        **{
            "general.name": ("string", "original"),
            "general.license": ("string", "apache-2.0"),
            "general.file_type": ("uint32", 7),
            "split.count": ("uint16", 1),
            "llama.rope.freq_base": ("float32", 1000.0),
            "llama.unknown_key": ("uint32", 5),
            "tokenizer.ggml.tokens": ("array", ["a", "b"]),
        }
    )
    path = tmp_path / "a.gguf"
    write_by_package(path, "llama", values, llama_tensors(), alignment=64)
    source, found = read_gguf(path), open_gguf(path)
    assert found.config is not None
    config = {**found.config, "num_hidden_layers": 9}
    metadata, warnings = copied_metadata(source, config, Format.Q4_0)
    assert warnings == [] and "general.alignment" not in metadata and "split.count" not in metadata
    plain = {key: value.value for key, value in metadata.items()}
    assert plain["general.license"] == "apache-2.0" and plain["general.name"] == "original"
    assert plain["general.file_type"] == 2 and plain["llama.block_count"] == 9
    assert plain["llama.rope.freq_base"] == 1000.0 and plain["llama.unknown_key"] == 5
    assert metadata["tokenizer.ggml.tokens"] == source.metadata["tokenizer.ggml.tokens"]
    named, _ = copied_metadata(source, config, Format.Q4_0, name="merged")
    assert named["general.name"].value == "merged"


def test_unknown_architecture_is_written_under_its_own_names(tmp_path: Path) -> None:
    path = make(tmp_path / "a.gguf", architecture="mamba")
    source, found = read_gguf(path), open_gguf(path)
    shapes = {n: t.shape for n, t in found.tensors.items()}
    targets = gguf_targets(None, shapes, DType.F32)
    assert all(t.name == hf and t.coding.rotary == 0 for hf, t in targets.items())
    metadata, _ = copied_metadata(source, None, DType.F32)
    layout = gguf_layout(metadata, targets, shapes, file_name="out.gguf")
    out = tmp_path / "out.gguf"
    out.write_bytes(layout.header + bytes(layout.size - len(layout.header)))
    assert layout.file_name == "out.gguf"
    assert set(read_gguf(out).tensors) == set(source.tensors)
    assert read_gguf(out).get("general.architecture") == "mamba"
