"""Quantised model folders: what is recognised in them and what is described as an output, against the libraries."""

from __future__ import annotations

import copy
import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage import read_shard, write_json, write_shard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quant_decoding import decode
from quant_folders import (
    FOLDERS,
    FP8,
    INT4,
    MODELOPT_NVFP4,
    gptq,
    linears,
    load,
    load_dequantised,
    modelopt_nvfp4,
    write_by_hand,
    write_dense,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastmerge.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from fastmerge.checkpoint.coded import CodedInfo
from fastmerge.coding import Coding, Format, ScaleType, parts_of
from fastmerge.dtypes import DType
from fastmerge.errors import CheckpointError, RecipeError
from fastmerge.quant import FORMATS, output_format, recognise
from fastmerge.quant.bitsandbytes import dynamic_map, quant_map
from fastmerge.quant.format import Constant, Quantised, Scales

DOWN = "model.layers.1.mlp.down_proj"

#: Formats that a library writes here too, each as the folder of that name.
WRITTEN = [
    *("nf4", "fp4", "nf4-dq", "fp4-dq", "int4", "int4-g32", "int4-g64", "int4-channel"),
    *("int4-asym", "nvfp4", "mxfp4", "fp8", "fp8-tensor"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("quantised")
    write_dense(root / "dense")

    def get(name: str) -> Path:
        if not (root / name).exists():
            FOLDERS[name](root / "dense", root / name)
        return root / name

    return get


def opened(path: Path) -> Checkpoint:
    return recognise(open_checkpoint(path))


def coded(model: Checkpoint) -> dict[str, CodedInfo]:
    return {n: t for n, t in model.tensors.items() if isinstance(t, CodedInfo)}


# ---- inputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
def test_a_coded_weight_is_one_tensor_of_the_dense_models_shape(
    folders: Callable[[str], Path], name: str
) -> None:
    dense, stored = open_checkpoint(folders("dense")), open_checkpoint(folders(name))
    model = recognise(stored)
    assert {n: t.shape for n, t in model.tensors.items()} == {
        n: t.shape for n, t in dense.tensors.items()
    }
    assert sorted(coded(model)) == sorted(linears(dense.tensors))
    for n, tensor in model.tensors.items():
        assert tensor.name == n and tensor.dtype is DType.BF16
    for info in coded(model).values():
        specs = parts_of(info.coding, *info.shape)
        assert [(p.dtype, p.shape) for s, p in info.parts.items() if s != "group_of"] == [
            (s.dtype, s.shape) for s in specs
        ]
        assert all(p.n_bytes == stored.tensors[p.name].n_bytes for p in info.parts.values())
    # What is neither kept nor a part is named with a reason, and order is that of the files.
    parts = {p.name for info in coded(model).values() for p in info.stored}
    kept = {n for n in model.tensors if n not in coded(model)}
    assert parts | kept | set(model.dropped) == set(stored.tensors)
    assert not (parts | kept) & set(model.dropped) and all(model.dropped.values())
    codes = [t.parts["codes"].name if n in coded(model) else n for n, t in _items(model)]
    assert codes == [n for n in stored.tensors if n in set(codes)]


def _items(model: Checkpoint) -> list[tuple[str, Any]]:
    return list(model.tensors.items())


@pytest.mark.parametrize("name", FOLDERS)
def test_configuration_of_a_recognised_model_is_dense(
    folders: Callable[[str], Path], name: str
) -> None:
    stored = open_checkpoint(folders(name))
    before = copy.deepcopy(stored.config)
    model = recognise(stored)
    assert model.config is not None and "quantization_config" not in model.config
    assert stored.config == before  # a copy was changed
    assert before is not None
    assert model.config == {k: v for k, v in before.items() if k != "quantization_config"}


def test_checkpoint_without_quantisation_is_unchanged(folders: Callable[[str], Path]) -> None:
    stored = open_checkpoint(folders("dense"))
    assert recognise(stored) is stored


@pytest.mark.parametrize(
    "name", [n for n in FOLDERS if n in WRITTEN or n.startswith(("nf4", "int8", "ct"))]
)
def test_parts_decode_to_what_the_library_decodes(
    folders: Callable[[str], Path], name: str
) -> None:
    path = folders(name)
    tensors = load_file(path / "model.safetensors")
    want = load_dequantised(path).state_dict()
    for n, info in coded(opened(path)).items():
        table = tensors.get(f"{n}.quant_map")
        got = torch.from_numpy(decode(info, None if table is None else table.numpy()))
        if name in (
            "nvfp4",
            "int8",
        ):  # the library rounds scales to bfloat16 first, or multiplies by 1 / 127
            torch.testing.assert_close(got, want[n].float(), rtol=2**-6, atol=0)
        else:
            assert torch.equal(got.bfloat16(), want[n].bfloat16()), n


@pytest.mark.parametrize("name", ["gptq", "gptq v2", "gptq act-order", "awq"])
def test_integer_codes_of_columns(folders: Callable[[str], Path], name: str) -> None:
    path = folders(name)
    tensors = load_file(path / "model.safetensors")
    info = coded(opened(path))[f"{DOWN}.weight"]
    got = decode(info)
    rows, cols = info.shape
    assert ("group_of" in info.parts) == (name == "gptq act-order")
    codes, zeros, scales = (tensors[f"{DOWN}.{w}"] for w in ("qweight", "qzeros", "scales"))
    nibble = [0, 4, 1, 5, 2, 6, 3, 7]
    for r, c in np.random.default_rng(1).integers(0, (rows, cols), (200, 2)):
        if name == "awq":
            g, at = c // 64, 4 * nibble[r % 8]
            q = int(codes[c, r // 8]) >> at & 15
            z = int(zeros[g, r // 8]) >> at & 15
        else:
            g = int(tensors[f"{DOWN}.g_idx"][c])
            q = int(codes[c // 8, r]) >> 4 * (c % 8) & 15
            z = (int(zeros[g, r // 8]) >> 4 * (r % 8) & 15) + (name != "gptq v2")
        assert got[r, c] == (q - z) * float(scales[g, r])


@pytest.mark.parametrize("name", ["fp8 block", "fp8 exponents", "fbgemm", "modelopt fp8"])
def test_fp8_is_multiplied_by_its_scale(folders: Callable[[str], Path], name: str) -> None:
    path = folders(name)
    tensors = load_file(path / "model.safetensors")
    info = coded(opened(path))[f"{DOWN}.weight"]
    w = tensors[f"{DOWN}.weight"].float()
    if name.startswith("fp8"):
        scale = tensors[f"{DOWN}.weight_scale_inv"].float()
        rows = torch.arange(w.shape[0]) // 96
        scale = scale[rows][:, torch.arange(w.shape[1]) // 48]
        assert info.coding.scale is (ScaleType.E8M0 if "exponents" in name else ScaleType.F32)
    else:
        scale = tensors[f"{DOWN}.weight_scale"].float()
    assert torch.equal(torch.from_numpy(decode(info)), w * scale)
    assert not any("scale" in n for n in opened(path).tensors)


def test_scale_of_a_modelopt_tensor_is_a_factor(folders: Callable[[str], Path]) -> None:
    path = folders("modelopt nvfp4")
    tensors = load_file(path / "model.safetensors")
    for name, info in coded(opened(path)).items():
        module = name.removesuffix(".weight")
        factor = tensors[f"{module}.weight_scale_2"]
        assert info.coding.other_rule and np.float32(info.tensor_scale) == factor.item()
        # Each product as float32 has it; with the reciprocal as a divisor some would be off.
        scale = tensors[f"{module}.weight_scale"].float() * factor
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        packed = tensors[f"{module}.weight"].int()
        code = torch.stack([packed & 15, packed >> 4], -1).flatten(1)
        want = torch.where(code >= 8, -values[code % 8], values[code % 8])
        want = want * scale.repeat_interleave(16, 1)
        assert torch.equal(torch.from_numpy(decode(info)), want)


def test_scales_of_nested_blocks_are_read(folders: Callable[[str], Path]) -> None:
    path = folders("nf4-dq")
    info = coded(opened(path))[f"{DOWN}.weight"]
    with safe_open(path / "model.safetensors", "pt") as f:
        text = f.get_tensor(f"{DOWN}.weight.quant_state.bitsandbytes__nf4").numpy().tobytes()
    assert info.nested_offset == json.loads(text)["nested_offset"] != 0
    assert info.coding.nested and set(info.parts) == {"codes", "scales", "nested"}


def test_tables_are_the_librarys() -> None:
    from bitsandbytes import functional

    for kind in ("nf4", "fp4"):
        library = functional.get_4bit_type(kind, device="cpu").numpy()
        assert quant_map(kind).tobytes() == library.tobytes()
    assert dynamic_map().tobytes() == functional.create_dynamic_map().numpy().tobytes()


def test_biases_and_other_modules_below_are_kept(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    def code(
        module: str, shape: tuple[int, int], rng: np.random.Generator
    ) -> dict[str, torch.Tensor]:
        extra = {
            "bias": torch.zeros(shape[0]),
            "mystery": torch.ones(3),
            "lora_A.weight": torch.ones(2, 2),
        }
        return gptq(module, shape, rng) | {f"{module}.{k}": v.bfloat16() for k, v in extra.items()}

    config = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    write_by_hand(folders("dense"), tmp_path / "m", code, config)
    model = opened(tmp_path / "m")
    assert f"{DOWN}.bias" in model.tensors and f"{DOWN}.lora_A.weight" in model.tensors
    assert model.dropped[f"{DOWN}.mystery"] == "unknown to gptq"


def test_scales_of_caches_are_dropped(folders: Callable[[str], Path], tmp_path: Path) -> None:
    def code(
        module: str, shape: tuple[int, int], rng: np.random.Generator
    ) -> dict[str, torch.Tensor]:
        scale = {f"{module.rpartition('.')[0]}.k_scale": torch.tensor(1.0)}
        return modelopt_nvfp4(module, shape, rng) | scale

    write_by_hand(folders("dense"), tmp_path / "m", code, MODELOPT_NVFP4)
    assert opened(tmp_path / "m").dropped["model.layers.0.self_attn.k_scale"] == (
        "scale of the key-value cache"
    )


def test_type_of_the_model_where_config_does_not_say(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    path = _copy(folders("fp8 block"), tmp_path)
    config = json.loads((path / "config.json").read_text())
    config.pop("dtype", None)
    config["text_config"] = {"torch_dtype": "float16"}
    write_json(path / "config.json", config)
    assert coded(opened(path))[f"{DOWN}.weight"].dtype is DType.F16
    del config["text_config"]
    write_json(path / "config.json", config)
    assert coded(opened(path))[f"{DOWN}.weight"].dtype is DType.BF16  # of the embedding


# ---- damaged inputs -----------------------------------------------------------------------------

#: Tensors that may be missing.
OPTIONAL = ("g_idx", "weight_format", "activation_scale", "input_scale", "input_scale_ub")
DAMAGED = [
    *("nf4", "nf4-dq", "int8", "int4", "int4-asym", "nvfp4", "mxfp4", "fp8", "fp8-tensor"),
    *("gptq", "gptq act-order", "awq", "fp8 block", "fp8 exponents", "fbgemm"),
    *("modelopt fp8", "modelopt nvfp4"),
]
Entry = tuple[str, list[int], bytes]


def _copy(path: Path, to: Path) -> Path:
    to = to / "damaged"
    to.mkdir(exist_ok=True)
    for file in path.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def _entries(path: Path) -> dict[str, Entry]:
    header, data = read_shard(path / "model.safetensors")
    header.pop("__metadata__", None)
    return {n: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])]) for n, e in header.items()}


def _write(path: Path, entries: dict[str, Entry]) -> None:
    header, data = {}, b""
    for name, (dtype, shape, content) in entries.items():
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += content
    write_shard(path / "model.safetensors", header, data)


def _damaged(entries: dict[str, Entry], name: str, damage: str) -> dict[str, Entry]:
    dtype, shape, content = entries[name]
    size = len(content) // max(int(np.prod(shape)), 1)
    if damage == "drop":
        return {n: e for n, e in entries.items() if n != name}
    if damage == "rename":
        return {(n + "x" if n == name else n): e for n, e in entries.items()}
    if damage == "retype":
        changed = ({1: "BOOL", 2: "U16", 4: "U32", 8: "U64"}[size], shape, content)
    elif damage == "truncate":
        less = [*shape[:-1], shape[-1] - 1] if shape else [0]
        changed = (dtype, less, content[: int(np.prod(less)) * size])
    else:  # one more row
        more = [shape[0] + 1, *shape[1:]] if shape else [2]
        changed = (dtype, more, content.ljust(int(np.prod(more)) * size, b"\0"))
    return entries | {name: changed}


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_part_is_one_line_that_names_it(
    folders: Callable[[str], Path], tmp_path: Path, data: st.DataObject
) -> None:
    folder = folders(data.draw(st.sampled_from(DAMAGED), "folder"))
    model = opened(folder)
    parts = {p.name for info in coded(model).values() for p in info.stored}
    names = sorted(parts | set(model.dropped))
    name = data.draw(st.sampled_from([n for n in names if not n.endswith(OPTIONAL)]), "tensor")
    damage = data.draw(
        st.sampled_from(["drop", "rename", "retype", "truncate", "extend"]), "damage"
    )
    module = next(n for n in coded(model) if name.startswith(n.removesuffix("weight")))
    whole = coded(model)[module].coding.format in (Format.FP8, Format.INT8)
    if whole and name == module and damage in ("truncate", "extend"):
        return  # a matrix of another size, of which the scales say nothing: the merge compares shapes
    path = _copy(folder, tmp_path)
    _write(path, _damaged(_entries(folder), name, damage))
    with pytest.raises(CheckpointError) as caught:
        opened(path)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 1000
    # Codes of another size are right by themselves: then it is a part that fits no more.
    assert module.removesuffix("weight") in line and (name in line or damage != "retype")


@settings(
    deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_description_of_a_weight_is_one_line(
    folders: Callable[[str], Path], tmp_path: Path, data: st.DataObject
) -> None:
    folder = folders(data.draw(st.sampled_from(["nf4", "fp4", "nf4-dq"])))
    entries = _entries(folder)
    name = next(n for n in entries if n.startswith(DOWN) and ".quant_state." in n)
    dtype, _, text = entries[name]
    how = data.draw(st.sampled_from(["cut", "drop", "value", "unknown", "bytes"]))
    state = json.loads(text)
    if how == "cut":
        text = text[: data.draw(st.integers(0, len(text) - 1))]
    elif how == "bytes":
        at = data.draw(st.integers(0, len(text) - 1))
        text = text[:at] + bytes([data.draw(st.integers(128, 255))]) + text[at + 1 :]
    else:
        key = data.draw(st.sampled_from(sorted(state)))
        if how == "drop":
            del state[key]
        elif how == "unknown":
            state["more"] = 1
        else:
            state[key] = data.draw(
                st.sampled_from([None, True, -1, 0.5, "x", [], [0, 1], {}, 1e300])
            )
            if key == "nested_offset" and isinstance(state[key], (int, float)):
                if type(state[key]) is not bool and abs(state[key]) < 1e30:
                    return  # an offset like any other
        text = json.dumps(state).encode()
    path = _copy(folder, tmp_path)
    _write(path, entries | {name: (dtype, [len(text)], text)})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as caught:
        opened(path)
    assert "\n" not in str(caught.value)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.floats()
    | st.sampled_from(["", "group", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [place, *(p for key, inner in items for p in _places(inner, (*place, key)))]


@settings(
    deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_configuration_is_read_or_refused_in_one_line(
    folders: Callable[[str], Path], data: st.DataObject
) -> None:
    folder = folders(
        data.draw(
            st.sampled_from(
                [
                    "nf4",
                    "int8",
                    "int4",
                    "nvfp4",
                    "ct fp8 block",
                    "gptq",
                    "awq",
                    "fp8 block",
                    "modelopt nvfp4",
                ]
            )
        )
    )
    stored = open_checkpoint(folder)
    config = copy.deepcopy(stored.config)
    assert config is not None
    place = data.draw(st.sampled_from(_places(config["quantization_config"])))
    inner = config
    keys = ("quantization_config", *place)
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = data.draw(JSON)
    try:
        recognise(dataclasses.replace(stored, config=config))
    except CheckpointError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000


def _group(**weights: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4 | weights}}}


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("nf4", {"quant_method": "hqq"}, "quant_method 'hqq'; those that are read are awq, bits"),
    ("nf4", {"quant_method": None}, "quant_method None"),
    (
        "nf4",
        {"load_in_4bit": False, "_load_in_4bit": False},
        "sets neither load_in_4bit nor load_in_8bit",
    ),
    ("int4", {"format": "marlin-24"}, "has format 'marlin-24'"),
    ("int4", {"config_groups": {}}, "config_groups {}"),
    ("int4", _group(group_size=128, num_bits=8), "group_0.weights.num_bits 8"),
    ("int4", _group(group_size=128, type="float"), "group_0.weights.type 'float'"),
    ("int4", _group(group_size=0), "group_0.weights.group_size 0"),
    ("int4", _group(strategy="tensor"), "group_0.weights.strategy 'tensor'"),
    (
        "int4",
        {
            "config_groups": {
                "group_0": {"targets": ["Embedding"], "weights": INT4 | {"group_size": 128}}
            }
        },
        "no config group targets",
    ),
    ("int4", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    ("int4", {"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
    ("int4-asym", _group(group_size=128), "is not 0, but config.json says"),
    ("gptq", {"bits": 8}, "bits 8"),
    ("gptq", {"group_size": 48}, "groups of 48 do not fit"),
    ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    ("gptq", {"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic"),
    ("awq", {"version": "gemv"}, "version 'gemv'"),
    ("awq", {"zero_point": False}, "zero_point False"),
    ("fp8 block", {"fmt": "e5m2"}, "fmt 'e5m2'"),
    ("fp8 block", {"weight_block_size": [128]}, "weight_block_size [128]"),
    ("fp8 block", {"weight_block_size": [128, 128]}, "weight_scale_inv"),
    ("fp8 block", {"expert_dtype": "fp4"}, "expert_dtype 'fp4'"),
    ("modelopt nvfp4", {"quant_algo": "W4A8_AWQ"}, "quant_algo 'W4A8_AWQ'"),
    ("modelopt nvfp4", {"group_size": 32}, "group_size 32"),
    ("gptq", {"quant_method": "mxfp4"}, "gpt-oss"),
    ("dense", FP8, "none is; remove its quantization_config"),
]


@pytest.mark.parametrize(("name", "change", "expect"), REFUSED, ids=[r[2] for r in REFUSED])
def test_other_formats_are_refused_by_name(
    folders: Callable[[str], Path], name: str, change: dict[str, Any], expect: str
) -> None:
    stored = open_checkpoint(folders(name))
    config = copy.deepcopy(stored.config) or {}
    config["quantization_config"] = config.get("quantization_config", {}) | change
    with pytest.raises(CheckpointError) as caught:
        recognise(dataclasses.replace(stored, config=config))
    assert expect in str(caught.value) and "\n" not in str(caught.value)
    assert str(folders(name)) in str(caught.value)


@pytest.mark.parametrize(
    "name", ["nf4", "int8", "int4", "gptq", "awq", "fp8 block", "modelopt nvfp4"]
)
def test_codes_without_a_configuration_are_refused(
    folders: Callable[[str], Path], name: str
) -> None:
    stored = open_checkpoint(folders(name))
    with pytest.raises(CheckpointError, match="config.json has no quantization_config"):
        recognise(dataclasses.replace(stored, config={}))


def test_content_of_small_tensors_is_checked(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    weight = f"{DOWN}.weight"
    changes: list[tuple[str, str, bytes, str]] = [
        ("int8", f"{DOWN}.weight_format", b"\1", "is 1, an order of one kind of GPU"),
        ("nf4", f"{weight}.quant_map", struct.pack("<16f", *range(16)), "has 0.0 at 0"),
        ("nf4-dq", f"{weight}.nested_quant_map", bytes(1024), "has 0.0 at 0"),
        ("nvfp4", f"{DOWN}.weight_global_scale", struct.pack("<f", 0), "is 0.0"),
        ("nvfp4", f"{DOWN}.weight_global_scale", struct.pack("<f", float("nan")), "is nan"),
        ("modelopt nvfp4", f"{DOWN}.weight_scale_2", struct.pack("<f", -1), "is -1.0"),
        ("int4", f"{DOWN}.weight_shape", struct.pack("<2q", 128, 0), "is [128, 0]"),
        ("int4", f"{DOWN}.weight_shape", struct.pack("<2q", 2**62, 256), "weight_packed"),
        ("gptq", f"{DOWN}.g_idx", struct.pack("<256i", *range(256)), "names group 255 or 0 of 8"),
        ("gptq", f"{DOWN}.g_idx", struct.pack("<256i", *[-1] * 256), "names group -1"),
    ]
    for name, tensor, content, expect in changes:
        entries = _entries(folders(name))
        dtype, shape, before = entries[tensor]
        assert len(before) == len(content)
        path = _copy(folders(name), tmp_path)
        _write(path, entries | {tensor: (dtype, shape, content)})
        with pytest.raises(CheckpointError) as caught:
            opened(path)
        assert expect in str(caught.value) and DOWN in str(caught.value)


def test_tables_may_differ_in_the_last_bit(folders: Callable[[str], Path], tmp_path: Path) -> None:
    name = f"{DOWN}.weight.nested_quant_map"
    entries = _entries(folders("nf4-dq"))
    table = np.nextafter(np.frombuffer(entries[name][2], np.float32), np.float32(2))
    table[127] = 0  # zero is zero everywhere
    path = _copy(folders("nf4-dq"), tmp_path)
    _write(path, entries | {name: (*entries[name][:2], table.tobytes())})
    assert coded(opened(path))


def test_extra_tensor_of_bitsandbytes_is_refused(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    for name, extra in (("nf4", f"{DOWN}.weight.more"), ("int8", f"{DOWN}.more")):
        path = _copy(folders(name), tmp_path)
        _write(path, _entries(folders(name)) | {extra: ("F32", [1], bytes(4))})
        with pytest.raises(CheckpointError, match=extra):
            opened(path)


def test_experts_in_one_tensor_are_refused(folders: Callable[[str], Path], tmp_path: Path) -> None:
    path = _copy(folders("fp8 block"), tmp_path)
    name = f"{DOWN}.weight"
    dtype, shape, content = _entries(folders("fp8 block"))[name]
    _write(
        path,
        _entries(folders("fp8 block")) | {name: (dtype, [2, shape[0] // 2, shape[1]], content)},
    )
    with pytest.raises(CheckpointError, match="read of matrices alone"):
        opened(path)


def test_weight_that_is_there_twice_is_refused(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    path = _copy(folders("gptq"), tmp_path)
    dense = _entries(folders("dense"))
    _write(path, _entries(folders("gptq")) | {f"{DOWN}.weight": dense[f"{DOWN}.weight"]})
    with pytest.raises(CheckpointError, match="both as it is and in codes"):
        opened(path)


# ---- outputs ------------------------------------------------------------------------------------


def _described(
    name: str, tensors: dict[str, torch.Tensor]
) -> tuple[dict[str, Any], list[Constant]]:
    """Everything that format `name` says of the linear weights of a dense model: name -> dtype and shape."""
    out = FORMATS[name]
    found: dict[str, Any] = {}
    constants: list[Constant] = []
    for weight in linears(tensors):
        shape = tuple(tensors[weight].shape)
        coding = out.coding(DType.BF16, shape)
        assert out.refuses(shape) is None
        constants += out.constants(weight, shape, coding)
        specs = parts_of(coding, *shape)
        parts = out.parts(weight, shape, coding)
        assert [(p.slot, p.dtype, p.shape) for p in parts] == [
            (s.slot, s.dtype, s.shape) for s in specs
        ]
        for part in (*parts, *out.constants(weight, shape, coding)):
            found[part.name] = (part.dtype.safetensors, list(part.shape))
    return found, constants


@pytest.mark.parametrize("name", WRITTEN)
def test_output_holds_what_the_library_writes(folders: Callable[[str], Path], name: str) -> None:
    dense = load_file(folders("dense") / "model.safetensors")
    found, constants = _described(name, dense)
    library = {n: e for n, e in _entries(folders(name)).items() if n not in dense or n in found}
    assert set(found) == set(library)
    late = {c.name for c in constants if c.content is None}
    for n, (dtype, shape, _) in library.items():
        if not (n in late and "quant_state" in n):  # whose text has room for any number
            assert found[n] == (dtype, shape), n
    for constant in constants:
        if constant.content is not None:
            assert constant.content == library[constant.name][2], constant.name


def _model(name: str, dense: dict[str, torch.Tensor], kept: list[str]) -> Quantised:
    out = FORMATS[name]
    weights = [w for w in linears(dense) if w not in kept]
    codings = {w: out.coding(DType.BF16, tuple(dense[w].shape)) for w in weights}
    return Quantised(codings, kept, {}, DType.BF16)


@pytest.mark.parametrize("name", WRITTEN)
def test_configuration_says_all_that_the_librarys_says(
    folders: Callable[[str], Path], name: str
) -> None:
    dense = load_file(folders("dense") / "model.safetensors")
    ours = FORMATS[name].config(_model(name, dense, ["lm_head.weight"]))
    library = json.loads((folders(name) / "config.json").read_text())["quantization_config"]
    spare = ("version", "moe_sparsity_config", "sparsity_config", "transform_config")
    _check_contains(ours, {k: v for k, v in library.items() if k[0] != "_" and k not in spare})
    json.dumps(ours)


def _check_contains(ours: Any, library: Any, place: str = "") -> None:
    if isinstance(library, dict):
        for key, value in library.items():
            if place.endswith("group_0") and key == "format":
                continue  # said once, for all
            assert key in ours, f"{place}.{key}"
            _check_contains(ours[key], value, f"{place}.{key}")
    else:
        assert ours == library, place


@pytest.mark.parametrize("name", WRITTEN)
def test_library_opens_a_folder_with_our_configuration_and_constants(
    folders: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    dense = load_file(folders("dense") / "model.safetensors")
    path = _copy(folders(name), tmp_path)
    entries, model = _entries(path), opened(path)
    out = FORMATS[name]
    for weight, info in coded(model).items():
        scales = Scales(1.0, info.tensor_scale, info.nested_offset)
        for c in out.constants(weight, info.shape, info.coding):
            content = c.content
            if content is None:
                content = out.late(c.name, info.shape, info.coding, scales)
            assert len(content) == c.dtype.itemsize * int(np.prod(c.shape))
            if "quant_state" in c.name:
                assert content.rstrip() == entries[c.name][2]  # the library's own text
            else:
                assert content == entries[c.name][2]
            entries[c.name] = (c.dtype.safetensors, list(c.shape), content)
    _write(path, entries)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = dict(out.config(_model(name, dense, ["lm_head.weight"])))
    write_json(path / "config.json", config)
    # Asymmetric: the library's default way has a shape check that its own files fail.
    opener = load_dequantised if name == "int4-asym" else load
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        got, want = (opener(p)(tokens).logits for p in (path, folders(name)))
    assert torch.isfinite(got).all() and torch.equal(got, want)


@settings(deadline=None, max_examples=300)
@given(
    offset=st.floats(width=32, min_value=0, allow_nan=False, allow_infinity=False),
    shape=st.tuples(st.integers(1, 2**20), st.integers(1, 2**20)),
    dtype=st.sampled_from([DType.F32, DType.F16, DType.BF16]),
)
def test_text_of_a_nested_weight_has_room_for_any_offset(
    offset: float, shape: tuple[int, int], dtype: DType
) -> None:
    out = FORMATS["nf4-dq"]
    coding = out.coding(dtype, shape)
    state = out.constants("m.weight", shape, coding)[-1]
    text = out.late(state.name, shape, coding, Scales(nested_offset=offset))
    assert state.content is None and len(text) == state.shape[0]
    assert json.loads(text) == {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": dtype.torch,
        "shape": list(shape),
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": float(np.float32(offset)),
    }


def test_modules_that_stay_dense_are_listed(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """The library must keep exactly these dense, or the folder does not open."""
    down = f"{DOWN}.weight"
    dense = load_file(folders("dense") / "model.safetensors")
    for name in ("nf4", "int4", "fp8"):
        path = _copy(folders(name), tmp_path)
        entries = _entries(path)
        entries = {n: e for n, e in entries.items() if not n.startswith(DOWN)}
        _write(path, entries | {down: _entries(folders("dense"))[down]})
        config = json.loads((path / "config.json").read_text())
        model = _model(name, dense, [down, "lm_head.weight"])
        config["quantization_config"] = dict(FORMATS[name].config(model))
        write_json(path / "config.json", config)
        module = load(path).get_submodule(DOWN)
        assert module.weight.dtype is torch.bfloat16 and torch.equal(module.weight, dense[down])
        assert len(coded(opened(path))) == len(linears(dense)) - 1


KEPT = ["lm_head.weight", "model.layers.0.mlp.gate.weight"]


@pytest.mark.parametrize(
    ("name", "key", "head_alone", "more", "tied", "same"),
    [
        ("nf4", "llm_int8_skip_modules", None, ["lm_head", "model.layers.0.mlp.gate"], None, []),
        ("int4", "ignore", ["lm_head"], ["lm_head", "model.layers.0.mlp.gate"], ["lm_head"], []),
        ("awq", "modules_to_not_convert", None, ["lm_head", "model.layers.0.mlp.gate"], None, []),
        ("fp8-block", "modules_to_not_convert", "absent", ["lm_head", "model.layers.0.mlp.gate"], "absent", []),
        ("gptq", "dynamic", "absent", {r"-:^model\.layers\.0\.mlp\.gate$": {}}, "absent", "absent"),
    ],
)  # fmt: skip
def test_head_is_listed_where_a_list_would_forget_it(
    name: str, key: str, head_alone: Any, more: Any, tied: Any, same: Any
) -> None:
    out = FORMATS[name]
    coding = out.coding(DType.BF16, (256, 128))
    weights = {"model.layers.0.mlp.up_proj.weight": coding}

    def said(codings: dict[str, Coding], kept: list[str]) -> Any:
        return out.config(Quantised(codings, kept, {}, DType.BF16)).get(key, "absent")

    assert said(weights, KEPT[:1]) == head_alone
    assert said(weights, KEPT) == more
    assert said(weights, []) == tied
    assert said(weights | {"lm_head.weight": coding}, []) == same


def test_gptq_is_as_its_readers_expect() -> None:
    shape = (64, 256)
    model = Quantised({"m.weight": FORMATS["gptq"].coding(DType.F16, shape)}, [], {}, DType.F16)
    assert FORMATS["gptq"].config(model) == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "desc_act": False,
        "true_sequential": True,
        "damp_percent": 0.1,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
    }
    assert FORMATS["gptq-v2"].config(model)["checkpoint_format"] == "gptq_v2"
    assert FORMATS["gptq-asym"].config(model)["sym"] is False
    files = FORMATS["gptq"].files(model)
    assert {n: json.loads(c) for n, c in files.items()} == {
        "quantize_config.json": FORMATS["gptq"].config(model)
    }
    coding = FORMATS["gptq"].coding(DType.F16, shape)
    assert coding == Coding(Format.GPTQ, DType.F16, ScaleType.F16, group=128, v1=True)
    parts = FORMATS["gptq"].parts("m.weight", shape, coding)
    assert [(p.name, p.dtype, p.shape) for p in parts] == [
        ("m.qweight", DType.I32, (32, 64)),
        ("m.scales", DType.F16, (2, 64)),
        ("m.qzeros", DType.I32, (2, 8)),
    ]
    (order,) = FORMATS["gptq"].constants("m.weight", shape, coding)
    assert order.name == "m.g_idx" and order.content == struct.pack("<256i", *[0] * 128, *[1] * 128)


def test_awq_and_fp8_blocks_are_as_their_readers_expect() -> None:
    shape = (160, 256)
    awq, fp8 = FORMATS["awq"], FORMATS["fp8-block"]
    coding = awq.coding(DType.F16, shape)
    model = Quantised({"m.weight": coding}, ["lm_head.weight"], {}, DType.F16)
    assert awq.config(model) == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    assert [(p.name, p.shape) for p in awq.parts("m.weight", shape, coding)] == [
        ("m.qweight", (256, 20)),
        ("m.scales", (2, 160)),
        ("m.qzeros", (2, 20)),
    ]
    coding = fp8.coding(DType.BF16, shape)
    assert fp8.config(dataclasses.replace(model, coded={"m.weight": coding})) == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    assert [(p.name, p.dtype, p.shape) for p in fp8.parts("m.weight", shape, coding)] == [
        ("m.weight", DType.F8_E4M3, shape),
        ("m.weight_scale_inv", DType.F32, (2, 2)),
    ]


def test_mixed_formats_name_their_modules(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """What the library wrote of two formats opens again with our configuration, and is recognised."""
    path = _copy(folders("ct mixed"), tmp_path)
    weights = coded(opened(path))
    codings = {n: info.coding for n, info in weights.items()}
    config = json.loads((path / "config.json").read_text())
    ours = dict(FORMATS["int4"].config(Quantised(codings, ["lm_head.weight"], {}, DType.BF16)))
    assert ours["format"] == "mixed-precision"
    assert ours["config_groups"]["group_1"]["targets"] == [
        n.removesuffix(".weight") for n in weights if "down_proj" in n
    ]
    config["quantization_config"] = ours
    write_json(path / "config.json", config)
    assert {n: t.coding for n, t in coded(opened(path)).items()} == codings
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        got, want = (load(p)(tokens).logits for p in (path, folders("ct mixed")))
    assert torch.equal(got, want)


def test_bitsandbytes_reads_both_of_its_kinds_from_one_folder(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """Each weight says how it is coded, which is why both kinds are one family."""
    nf4, fp4 = _entries(folders("nf4")), _entries(folders("fp4-dq"))
    path = _copy(folders("nf4"), tmp_path)
    kept = {n: e for n, e in nf4.items() if not n.startswith(DOWN)}
    _write(path, kept | {n: e for n, e in fp4.items() if n.startswith(DOWN)})
    kinds = {n: t.coding.format for n, t in coded(opened(path)).items()}
    assert kinds.pop(f"{DOWN}.weight") is Format.BNB_FP4 and set(kinds.values()) == {Format.BNB_NF4}
    got = load_dequantised(path).state_dict()
    for name, folder in (
        (f"{DOWN}.weight", "fp4-dq"),
        ("model.layers.0.mlp.up_proj.weight", "nf4"),
    ):
        want = load_dequantised(folders(folder)).state_dict()
        assert torch.equal(got[name], want[name])


def test_codings_of_outputs() -> None:
    codings = {n: f.coding(DType.BF16, (256, 256)) for n, f in FORMATS.items()}
    assert codings["bnb-nf4"] == Coding(Format.BNB_NF4, DType.BF16, group=64)
    assert codings["nf4-dq"] == Coding(Format.BNB_NF4, DType.BF16, ScaleType.U8, 64, nested=True)
    assert codings["int4-asym"] == Coding(
        Format.INT4, DType.BF16, ScaleType.BF16, 128, symmetric=False
    )
    assert codings["int4-channel"] == Coding(Format.INT4, DType.BF16, ScaleType.BF16, 0)
    assert codings["nvfp4"] == Coding(Format.NVFP4, DType.BF16, ScaleType.E4M3, 16)
    assert codings["mxfp4"] == Coding(Format.MXFP4, DType.BF16, ScaleType.E8M0, 32)
    assert codings["fp8"] == Coding(Format.FP8, DType.BF16, ScaleType.BF16, 0, 1)
    assert codings["fp8-tensor"] == Coding(Format.FP8, DType.BF16, ScaleType.BF16, 0, 0)
    assert codings["fp8-block"] == Coding(Format.FP8, DType.BF16, ScaleType.F32, 128, 128)
    assert codings["awq"] == Coding(Format.AWQ, DType.BF16, ScaleType.F16, 128, symmetric=False)


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("int4", (64, 192), "192 columns are no multiple of 128"),
        ("int4-g64", (64, 192), None),
        ("int4-channel", (3, 5), None),
        ("int4-asym", (12, 128), "12 rows are no multiple of 8"),
        ("int4-asym", (8, 128), "8 rows are no multiple of 8 above 8"),
        ("nvfp4", (3, 24), "24 columns are no multiple of 16"),
        ("mxfp4", (3, 48), "48 columns are no multiple of 32"),
        ("gptq", (48, 128), "48 x 128 is no multiple of 32 x 32"),
        ("gptq", (64, 160), "160 columns are no multiple of 128"),
        ("awq", (40, 128), "40 rows are no multiple of 32"),
        ("awq", (64, 160), "160 columns are no multiple of 128"),
        ("nf4", (3, 5), None),
        ("fp8-block", (3, 5), None),
    ],
)
def test_shapes_that_a_format_cannot_hold(
    name: str, shape: tuple[int, int], reason: str | None
) -> None:
    said = FORMATS[name].refuses(shape)
    assert (said is None) == (reason is None)
    assert reason is None or reason in said


def test_unknown_format_is_told_the_nearest() -> None:
    assert output_format("bnb-nf4") is output_format("nf4")
    with pytest.raises(RecipeError, match="no format is called 'NF4_dq'; the nearest is 'nf4-dq'"):
        output_format("NF4_dq")


def test_every_output_of_safetensors_is_recognised_again(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """Zeros of every part that a format describes make a folder that is read as what was meant."""
    dense = load_file(folders("dense") / "model.safetensors")
    for name, out in FORMATS.items():
        shape = (64, 256)
        coding = out.coding(DType.BF16, shape)
        weight = "model.layers.0.mlp.up_proj.weight"
        entries: dict[str, Entry] = {}
        for part in out.parts(weight, shape, coding):
            size = part.dtype.itemsize * int(np.prod(part.shape))
            entries[part.name] = (part.dtype.safetensors, list(part.shape), bytes(size))
        for c in out.constants(weight, shape, coding):
            content = c.content
            if content is None:
                content = out.late(c.name, shape, coding, Scales(1, 2.5, 0.25))
            entries[c.name] = (c.dtype.safetensors, list(c.shape), content)
        path = tmp_path / name
        path.mkdir()
        _write(path, entries)
        model = Quantised({weight: coding}, ["lm_head.weight"], {}, DType.BF16)
        config = {"dtype": "bfloat16", "quantization_config": dict(out.config(model))}
        write_json(path / "config.json", config)
        (info,) = coded(opened(path)).values()
        # Of GPTQ and AWQ zero points are read whatever is said of them.
        same = (
            {"symmetric": info.coding.symmetric}
            if coding.format in (Format.GPTQ, Format.AWQ)
            else {}
        )
        assert info.coding == dataclasses.replace(coding, **same)
        assert (info.name, info.shape) == (weight, shape)
        if coding.format is Format.NVFP4:
            assert info.tensor_scale == 2.5
        assert info.nested_offset == (0.25 if coding.nested else 0)
    assert dense


def test_header_reads_types_of_scales(tmp_path: Path) -> None:
    tensor = torch.ones(2, 3).to(torch.float8_e8m0fnu)
    save_file({"m.scale": tensor}, tmp_path / "model.safetensors")
    (info,) = open_checkpoint(tmp_path).tensors.values()
    assert isinstance(info, TensorInfo) and info.dtype is DType.F8_E8M0 and info.n_bytes == 6


def test_writes_as_the_library_at_other_shapes(tmp_path: Path) -> None:
    """Odd counts: the last byte is half empty, the last block short."""
    import bitsandbytes.functional as functional

    out = FORMATS["nf4"]
    for shape in ((3, 5), (1, 1), (7, 100)):
        coding = out.coding(DType.F32, shape)
        codes, state = functional.quantize_4bit(torch.ones(shape), quant_type="nf4")
        library = state.as_dict(packed=True)
        parts = {p.name: p.shape for p in out.parts("m.weight", shape, coding)}
        assert parts == {
            "m.weight": tuple(codes.shape),
            "m.weight.absmax": tuple(library["absmax"].shape),
        }
        for c in out.constants("m.weight", shape, coding):
            assert c.content == library[c.name.removeprefix("m.weight.")].numpy().tobytes()
