"""GGUF files in and out, against the package gguf and transformers."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import write_by_package
from hypothesis import given, settings
from hypothesis import strategies as st

gguf = pytest.importorskip(
    "gguf", reason="the package gguf (extra fastmerge[gguf]) is the oracle here"
)
transformers = pytest.importorskip(
    "transformers", reason="transformers (extra demo) is the oracle here"
)

from gguf_models import LLAMA3_ROPE, logits, plan, save_model, tensors_of, tiny_model  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from fastmerge.checkpoint.coded import CodedInfo  # noqa: E402
from fastmerge.checkpoint.folder import Checkpoint  # noqa: E402
from fastmerge.checkpoint.gguf import (  # noqa: E402
    BLOCK_TYPES,
    GgufValue,
    ValueType,
    lay_out_gguf,
    read_gguf,
)
from fastmerge.coding import GGUF_BLOCKS, Coding, Format, parts_of  # noqa: E402
from fastmerge.dtypes import DType  # noqa: E402
from fastmerge.errors import CheckpointError  # noqa: E402
from fastmerge.quant.gguf import find_gguf, open_gguf  # noqa: E402
from fastmerge.quant.gguf_config import llama3_factors, text, u32  # noqa: E402
from fastmerge.quant.gguf_names import CODED_TYPES, DENSE_TYPES, gguf_name, hf_name  # noqa: E402
from fastmerge.quant.gguf_writer import (  # noqa: E402
    copied_metadata,
    gguf_constants,
    gguf_layout,
    gguf_metadata,
    gguf_targets,
)

TYPE = gguf.GGMLQuantizationType

# ---- the container ------------------------------------------------------------------------------


def test_types_are_the_packages() -> None:
    assert {n: (t.elements, t.n_bytes) for n, t in BLOCK_TYPES.items()} == {
        int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()
    }
    assert all(TYPE(number).name == t.name for number, t in BLOCK_TYPES.items())
    assert {int(t) for t in gguf.GGUFValueType} == {int(t) for t in ValueType}
    for number, what in CODED_TYPES.items():
        assert GGUF_BLOCKS[what] == gguf.GGML_QUANT_SIZES[TYPE(number)]
    assert {d.safetensors: TYPE(n).name for n, d in DENSE_TYPES.items()} == {
        d.safetensors: d.safetensors for d in DENSE_TYPES.values()
    }


VALUES: dict[str, tuple[str, Any]] = {
    "v.u8": ("uint8", 200),
    "v.i8": ("int8", -100),
    "v.u16": ("uint16", 60000),
    "v.i16": ("int16", -30000),
    "v.u32": ("uint32", 4000000000),
    "v.i32": ("int32", -2000000000),
    "v.f32": ("float32", 0.1),
    "v.bool": ("bool", True),
    "v.string": ("string", "naïve\n\t€"),
    "v.u64": ("uint64", 2**64 - 1),
    "v.i64": ("int64", -(2**63)),
    "v.f64": ("float64", math.pi),
    "v.strings": ("array", ["a", "", "b" * 5000]),
    "v.ints": ("array", [1, -2, 3]),
    "v.floats": ("array", [0.5, -1.25]),
    "v.bools": ("array", [True, False]),
}


def random_tensors(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "norm": rng.standard_normal(5).astype(np.float32),
        "matrix": rng.standard_normal((3, 7)).astype(np.float16),
        "cube": rng.standard_normal((2, 3, 4)).astype(np.float32),
        "blocks": (rng.integers(0, 256, (6, 2 * 34), np.uint8), 8),
        "super": (rng.integers(0, 256, (2, 144), np.uint8), 12),
        "ints": rng.integers(0, 9, 3).astype(np.int32),
    }


@pytest.mark.parametrize("alignment", [None, 8, 64, 4096])
def test_reads_what_the_package_writes(tmp_path: Path, alignment: int | None) -> None:
    path = tmp_path / "x.gguf"
    write_by_package(path, "toy", VALUES, random_tensors(), alignment)
    found, wanted = read_gguf(path), gguf.GGUFReader(path)
    assert found.alignment == wanted.alignment == (alignment or 32)
    _check_same(found, wanted)
    for name, (_, value) in VALUES.items():
        assert found.get(name) == (pytest.approx(0.1) if name == "v.f32" else value)
    assert found.tensors["blocks"].shape == (6, 64) and found.tensors["super"].shape == (2, 256)


def _check_same(found: Any, wanted: Any) -> None:
    """Everything our reader says is what the package's says."""
    fields = {k: f for k, f in wanted.fields.items() if not k.startswith("GGUF.")}
    assert list(found.metadata) == list(fields)
    for key, field in fields.items():
        value = found.metadata[key]
        types = [value.type] if value.of is None else [value.type, value.of]
        if value.of is None or value.value:
            assert types == [int(t) for t in field.types], key
        assert value.value == field.contents(), key
    assert len(found.tensors) == len(wanted.tensors)
    for tensor in wanted.tensors:
        mine = found.tensors[tensor.name]
        assert mine.shape == tuple(reversed([int(n) for n in tensor.shape]))
        assert (mine.type, mine.offset, mine.n_bytes) == (
            int(tensor.tensor_type),
            tensor.data_offset,
            tensor.n_bytes,
        )


_SCALARS = st.one_of(
    st.builds(GgufValue, st.just(ValueType.U32), st.integers(0, 2**32 - 1)),
    st.builds(GgufValue, st.just(ValueType.I64), st.integers(-(2**63), 2**63 - 1)),
    st.builds(GgufValue, st.just(ValueType.F32), st.floats(width=32, allow_nan=False)),
    st.builds(GgufValue, st.just(ValueType.BOOL), st.booleans()),
    st.builds(GgufValue, st.just(ValueType.STRING), st.text(max_size=20)),
)
_ARRAYS = st.one_of(
    st.builds(
        GgufValue,
        st.just(ValueType.ARRAY),
        st.lists(st.text(max_size=5)),
        st.just(ValueType.STRING),
    ),
    st.builds(
        GgufValue,
        st.just(ValueType.ARRAY),
        st.lists(st.integers(-128, 127)),
        st.just(ValueType.I8),
    ),
)
_NAMES = st.text("abcdefgh.0123_ü", min_size=1, max_size=30)
_SPECS = st.tuples(
    st.sampled_from(sorted(BLOCK_TYPES)), st.lists(st.integers(0, 4), max_size=3), st.integers(0, 3)
)


@given(
    st.dictionaries(_NAMES, _SCALARS | _ARRAYS, max_size=5),
    st.dictionaries(_NAMES, _SPECS, max_size=5),
    st.sampled_from([None, 1, 16, 256]),
)
@settings(deadline=None, max_examples=100)
def test_layout_is_what_readers_accept(
    tmp_path_factory: pytest.TempPathFactory,
    metadata: dict[str, GgufValue],
    specs: dict[str, tuple[int, list[int], int]],
    alignment: int | None,
) -> None:
    if alignment is not None:
        metadata = metadata | {"general.alignment": u32(alignment)}
    tensors = [
        (name, kind, (*shape, blocks * BLOCK_TYPES[kind].elements))
        for name, (kind, shape, blocks) in specs.items()
    ]
    header, places, size = lay_out_gguf(metadata, tensors, "x.gguf")
    path = tmp_path_factory.mktemp("layout") / "x.gguf"
    path.write_bytes(header + bytes(size - len(header)))
    found = read_gguf(path)
    assert found.metadata == metadata
    assert found.tensors == {p.name: p for p in places}
    assert [p.name for p in places] == list(specs)
    if all(value.of is None or value.value for value in metadata.values()):
        wanted = gguf.GGUFReader(path)  # which reads empty arrays wrongly
        _check_same(found, wanted)


def test_layout_is_byte_for_byte_the_packages(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_by_package(path, "toy", VALUES, random_tensors())
    found = read_gguf(path)
    tensors = [(t.name, t.type, t.shape) for t in found.tensors.values()]
    header, places, size = lay_out_gguf(found.metadata, tensors, "x.gguf")
    assert path.read_bytes()[: len(header)] == header
    assert path.stat().st_size == size and places == list(found.tensors.values())


@pytest.mark.parametrize(
    ("metadata", "tensors", "expect"),
    [
        ({}, [("a", 0, (1,)), ("a", 0, (1,))], "two tensors are named 'a'"),
        ({}, [("n" * 64, 0, (1,))], "63 bytes of name"),
        ({}, [("a", 0, (1,) * 5)], "4 dimensions"),
        ({}, [("a", 2, (31,))], "rows of 31 elements"),
        ({}, [("a\n", 0, (1,))], "control characters"),
        ({"k": u32(-1)}, [], "key 'k' is -1, which no U32 holds"),
        ({"k": GgufValue(ValueType.ARRAY, [1, 300], ValueType.U8)}, [], "no array of U8 holds"),
        ({"k": GgufValue(ValueType.F32, 1e39)}, [], "which no F32 holds"),
        ({"general.alignment": u32(24)}, [], "not a power of two"),
    ],
)
def test_layout_refuses(metadata: Any, tensors: Any, expect: str) -> None:
    with pytest.raises(CheckpointError, match=expect):
        lay_out_gguf(metadata, tensors, "x.gguf")


# ---- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["LLAMA", "QWEN2", "QWEN3"])
def test_names_are_the_packages(architecture: str) -> None:
    """All names that the package maps to one of ours, it maps as we do."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], 12)
    kinds = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
    model = tiny_model(kinds[architecture.lower()], num_hidden_layers=11)
    for hf in model.state_dict():
        stem, suffix = hf.rsplit(".", 1)
        assert gguf_name(hf) == f"{names.get_name(stem)}.{suffix}"
        assert hf_name(gguf_name(hf) or "") == hf


@pytest.mark.parametrize(
    "name", ["blk.0.attn_qkv.weight", "token_embd", "blk.x.attn_q.weight", "rope_freqs.weight", ""]
)
def test_unknown_gguf_names(name: str) -> None:
    assert hf_name(name) is None


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.gate.weight", "lm_head", "transformer.h.0.ln.weight", "x.y.weight"]
)
def test_unknown_hf_names(name: str) -> None:
    assert gguf_name(name) is None


# ---- models -------------------------------------------------------------------------------------

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("llama", {"head_dim": 32}),
    "llama 3": ("llama", {"rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 65536}),
    "llama, linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}},
    ),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": ("qwen3", {"head_dim": 128, "tie_word_embeddings": True}),
}
#: What transformers' own reader of GGUF overlooks: that there are biases, and scaled rotary embeddings.
TRANSFORMERS_LACKS = ("llama, biases", "llama 3", "llama, linear")


def load_by_transformers(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


@pytest.mark.parametrize("what", [DType.F32, DType.F16, DType.BF16, Format.Q8_0], ids=str)
@pytest.mark.parametrize("name", [n for n in MODELS if n not in TRANSFORMERS_LACKS])
def test_transformers_computes_the_same(tmp_path: Path, name: str, what: Format | DType) -> None:
    kind, options = MODELS[name]
    model = tiny_model(kind, **options)
    path = save_model(tmp_path / "model.gguf", what, model)
    loaded = load_by_transformers(path)
    wanted, got = logits(model), logits(loaded)
    error = np.abs(got - wanted).max() / np.abs(wanted).max()
    assert error < {DType.F32: 1e-5, DType.F16: 5e-3, DType.BF16: 4e-2, Format.Q8_0: 6e-2}[what]


def dense_copy(info: Any, raw: bytes) -> np.ndarray:
    """Decode one tensor of an opened file by the package's decoder, rows in their original order."""
    stored = info.parts["codes"] if isinstance(info, CodedInfo) else info
    data = np.frombuffer(raw, np.uint8, stored.n_bytes, stored.offset)
    if stored.dtype is not DType.U8:
        element = {DType.F32: np.float32, DType.F16: np.float16}[stored.dtype]
        values = data.view(element).astype(np.float32).reshape(info.shape)
    else:
        number = next(n for n, f in CODED_TYPES.items() if f is info.coding.format)
        rows = data.reshape(info.shape[0], -1)
        values = gguf.dequantize(rows, TYPE(number)).reshape(info.shape)
    rotary = info.coding.rotary if isinstance(info, CodedInfo) else 0
    if rotary:
        heads = values.reshape(-1, rotary // 2, 2, *info.shape[1:])
        values = heads.swapaxes(1, 2).reshape(info.shape)
    return values


def as_folder(found: Checkpoint, folder: Path) -> None:
    """Write a dense copy of an opened file as a model folder, with the config.json it was given."""
    raw = found.weight_files[0].read_bytes()
    tensors = {n: torch.from_numpy(dense_copy(t, raw).copy()) for n, t in found.tensors.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**(found.config or {}), "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("what", [DType.F32, DType.F16, Format.Q8_0, Format.Q4_0], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_opened_file_is_the_model(tmp_path: Path, name: str, what: Format | DType) -> None:
    kind, options = MODELS[name]
    model = tiny_model(kind, **options)
    path = save_model(tmp_path / "model.gguf", what, model)
    found = open_gguf(path)
    assert found.warnings == ()
    wanted = tensors_of(model)
    assert {n: t.shape for n, t in found.tensors.items()} == {n: t.shape for n, t in wanted.items()}
    raw = path.read_bytes()
    for tensor, info in found.tensors.items():
        assert info.name == tensor
        # Half a step of 4 bits: what is in the wrong place is off by the size of the values.
        size = {DType.F32: 0.0, DType.F16: 1e-3, Format.Q8_0: 1e-2, Format.Q4_0: 0.13}[what]
        tolerance = size * np.abs(wanted[tensor]).max()
        assert np.abs(dense_copy(info, raw) - wanted[tensor]).max() <= tolerance
    as_folder(found, tmp_path / "folder")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    got = logits(loaded)
    if what is DType.F32:
        np.testing.assert_allclose(got, logits(model), rtol=0, atol=1e-5)
    config, original = loaded.config.to_dict(), model.config.to_dict()
    same = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    same += ["num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "vocab_size"]
    same += ["tie_word_embeddings"]
    assert {k: config[k] for k in same} == {k: original[k] for k in same}
    rope = {k: v for k, v in original["rope_parameters"].items() if v is not None}
    assert {k: config["rope_parameters"][k] for k in rope} == rope


@pytest.mark.parametrize("what", [DType.F32, Format.Q4_K], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_header_is_what_the_package_reads(tmp_path: Path, name: str, what: Format | DType) -> None:
    kind, options = MODELS[name]
    model = tiny_model(kind, **options)
    targets, layout = plan(model, what, {"tokenizer.ggml.model": text("none")})
    path = tmp_path / "model.gguf"
    path.write_bytes(layout.header + bytes(layout.size - len(layout.header)))
    reader = gguf.GGUFReader(path)
    _check_same(read_gguf(path), reader)
    tensors = {t.name: t for t in reader.tensors}
    for hf, target in targets.items():
        tensor, info = tensors.pop(target.name), layout.tensors[target.name]
        assert tensor.tensor_type == target.type
        assert (tensor.data_offset, tensor.n_bytes) == (info.offset, info.n_bytes)
        shape = tensors_of(model)[hf].shape
        rows, cols = (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (shape[0], 1)
        (codes,) = parts_of(target.coding, rows, cols)
        assert info.dtype is codes.dtype and info.n_bytes == codes.n_bytes
    assert list(tensors) == (["rope_freqs.weight"] if name == "llama 3" else [])
    assert min(t.offset for t in layout.tensors.values()) == len(layout.header)
    architecture = "llama" if kind == "mistral" else kind
    assert reader.get_field("general.architecture").contents() == architecture
    assert reader.get_field("general.name").contents() == "tiny"
    assert reader.get_field("general.file_type").contents() == {DType.F32: 0}.get(what, 14)
    assert reader.get_field("general.quantization_version").contents() == 2
    assert reader.get_field(f"{architecture}.attention.head_count_kv").contents() == 2


def test_llama3_factors_are_transformers() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = tiny_model("llama", head_dim=128, rope_parameters=LLAMA3_ROPE).config
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / 10000.0 ** (torch.arange(0, 128, 2).double() / 128)
    wanted = plain / scaled.double()
    got = torch.tensor(llama3_factors(LLAMA3_ROPE, 10000.0, 128), dtype=torch.float64)
    assert got.min() == 1.0 and got.max() == 8.0 and len(got.unique()) > 10
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0.0)
    (constant,) = gguf_constants(config.to_dict())
    stored = np.frombuffer(constant.content or b"", np.float32)
    np.testing.assert_array_equal(stored, got.numpy().astype(np.float32))


def test_other_rotary_factors_are_told(tmp_path: Path) -> None:
    model = tiny_model("llama", rope_parameters=LLAMA3_ROPE)
    path = save_model(tmp_path / "model.gguf", DType.F32, model)
    place = read_gguf(path).tensors["rope_freqs.weight"]
    raw = bytearray(path.read_bytes())
    raw[place.offset : place.offset + 4] = struct.pack("<f", 3.0)
    path.write_bytes(raw)
    found = open_gguf(path)
    assert found.config is not None and "rope_scaling" not in found.config
    (warning,) = found.warnings
    assert "rotary factors that are not Llama 3's" in warning


# ---- opening ------------------------------------------------------------------------------------


def llama_values(**more: Any) -> dict[str, tuple[str, Any]]:
    return {
        "llama.block_count": ("uint32", 1),
        "llama.context_length": ("uint32", 64),
        "llama.embedding_length": ("uint32", 32),
        "llama.feed_forward_length": ("uint32", 64),
        "llama.attention.head_count": ("uint32", 4),
        "llama.attention.head_count_kv": ("uint32", 2),
        "llama.attention.layer_norm_rms_epsilon": ("float32", 1e-6),
        **more,
    }


def llama_tensors(**more: Any) -> dict[str, Any]:
    """One layer's q of Q8_0 and k of float32, embeddings and a norm."""
    rng = np.random.default_rng(0)
    return {
        "token_embd.weight": rng.standard_normal((50, 32)).astype(np.float16),
        "output_norm.weight": np.ones(32, np.float32),
        "blk.0.attn_q.weight": (rng.integers(0, 256, (32, 34), np.uint8), 8),
        "blk.0.attn_k.weight": rng.standard_normal((16, 32)).astype(np.float32),
        **{name.replace("__", "."): value for name, value in more.items()},
    }


def make(path: Path, values: Any = None, tensors: Any = None, architecture: str = "llama") -> Path:
    write_by_package(path, architecture, values or llama_values(), tensors or llama_tensors())
    return path


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
