"""Formats as outputs: names, shapes, bytes and JSON, against what the libraries write and open."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage import write_json
from hypothesis import given, settings
from hypothesis import strategies as st
from quant_folders import (
    DOWN,
    WRITTEN,
    Entry,
    coded,
    copied,
    entries_of,
    linears,
    load,
    load_dequantised,
    opened,
    write_entries,
)
from safetensors.torch import load_file

from fastmerge.coding import Coding, Format, ScaleType, parts_of
from fastmerge.dtypes import DType
from fastmerge.errors import RecipeError
from fastmerge.quant import FORMATS, output_format
from fastmerge.quant.format import Constant, Quantised, Scales


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
    library = {n: e for n, e in entries_of(folders(name)).items() if n not in dense or n in found}
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
    path = copied(folders(name), tmp_path)
    entries, model = entries_of(path), opened(path)
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
    write_entries(path, entries)
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
        path = copied(folders(name), tmp_path)
        entries = entries_of(path)
        entries = {n: e for n, e in entries.items() if not n.startswith(DOWN)}
        write_entries(path, entries | {down: entries_of(folders("dense"))[down]})
        config = json.loads((path / "config.json").read_text())
        model = _model(name, dense, [down, "lm_head.weight"])
        config["quantization_config"] = dict(FORMATS[name].config(model))
        write_json(path / "config.json", config)
        module = load(path).get_submodule(DOWN)
        assert module.weight.dtype is torch.bfloat16 and torch.equal(module.weight, dense[down])
        assert len(coded(opened(path))) == len(linears(dense)) - 1


KEPT = ["lm_head.weight", "model.layers.0.mlp.gate.weight"]
GATE_TOO = ["lm_head", "model.layers.0.mlp.gate"]


@pytest.mark.parametrize(
    ("name", "key", "head_alone", "more", "tied", "same"),
    [
        ("nf4", "llm_int8_skip_modules", None, GATE_TOO, None, []),
        ("int4", "ignore", ["lm_head"], GATE_TOO, ["lm_head"], []),
        ("awq", "modules_to_not_convert", None, GATE_TOO, None, []),
        ("fp8-block", "modules_to_not_convert", "absent", GATE_TOO, "absent", []),
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
    path = copied(folders("ct mixed"), tmp_path)
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
    nf4, fp4 = entries_of(folders("nf4")), entries_of(folders("fp4-dq"))
    path = copied(folders("nf4"), tmp_path)
    kept = {n: e for n, e in nf4.items() if not n.startswith(DOWN)}
    write_entries(path, kept | {n: e for n, e in fp4.items() if n.startswith(DOWN)})
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


def test_every_output_is_recognised_again(tmp_path: Path) -> None:
    """Zeros of every part that a format describes make a folder that is read as what was meant."""
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
        write_entries(path, entries)
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
