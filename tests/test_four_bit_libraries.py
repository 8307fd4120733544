"""Codecs against the libraries whose formats they write, on random input: bytes are equal.

Needs bitsandbytes, compressed-tensors and gguf, each for its own tests.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from coded_tensors import Coded, Floats, rounded
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmerge.coding import GGUF_BLOCKS, Coding, Format, ScaleType
from fastmerge.dtypes import DType

TORCH = {DType.F32: torch.float32, DType.BF16: torch.bfloat16, DType.F16: torch.float16}
SCALES = {DType.F32: ScaleType.F32, DType.F16: ScaleType.F16, DType.BF16: ScaleType.BF16}
SEEDS = st.integers(0, 2**32 - 1)
FEW = settings(max_examples=15, deadline=None)


def _input(seed: int, shape: tuple[int, int], dtype: DType = DType.F32) -> Floats:
    """Return heavy-tailed values with blocks of zeros, of one sign and of exact ties."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_t(4, shape) * 0.02).astype(np.float32)
    flat = x.reshape(-1)
    for first in range(0, flat.size - 31, 32):
        part, kind = flat[first : first + 32], rng.integers(12)
        if kind == 0:
            part[:] = 0
        if kind == 1:
            part[:] = np.abs(part)
        if kind == 2:
            part[:] = -np.abs(part)
        if kind == 3:
            part[:] = rng.integers(-64, 65, 32) / np.float32(8)
    return rounded(x, dtype)


def _is_installed(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@FEW
@given(seed=SEEDS, rows=st.integers(1, 9), cols=st.integers(1, 200))
def test_bitsandbytes(kind: str, dtype: DType, seed: int, rows: int, cols: int) -> None:
    functional = _is_installed("bitsandbytes.functional")
    x = _input(seed, (rows, cols), dtype)
    format = Format.BNB_NF4 if kind == "nf4" else Format.BNB_FP4

    ours = Coded(Coding(format, dtype, group=64), rows, cols).encode(x)

    tensor = torch.from_numpy(x).to(TORCH[dtype])
    packed, state = functional.quantize_4bit(tensor, blocksize=64, quant_type=kind)
    np.testing.assert_array_equal(ours.slots["codes"], packed.numpy().reshape(-1))
    np.testing.assert_array_equal(ours.slots["scales"].view(np.float32), state.absmax.numpy())


@FEW
@given(seed=SEEDS, rows=st.integers(1, 30))
def test_bitsandbytes_double_quantisation(seed: int, rows: int) -> None:
    functional = _is_installed("bitsandbytes.functional")
    x = _input(seed, (rows, 1024))
    tensor = torch.from_numpy(x)
    packed, state = functional.quantize_4bit(
        tensor, blocksize=64, compress_statistics=True, quant_type="nf4"
    )

    coding = Coding(Format.BNB_NF4, group=64, nested=True)
    ours = Coded(coding, rows, 1024, nested_offset=float(state.offset)).encode(x)

    np.testing.assert_array_equal(ours.slots["codes"], packed.numpy().reshape(-1))
    np.testing.assert_array_equal(ours.slots["scales"], state.absmax.numpy().reshape(-1))
    np.testing.assert_array_equal(
        ours.slots["nested"].view(np.float32), state.state2.absmax.numpy()
    )


def _compressed(x: torch.Tensor, format: str, **arguments: Any) -> dict[str, torch.Tensor]:
    """Return what compressed-tensors stores of a weight."""
    _is_installed("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    weights = QuantizationArgs(**arguments)
    grouped = x.unflatten(-1, (-1, weights.group_size))
    low, high = grouped.amin(-1), grouped.amax(-1)
    state = {"weight": x}
    divisor = None
    if format == "nvfp4-pack-quantized":
        divisor = generate_gparam(x.amin(), x.amax())
        state["weight_global_scale"] = divisor
    scale, zero = calculate_qparams(low, high, weights, global_scale=divisor)
    state["weight_scale"] = scale
    if not weights.symmetric:
        state["weight_zero_point"] = zero
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = BaseCompressor.get_value_from_registry(format)
    stored: dict[str, torch.Tensor] = compressor.compress(state, scheme)
    return stored


def _raw(tensor: torch.Tensor) -> Any:
    return tensor.reshape(-1).clone().view(torch.uint8).numpy()


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("symmetric", [True, False])
@FEW
@given(seed=SEEDS, eights=st.integers(2, 4), groups=st.integers(1, 3))
def test_compressed_tensors_int4(
    symmetric: bool, dtype: DType, seed: int, eights: int, groups: int
) -> None:
    shape = (8 * eights, 32 * groups)
    x = _input(seed, shape, dtype)
    ours = Coded(Coding(Format.INT4, dtype, SCALES[dtype], 32, symmetric=symmetric), *shape).encode(
        x
    )

    theirs = _compressed(
        torch.from_numpy(x).to(TORCH[dtype]), "pack-quantized",
        num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=32,
    )  # fmt: skip

    np.testing.assert_array_equal(ours.slots["scales"], _raw(theirs["weight_scale"]))
    np.testing.assert_array_equal(ours.slots["codes"], _raw(theirs["weight_packed"]))
    if not symmetric:
        np.testing.assert_array_equal(ours.slots["zeros"], _raw(theirs["weight_zero_point"]))


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
@FEW
@given(seed=SEEDS, rows=st.integers(1, 9), groups=st.integers(1, 5))
def test_compressed_tensors_nvfp4(dtype: DType, seed: int, rows: int, groups: int) -> None:
    x = _input(seed, (rows, 16 * groups), dtype)
    ours = Coded(Coding(Format.NVFP4, dtype, ScaleType.E4M3, 16), *x.shape).encode(x)

    theirs = _compressed(
        torch.from_numpy(x).to(TORCH[dtype]), "nvfp4-pack-quantized", num_bits=4, type="float",
        symmetric=True, strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn,
    )  # fmt: skip

    assert np.float32(ours.fields["tensor_scale"]) == theirs["weight_global_scale"].numpy()[0]
    np.testing.assert_array_equal(ours.slots["scales"], _raw(theirs["weight_scale"]))
    np.testing.assert_array_equal(ours.slots["codes"], _raw(theirs["weight_packed"]))


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
@FEW
@given(seed=SEEDS, rows=st.integers(1, 9), groups=st.integers(1, 5))
def test_compressed_tensors_mxfp4(dtype: DType, seed: int, rows: int, groups: int) -> None:
    x = _input(seed, (rows, 32 * groups), dtype)
    ours = Coded(Coding(Format.MXFP4, dtype, ScaleType.E8M0, 32), *x.shape).encode(x)

    theirs = _compressed(
        torch.from_numpy(x).to(TORCH[dtype]), "mxfp4-pack-quantized", num_bits=4, type="float",
        symmetric=True, strategy="group", group_size=32, scale_dtype=torch.uint8,
    )  # fmt: skip

    np.testing.assert_array_equal(ours.slots["scales"], _raw(theirs["weight_scale"]))
    np.testing.assert_array_equal(ours.slots["codes"], _raw(theirs["weight_packed"]))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0", "MXFP4"])
@FEW
@given(seed=SEEDS, rows=st.integers(1, 20), blocks=st.integers(1, 4))
def test_gguf(name: str, seed: int, rows: int, blocks: int) -> None:
    gguf = _is_installed("gguf")
    x = _input(seed, (rows, 32 * blocks))
    format = Format.GGUF_MXFP4 if name == "MXFP4" else Format[name]

    ours = Coded(Coding(format), *x.shape).encode(x).slots["codes"]

    theirs = gguf.quants.quantize(x, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(ours, theirs.reshape(-1))


@pytest.mark.parametrize("format", GGUF_BLOCKS)
@FEW
@given(seed=SEEDS, rows=st.integers(1, 5), blocks=st.integers(1, 3))
def test_gguf_reads_any_bytes_alike(format: Format, seed: int, rows: int, blocks: int) -> None:
    gguf = _is_installed("gguf")
    name = format.name.removeprefix("GGUF_")
    rng = np.random.default_rng(seed)
    size, n_bytes = GGUF_BLOCKS[format]
    raw = rng.integers(0, 256, (rows * blocks, n_bytes), dtype=np.uint8)
    halves = {"Q4_0": [0], "Q4_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q6_K": [208]}
    for at in halves.get(name, []):  # finite scales
        half = rng.standard_normal((len(raw), 1)).astype(np.float16)
        raw[:, at : at + 2] = half.view(np.uint8)
    if name == "NVFP4":
        raw[:, :4] &= 0x7F
    if name == "MXFP4":
        raw[:, 0] = rng.integers(1, 250, len(raw))  # finite values
    coded = Coded(Coding(format), rows, size * blocks)
    coded.slots["codes"][:] = raw.reshape(-1)

    theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])

    np.testing.assert_array_equal(coded.decode(), theirs.reshape(-1))
