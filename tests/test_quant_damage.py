"""Quantised model folders that are damaged, or of kinds that are not read: one line says what and where."""

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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quant_folders import (
    DOWN,
    FP8,
    INT4,
    Entry,
    coded,
    copied,
    entries_of,
    opened,
    write_entries,
)

from fastmerge.checkpoint import open_checkpoint
from fastmerge.coding import Format
from fastmerge.errors import CheckpointError
from fastmerge.quant import recognise

#: Tensors that may be missing.
OPTIONAL = ("g_idx", "weight_format", "activation_scale", "input_scale", "input_scale_ub")
DAMAGED = [
    *("nf4", "nf4-dq", "int8", "int4", "int4-asym", "nvfp4", "mxfp4", "fp8", "fp8-tensor"),
    *("gptq", "gptq act-order", "awq", "fp8 block", "fp8 exponents", "fbgemm"),
    *("modelopt fp8", "modelopt nvfp4"),
]


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
    path = copied(folder, tmp_path)
    write_entries(path, _damaged(entries_of(folder), name, damage))
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
    entries = entries_of(folder)
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
            if key == "nested_offset" and state[key] in (-1, 0.5) and state[key] is not True:
                return  # an offset like any other
        text = json.dumps(state).encode()
    path = copied(folder, tmp_path)
    write_entries(path, entries | {name: (dtype, [len(text)], text)})
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
    with pytest.raises(CheckpointError, match=r"config\.json has no quantization_config"):
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
        entries = entries_of(folders(name))
        dtype, shape, before = entries[tensor]
        assert len(before) == len(content)
        path = copied(folders(name), tmp_path)
        write_entries(path, entries | {tensor: (dtype, shape, content)})
        with pytest.raises(CheckpointError) as caught:
            opened(path)
        assert expect in str(caught.value) and DOWN in str(caught.value)


def test_tables_may_differ_in_the_last_bit(folders: Callable[[str], Path], tmp_path: Path) -> None:
    name = f"{DOWN}.weight.nested_quant_map"
    entries = entries_of(folders("nf4-dq"))
    table = np.nextafter(np.frombuffer(entries[name][2], np.float32), np.float32(2))
    table[127] = 0  # zero is zero everywhere
    path = copied(folders("nf4-dq"), tmp_path)
    write_entries(path, entries | {name: (*entries[name][:2], table.tobytes())})
    assert coded(opened(path))


def test_extra_tensor_of_bitsandbytes_is_refused(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    for name, extra in (("nf4", f"{DOWN}.weight.more"), ("int8", f"{DOWN}.more")):
        path = copied(folders(name), tmp_path)
        write_entries(path, entries_of(folders(name)) | {extra: ("F32", [1], bytes(4))})
        with pytest.raises(CheckpointError, match=extra):
            opened(path)


def test_experts_in_one_tensor_are_refused(folders: Callable[[str], Path], tmp_path: Path) -> None:
    path = copied(folders("fp8 block"), tmp_path)
    name = f"{DOWN}.weight"
    dtype, shape, content = entries_of(folders("fp8 block"))[name]
    write_entries(
        path,
        entries_of(folders("fp8 block")) | {name: (dtype, [2, shape[0] // 2, shape[1]], content)},
    )
    with pytest.raises(CheckpointError, match="read of matrices alone"):
        opened(path)


def test_weight_that_is_there_twice_is_refused(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    path = copied(folders("gptq"), tmp_path)
    dense = entries_of(folders("dense"))
    write_entries(path, entries_of(folders("gptq")) | {f"{DOWN}.weight": dense[f"{DOWN}.weight"]})
    with pytest.raises(CheckpointError, match="both as it is and in codes"):
        opened(path)
