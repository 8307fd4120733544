"""Coded tensors of the Triton backend in the interpreter: the bytes and values are the cpu backend's.

The interpreter takes some 50 us per operation of a program, whatever its size: cases are few and chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import coded_tensors
import families
import numpy as np
import pytest
import torch
from coded_cases import BF16, F16, F32, READ, WRITTEN, Case, name_of, values_buffer, viewed
from coded_tensors import Floats, rounded
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmerge
from fastmerge import ops
from fastmerge.backends import Chunk, Kernels, Residual
from fastmerge.backends import triton as backend
from fastmerge.backends.memory import tensor_of
from fastmerge.backends.triton_coded import decode, encode
from fastmerge.coding import Coding, Format, ScaleType, result_rows
from fastmerge.dtypes import DType
from fastmerge.errors import BackendError
from fastmerge.evaluate import Operands, peak, run_walk, sweep_statistic
from fastmerge.quant.quantize import Quantize
from fastmerge.stages import (
    Axis,
    Combine,
    Copy,
    Cut,
    Drop,
    Elect,
    Gram,
    Keep,
    MomentResult,
    Moments,
    OrderStatistic,
    RankedDrop,
    SignBalance,
    Trim,
    Walk,
)
from fastmerge.streaming.device import HostDevice

pytestmark = pytest.mark.skipif(backend.why_not() is not None, reason=str(backend.why_not()))

EACH_FORMAT = list({case[0].format: case for case in WRITTEN}.values())

#: So small that short tensors fill several programs.
SMALL = backend.Tiles(block=64, count=64, segments=1, rows=64, direct=16)


# ---- coded tensors of two backends ---------------------------------------------------------------


@pytest.fixture
def kernels() -> backend.TritonKernels:
    return backend.TritonKernels("cpu")


@pytest.fixture
def small(kernels: backend.TritonKernels) -> backend.TritonKernels:
    kernels.tiles = SMALL
    return kernels


def empty_like(host: coded_tensors.Coded) -> coded_tensors.Coded:
    """Return a result to be written: only a scale of the tensor is there already."""
    made = coded_tensors.Coded(host.coding, host.rows, host.cols, fill=0x5A, **host.fields)
    if host.coding.format is Format.FP8 and host.coding.group_rows == 0:
        made.slots["scales"][:] = host.slots["scales"]
    return made


def contents(rng: np.random.Generator, rows: int, cols: int, dtype: DType) -> Iterator[Floats]:
    """Yield values of `dtype`: usual ones with every special group, and bit patterns of any size."""
    x = rng.standard_normal((rows, cols)).astype(np.float32)
    flat = x.reshape(-1)
    flat[:64] = 0  # whole groups, of either sign of zero
    flat[20:30] = -0.0
    flat[64:96] = rng.integers(-16, 17, len(flat[64:96])) * 0.125  # ties
    flat[96:128] = np.abs(flat[96:128])  # of one sign
    flat[130:140] *= 1e-41  # subnormals
    flat[160:192] *= np.float32(1e-41)
    flat[200:201] = 1000  # an outlier
    flat[224:256] = -np.abs(flat[224:256])
    yield rounded(x, dtype)
    yield rounded(x[::-1] * np.float32(2.0**-7), dtype)
    bits = rng.integers(0, 1 << 32, (rows, cols), dtype=np.uint32).view(np.float32)
    yield np.where(np.abs(bits) < 1e4, rounded(bits, dtype), np.float32(0))


def bits_of(x: Floats) -> Any:
    return np.ascontiguousarray(x).view(np.int32)


def check_codes(
    kernels: backend.TritonKernels, coding: Coding, x: Floats, rows_at_once: int = 1 << 30
) -> None:
    """The bytes that the cpu backend writes, coded in parts of some rows; and what they decode to."""
    rows, cols = x.shape
    want = coded_tensors.Coded(coding, rows, cols).encode(x)
    got = empty_like(want)
    flag = torch.zeros(1, dtype=torch.int32)
    for row in range(0, rows, rows_at_once):
        part = x[row : row + rows_at_once]
        values, _held = values_buffer(part, coding.dtype)
        out = viewed(got, row * cols, row * cols + part.size)
        encode(kernels, out, values, flag.data_ptr())
    assert int(flag) == 0
    for slot, held in want.slots.items():
        wrong = np.flatnonzero(held != got.slots[slot])
        assert not wrong.size, f"{slot}: first wrong byte {wrong[0]} of {held.size}"
    check_values(kernels, want, 0, x.size)


def check_values(
    kernels: backend.TritonKernels, host: coded_tensors.Coded, start: int, stop: int
) -> None:
    """The values that the cpu backend decodes; NaN: of any payload."""
    found = decode(kernels, viewed(host, start, stop))
    got, want = tensor_of(found).numpy(), host.decode(start, stop)
    wrong = np.flatnonzero((bits_of(got) != bits_of(want)) & ~(np.isnan(got) & np.isnan(want)))
    assert not wrong.size, f"element {start + wrong[0]}: {got[wrong[0]]!r}, cpu {want[wrong[0]]!r}"


# ---- codes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", WRITTEN, ids=map(name_of, WRITTEN))
def test_codes_and_values_are_bit_equal(case: Case, kernels: backend.TritonKernels) -> None:
    coding, rows, cols = case
    rng = np.random.default_rng([int(coding.format), rows, cols])
    for x in contents(rng, rows, cols, coding.dtype):
        check_codes(kernels, coding, x)


@pytest.mark.parametrize("case", EACH_FORMAT, ids=map(name_of, EACH_FORMAT))
def test_programs_and_parts_do_not_show(case: Case, small: backend.TritonKernels) -> None:
    coding, _, cols = case
    rows = 3 * math.lcm(result_rows(coding, cols), coding.rotary or 1)
    x = next(contents(np.random.default_rng(1), rows, cols, coding.dtype))
    check_codes(small, coding, x, rows_at_once=rows // 3)


@pytest.mark.parametrize("case", EACH_FORMAT, ids=map(name_of, EACH_FORMAT))
@given(values=st.lists(st.floats(-(2.0**15), 2.0**15, width=32), min_size=64, max_size=64))
@settings(max_examples=6, deadline=None)
def test_any_values_are_coded_alike(case: Case, values: list[float]) -> None:
    coding = replace(case[0], group=min(case[0].group, 64), rotary=0)
    x = np.resize(np.array(values, np.float32), (8, 64))
    check_codes(backend.TritonKernels("cpu"), coding, rounded(x, coding.dtype))


def test_e4m3_is_torchs(kernels: backend.TritonKernels) -> None:
    """Every code, every midpoint between two and its neighbours; the scale of the tensor is 1."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (codes[1:] + codes[:-1]) / 2
    near = [middle, middle.nextafter(codes[1:]), middle.nextafter(codes[:-1]), codes]
    x = torch.cat([*near, *(-y for y in near)])[None]
    host = coded_tensors.Coded(Coding(Format.FP8, F32, group_rows=0), *x.shape)
    host.slots["scales"][:] = np.frombuffer(np.float32(1).tobytes(), np.uint8)
    values, _held = values_buffer(x.numpy(), F32)
    flag = torch.zeros(1, dtype=torch.int32)

    encode(kernels, viewed(host), values, flag.data_ptr())

    want = x.to(torch.float8_e4m3fn).view(torch.uint8).reshape(-1).numpy()
    np.testing.assert_array_equal(host.slots["codes"], want)


def test_the_least_powers_of_two_as_scales(kernels: backend.TritonKernels) -> None:
    """E8M0's code 0 is a subnormal float32, to which scales are rounded up."""
    least = np.float32(448 * 2.0**-127)
    peaks = [least * np.float32(f) for f in (0, 1e-5, 0.5, 1, 1.5, 2, 3, 2.0**20)]
    peaks += [np.nextafter(least, np.float32(1)), np.nextafter(least, np.float32(0))]
    x = np.array(peaks, np.float32)[:, None] * np.linspace(-1, 1, 9, dtype=np.float32)
    check_codes(kernels, Coding(Format.FP8, F32, ScaleType.E8M0), x)


# ---- what is only read ---------------------------------------------------------------------------


def noise(coding: Coding, rows: int, cols: int, **fields: Any) -> coded_tensors.Coded:
    """Return a tensor of random bytes: all codes, subnormal scales, NaN among small floats."""
    host = coded_tensors.Coded(coding, rows, cols, **fields)
    rng = np.random.default_rng(rows)
    for slot, held in host.slots.items():
        held[:] = rng.integers(0, 256, held.size, dtype=np.uint8)
        if slot == "scales" and coding.scale is ScaleType.F32:
            held[:] = rng.standard_normal(held.size // 4).astype(np.float32).view(np.uint8)
    return host


@pytest.mark.parametrize("case", READ, ids=map(name_of, READ))
def test_any_bytes_decode_alike(case: Case, kernels: backend.TritonKernels) -> None:
    host = noise(*case, tensor_scale=0.37)
    n = host.rows * host.cols
    for start, stop in ((0, n), (5, 6), (n // 2 + 1, n - 3)):
        check_values(kernels, host, start, stop)


@pytest.mark.parametrize("cut", [(0, 400), (64, 130), (199, 201)])
@pytest.mark.parametrize("f", [Format.BNB_NF4, Format.BNB_FP4])
def test_nested_scales_are_decoded(
    f: Format, cut: tuple[int, int], kernels: backend.TritonKernels
) -> None:
    x = np.random.default_rng(3).standard_normal((300, 64)).astype(np.float32)
    host = coded_tensors.Coded(Coding(f, group=64, nested=True), 300, 64).encode(x)
    check_values(kernels, host, 40 * cut[0], 40 * cut[1])


def test_the_map_of_nested_scales_is_the_librarys(kernels: backend.TritonKernels) -> None:
    """All 256 codes."""
    host = coded_tensors.Coded(Coding(Format.BNB_NF4, group=64, nested=True), 256, 64, fill=0xFF)
    host.slots["scales"][:] = np.arange(256)
    host.slots["nested"][:] = np.frombuffer(np.float32(1).tobytes(), np.uint8)
    check_values(kernels, host, 0, 256 * 64)


@pytest.mark.parametrize("v1", [False, True])
def test_columns_in_the_order_of_activations(v1: bool, kernels: backend.TritonKernels) -> None:
    host = noise(Coding(Format.GPTQ, scale=ScaleType.F16, group=32, symmetric=False, v1=v1), 16, 96)
    order = np.random.default_rng(2).integers(0, 3, 96).astype(np.int32)
    host.slots["group_of"] = order.view(np.uint8)
    check_values(kernels, host, 0, 16 * 96)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("f", [Format.BNB_NF4, Format.DENSE])
def test_an_adapter_is_added(f: Format, dtype: DType, kernels: backend.TritonKernels) -> None:
    rng, rows, cols, rank = np.random.default_rng(4), 6, 64, 3
    host = noise(Coding(f, group=64, dtype=F32), rows, cols)
    if f is Format.DENSE:
        host.slots["codes"] = rng.standard_normal(rows * cols).astype(np.float32).view(np.uint8)
    low = [values_buffer(rng.standard_normal(n), dtype)[0] for n in (rank * cols, rows * rank)]
    slots = {"low_a": low[0], "low_b": low[1]}
    coded = replace(viewed(host, 70, 300), low_scale=0.3)
    coded = replace(coded, slots={**coded.slots, **slots})

    found = decode(kernels, coded)

    host.fields |= {name: b.address for name, b in slots.items()}
    host.fields |= {"low_type": dtype.code, "rank": rank, "low_scale": 0.3}
    np.testing.assert_array_equal(tensor_of(found).numpy(), host.decode(70, 300))


# ---- walks and statistics ------------------------------------------------------------------------


def operands(rows: int, cols: int) -> tuple[list[Any], Operands]:
    """Return (memory, base and three experts): some coded, some not."""
    rng = np.random.default_rng(rows)
    codings = [
        Coding(Format.BNB_NF4, BF16, group=64),
        Coding(Format.INT4, BF16, ScaleType.BF16, 32, 1, False),
        Coding(Format.Q8_0, F32),
    ]
    x = [rng.standard_normal((rows, cols)).astype(np.float32) for _ in range(4)]
    hosts = [
        coded_tensors.Coded(c, rows, cols).encode(rounded(v, c.dtype))
        for c, v in zip(codings, x[:3], strict=True)
    ]
    plain, held = values_buffer(x[3], BF16)
    views = [viewed(h) for h in hosts]
    return [hosts, held], Operands(views[0], [*views[1:], plain], cols, F32)


def ties(k: int) -> Walk:
    cut = Cut(np.full((k, 1), 0.3), np.full((k, 1), 5))
    return Walk(
        np.ones((k, 1)), keep=Keep(Trim(cut)), elect=Elect(), combine=Combine(divide_by="weight")
    )


RANKED = RankedDrop([0.2] * 3, [0.9] * 3, [1, 2, 3], Axis.ROW, "rank", rescale=True)
WALKS = {
    "linear": Walk(np.full((3, 1), 0.4)),
    "ties": ties(3),
    "dropped": Walk(np.ones((3, 1)), keep=Keep(drop=Drop([0.5] * 3, [1, 2, 3], rescale=True))),
    "ranked": Walk(np.ones((3, 1)), keep=Keep(drop=RANKED)),
}


def both(kernels: backend.TritonKernels) -> tuple[Kernels, Kernels]:
    return kernels, ops.choose("cpu", "cpu")


@pytest.mark.parametrize("limit", [1 << 30, 16 * 96], ids=["whole", "chunks"])
@pytest.mark.parametrize("name", WALKS)
def test_walks_over_codes_into_codes(
    name: str, limit: int, kernels: backend.TritonKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts of eight rows of what is decoded, in the chunks of a caller, at once."""
    monkeypatch.setitem(backend.SPAN_OF, True, 8 * 96 + 7)
    _held, given_ = operands(20, 96)
    for coding in (
        Coding(Format.INT4, BF16, ScaleType.BF16, 32, 1, False),
        Coding(Format.BNB_FP4, F16, group=64),
        Coding(Format.GPTQ, F32, ScaleType.F16, 32),
    )[: 3 if name == "ties" else 1]:
        rows = 20 if coding.format is not Format.GPTQ else 16
        part = Operands(
            given_.base.slice(0, rows * 96) if given_.base else None,
            [x.slice(0, rows * 96) for x in given_.experts],
            96,
            F32,
        )
        made, cost = [], []
        for each in both(kernels):
            host, residual = coded_tensors.Coded(coding, rows, 96), Residual()
            out = replace(viewed(host), residual=residual)
            assert not run_walk(each, WALKS[name], part, out, limit)
            made.append(host.slots)
            cost.append(residual)
        for slot in made[0]:
            np.testing.assert_array_equal(made[0][slot], made[1][slot], err_msg=slot)
        assert cost[0].relative_rms == pytest.approx(cost[1].relative_rms, rel=1e-5)
        assert cost[0].squares == pytest.approx(cost[1].squares, rel=1e-5)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_walks_over_codes_into_elements(
    dtype: DType, small: backend.TritonKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(backend.SPAN_OF, True, 1000)
    _held, given_ = operands(20, 96)
    found = []
    for each in both(small):
        out = torch.zeros(20 * 96, dtype=getattr(torch, dtype.torch))
        assert not run_walk(each, ties(3), given_, ops.buffer_of(out, "out"))
        assert peak(each, ties(3), given_, dtype) == (False, float(out.abs().max()))
        found.append(out)
    assert torch.equal(*found)


def test_a_coded_operand_is_copied_into_another_format(kernels: backend.TritonKernels) -> None:
    _held, given_ = operands(8, 96)
    made = []
    for each in both(kernels):
        host = coded_tensors.Coded(Coding(Format.Q4_1, BF16), 8, 96)
        assert not run_walk(each, Copy(0), given_, viewed(host))
        made.append(host.slots["codes"])
    np.testing.assert_array_equal(*made)


STATISTICS = {
    "cut": OrderStatistic([[300], [2], [1900]]),
    "cut of rows": OrderStatistic([[30], [2], [90]], scope="row"),
    "cut of variance": OrderStatistic([[300]], of="variance"),
    "moments": Moments("abs"),
    "moments of what is kept": Moments("square", Keep(drop=RANKED)),
    "largest": Moments("max"),
    "gram": Gram(),
    "gram of rows": Gram(Axis.ROW),
    "gram of columns": Gram(Axis.COLUMN),
    "signs": SignBalance(Keep(), np.ones((3, 1)), Elect()),
}


def arrays_of(found: Any) -> list[Any]:
    if isinstance(found, list):
        return [x for cut in found for x in (cut.value, cut.last_tie)]
    return [found.all, found.kept] if isinstance(found, MomentResult) else [found]


@pytest.mark.parametrize("limit", [1 << 30, 11 * 96], ids=["whole", "chunks"])
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_over_codes(
    name: str, limit: int, kernels: backend.TritonKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(backend.SPAN_OF, True, 1000)
    _held, given_ = operands(20, 96)
    got, want = (
        sweep_statistic(each, STATISTICS[name], given_, limit)
        for each in both(kernels)
    )  # fmt: skip
    for x, y in zip(arrays_of(got), arrays_of(want), strict=True):
        np.testing.assert_array_equal(x, y)


def test_masks_over_codes(small: backend.TritonKernels) -> None:
    _held, given_ = operands(20, 96)
    chunk = Chunk(given_.base, given_.experts, 0, 20 * 96, 96, F32)
    got, want = (each.keep_mask(ties(3).keep, chunk) for each in both(small))
    np.testing.assert_array_equal(got, want)


# ---- whole merges --------------------------------------------------------------------------------


WIDE = families.LLAMA | {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1}
SHAPES = {
    "model.layers.0.self_attn.q_proj.weight": (128, 128),
    "model.layers.0.mlp.down_proj.weight": (128, 128),
    "model.layers.0.input_layernorm.weight": (128,),
}


def copy_of(model: Path) -> dict[str, Any]:
    return {"merge_method": "passthrough", "models": [{"model": str(model)}]}


@pytest.fixture(scope="module")
def coded_family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense base and two experts, one of them in NF4 with double quantisation."""
    folder = tmp_path_factory.mktemp("coded")
    for name, state in families.family(SHAPES, torch.bfloat16).items():
        families.write_model(folder / name, state, WIDE)
    fastmerge.merge(copy_of(folder / "e1"), folder / "nf4", quantize="nf4-dq", backend="cpu")
    return folder


@pytest.mark.parametrize("name", ["nf4-dq", "int4-asym", "nvfp4", "fp8-tensor", "gptq", "awq"])
def test_quantised_merges_are_the_cpu_backends_files(name: str, coded_family: Path) -> None:
    experts = [
        {"model": str(coded_family / m), "parameters": {"weight": 0.6, "density": 0.4}}
        for m in ("nf4", "e2")
    ]
    recipe = {
        "merge_method": "ties",
        "base_model": str(coded_family / "base"),
        "models": experts,
        "dtype": "bfloat16",
    }
    files = []
    for each, device in (("cpu", "cpu"), ("triton", HostDevice())):
        out = coded_family / f"{name}-{each}"
        fastmerge.merge(recipe, out, quantize=name, backend=each, device=device)
        files.append({p.name: p.read_bytes() for p in out.glob("*.safetensors")})
    assert files[0] and files[0] == files[1]


def test_a_format_that_is_not_written_is_refused_before_reading(coded_family: Path) -> None:
    searched, out = Quantize("nf4", rounding="mse"), coded_family / "refused"
    with pytest.raises(BackendError, match="'cpu' or 'cuda' can"):
        fastmerge.merge(copy_of(coded_family / "e1"), out, quantize=searched, backend="triton")


# ---- what is refused, and what is not finite -----------------------------------------------------


def test_values_that_are_not_finite_are_reported(kernels: backend.TritonKernels) -> None:
    """In a scale of an operand; and where finite operands overflow what is coded."""
    nan = coded_tensors.Coded(Coding(Format.BNB_NF4, group=64), 1, 64)
    nan.slots["scales"][:] = np.frombuffer(np.float32(np.nan).tobytes(), np.uint8)
    large = coded_tensors.Coded(Coding(Format.FP8, F32), 1, 64).encode(
        np.full((1, 64), 6e4, np.float32)
    )
    for host, sum_of in ((nan, 1.0), (large, 2.0)):
        given_ = Operands(None, [viewed(host)], 64, F32)
        for each in both(kernels):
            out = viewed(coded_tensors.Coded(Coding(Format.Q8_0, F16), 1, 64))
            residual = Residual()
            walk = Walk(np.full((1, 1), sum_of), add_base=False)
            assert run_walk(each, walk, given_, replace(out, residual=residual))
            assert residual.squares == 0


@pytest.mark.parametrize(
    ("coding", "words"),
    [
        (Coding(Format.Q4_K), r"q4_k is not written by it; backend 'cpu' or 'cuda' can"),
        (
            Coding(Format.BNB_NF4, group=64, search=True),
            r"scales of bnb_nf4 are not searched for by it; .*can",
        ),
        (Coding(Format.Q6_K), r"q6_k is only read"),
        (Coding(Format.INT8), r"int8 is only read"),
    ],
)
def test_what_is_not_written_is_refused(
    coding: Coding, words: str, kernels: backend.TritonKernels
) -> None:
    out = viewed(coded_tensors.Coded(coding, 2, 256))
    x, _held = values_buffer(np.zeros(512, np.float32), F32)
    with pytest.raises(BackendError, match=f"triton cannot write this format: {words}"):
        run_walk(kernels, Walk(np.ones((1, 1)), add_base=False), Operands(None, [x], 256, F32), out)
