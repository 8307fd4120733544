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
from fastmerge.coding import GGUF_BLOCKS, Format, parts_of  # noqa: E402
from fastmerge.dtypes import DType  # noqa: E402
from fastmerge.errors import CheckpointError  # noqa: E402
from fastmerge.quant.gguf import open_gguf  # noqa: E402
from fastmerge.quant.gguf_config import llama3_factors, text, u32  # noqa: E402
from fastmerge.quant.gguf_names import CODED_TYPES, DENSE_TYPES, gguf_name, hf_name  # noqa: E402
from fastmerge.quant.gguf_writer import (  # noqa: E402
    gguf_constants,
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
