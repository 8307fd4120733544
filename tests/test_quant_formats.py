"""Quantised model folders as inputs: which parts are one weight, against the libraries that wrote them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import write_json
from hypothesis import given
from hypothesis import strategies as st
from quant_decoding import decode
from quant_folders import (
    DOWN,
    FOLDERS,
    MODELOPT_NVFP4,
    WRITTEN,
    coded,
    copied,
    gptq,
    linears,
    load_dequantised,
    modelopt_nvfp4,
    opened,
    write_by_hand,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastmerge.checkpoint import TensorInfo, open_checkpoint
from fastmerge.coding import Coding, Format, ScaleType, parts_of, unit_rows
from fastmerge.dtypes import DType
from fastmerge.quant import recognise
from fastmerge.quant.bitsandbytes import dynamic_map, quant_map


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
    codes = [t.parts["codes"].name if n in coded(model) else n for n, t in model.tensors.items()]
    assert codes == [n for n in stored.tensors if n in set(codes)]


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
    path = copied(folders("fp8 block"), tmp_path)
    config = json.loads((path / "config.json").read_text())
    config.pop("dtype", None)
    config["text_config"] = {"torch_dtype": "float16"}
    write_json(path / "config.json", config)
    assert coded(opened(path))[f"{DOWN}.weight"].dtype is DType.F16
    del config["text_config"]
    write_json(path / "config.json", config)
    assert coded(opened(path))[f"{DOWN}.weight"].dtype is DType.BF16  # of the embedding


def test_header_reads_types_of_scales(tmp_path: Path) -> None:
    tensor = torch.ones(2, 3).to(torch.float8_e8m0fnu)
    save_file({"m.scale": tensor}, tmp_path / "model.safetensors")
    (info,) = open_checkpoint(tmp_path).tensors.values()
    assert isinstance(info, TensorInfo) and info.dtype is DType.F8_E8M0 and info.n_bytes == 6


@given(
    rows=st.integers(1, 300),
    blocks=st.integers(1, 5),
    cuts=st.sets(st.integers(1, 300), max_size=4),
    coding=st.sampled_from(
        [
            Coding(Format.FP8, DType.BF16, ScaleType.F32, 128, 128),
            Coding(Format.FP8, DType.BF16, ScaleType.BF16, 48, 96),
            Coding(Format.FP8, DType.BF16, ScaleType.BF16),
            Coding(Format.INT4, DType.BF16, ScaleType.BF16, 32, symmetric=False),
            Coding(Format.INT4, DType.BF16, ScaleType.F32, 32),
            Coding(Format.NVFP4, DType.BF16, ScaleType.E4M3, 16),
        ]
    ),
)
def test_pieces_of_a_part_cover_it(rows: int, blocks: int, cuts: set[int], coding: Coding) -> None:
    """Cut anywhere between units of rows, pieces hold every byte once: fewer rows at the end too."""
    cols = 32 * blocks
    unit = unit_rows(coding, cols)
    ends = sorted({min(c * unit, rows) for c in cuts} | {rows})
    for part in parts_of(coding, rows, cols):
        at = start = 0
        for end in ends:
            first, last = part.span(start * cols, end * cols)
            assert first == at and last > first
            at, start = last, end
        assert at == part.n_bytes
