"""Codecs against the oracle of tests/quant_oracle.py and against the formats' own libraries, bit for bit.

On every instruction set: inputs are drawn block by block from what makes rounding hard, whatever the format.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import quant_oracle as oracle
import torch
from coded_tensors import FLAT, Coded, Floats, rounded
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from quant_oracle_values import decode

from fastmerge import _cpu
from fastmerge.coding import GGUF_BLOCKS, Coding, Format, ScaleType, parts_of, unit_rows
from fastmerge.dtypes import DType

SCALES = {DType.F32: ScaleType.F32, DType.F16: ScaleType.F16, DType.BF16: ScaleType.BF16}
ISAS = _cpu.available_isas().split()
FEW = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


def _codings() -> Iterator[tuple[str, Coding]]:
    for format in FLAT:
        for group in (64, 32, 128):
            yield f"{format.name}-{group}", Coding(format, group=group)
        yield f"{format.name}-cuda", Coding(format, group=64, other_rule=True)
        yield f"{format.name}-bf16", Coding(format, DType.BF16, group=64)
        yield f"{format.name}-search", Coding(format, group=64, search=True)
        yield f"{format.name}-cuda-search", Coding(format, group=64, other_rule=True, search=True)
    for dtype, scale in SCALES.items():
        for symmetric in (True, False):
            for group in (32, 128, 0):
                kind = "sym" if symmetric else "asym"
                one = Coding(Format.INT4, dtype, scale, group, symmetric=symmetric)
                yield f"INT4-{dtype.name}-{kind}-{group}", one
                yield f"INT4-{dtype.name}-{kind}-{group}-search", replace(one, search=True)
        one = Coding(Format.NVFP4, dtype, ScaleType.E4M3, 16)
        yield f"NVFP4-{dtype.name}", one
        yield f"NVFP4-{dtype.name}-search", replace(one, search=True)
    for symmetric in (True, False):
        one = Coding(Format.INT4, DType.BF16, ScaleType.BF16, 32, symmetric=symmetric)
        yield f"INT4-BF16-{symmetric}-fp32", replace(one, other_rule=True)
    one = Coding(Format.MXFP4, DType.F32, ScaleType.E8M0, 32)
    for ocp in (False, True):
        for search in (False, True):
            yield f"MXFP4-{ocp}-{search}", replace(one, other_rule=ocp, search=search)
    for format in (Format.GPTQ, Format.AWQ):
        for symmetric in (True, False):
            for group in (32, 128, 0):
                one = Coding(format, DType.BF16, ScaleType.F16, group, symmetric=symmetric)
                yield f"{format.name}-{symmetric}-{group}", one
                yield f"{format.name}-{symmetric}-{group}-search", replace(one, search=True)
    yield "GPTQ-v1", Coding(Format.GPTQ, scale=ScaleType.F16, group=32, symmetric=False, v1=True)
    for format in oracle.GGUF:
        yield format.name, Coding(format)
        yield f"{format.name}-rotary", Coding(format, DType.BF16, rotary=8)
        yield f"{format.name}-search", Coding(format, search=True)
    for scale in (ScaleType.F32, ScaleType.F16, ScaleType.BF16, ScaleType.E8M0):
        yield f"FP8-row-{scale.name}", Coding(Format.FP8, scale=scale)
        yield f"FP8-block-{scale.name}", Coding(Format.FP8, scale=scale, group=16, group_rows=3)
    yield "FP8-tensor", Coding(Format.FP8, group_rows=0)
    for dtype in SCALES:
        yield f"DENSE-{dtype.name}", Coding(Format.DENSE, dtype)
    yield "DENSE-rotary", Coding(Format.DENSE, DType.BF16, rotary=8)


CODINGS = dict(_codings())
KINDS = ("normal", "zeros", "signed zeros", "subnormal", "ties", "outlier", "positive", "negative",
         "equal", "powers", "mixed")  # fmt: skip


@pytest.fixture(autouse=True)
def _same_isa_after() -> Iterator[None]:
    before = _cpu.isa()
    yield
    _cpu.set_isa(before)


def _shape(coding: Coding, rows: int, units: int, ragged: int) -> tuple[int, int]:
    """Return a shape that the format can hold; ragged: what a row has beyond whole blocks, if it may."""
    f = coding.format
    if f in GGUF_BLOCKS:
        rows = 8 * (1 + rows // 8) if coding.rotary else rows
        return rows, GGUF_BLOCKS[f][0] * (1 + units % 2)
    if f in (Format.GPTQ, Format.AWQ):
        return 32, (coding.group or 32) * (1 + units % 2)
    if f is Format.DENSE:
        return 8 * (1 + rows // 8), 8 * units + ragged
    if f in (*FLAT, Format.FP8, Format.INT8) or (f is Format.INT4 and coding.group == 0):
        return rows, 16 * units + ragged
    return rows, coding.group * (1 + units % 3)


def _block(rng: np.random.Generator, kind: str, n: int) -> Floats:
    x = rng.standard_normal(n).astype(np.float32) * np.float32(2.0) ** np.float32(
        rng.integers(-12, 4)
    )
    if kind == "zeros":
        return np.zeros(n, np.float32)
    if kind == "signed zeros":
        return np.where(rng.random(n) < 0.5, 0.0, -0.0).astype(np.float32)
    if kind == "subnormal":
        return (x * np.float32(1e-39)).astype(np.float32)
    if kind == "ties":  # of every format: eighths, midpoints of the books, halves of sevenths
        unit = np.float32(2.0) ** np.float32(rng.integers(-8, 4))
        eighths = rng.integers(-64, 65, n).astype(np.float32) / np.float32(8)
        books = [(b[1:] + b[:-1]) / np.float32(2) for b in (oracle.NF4, np.sort(oracle.FP4))]
        middle = rng.choice(np.concatenate(books), n)
        x = np.where(rng.random() < 0.5, eighths, middle).astype(np.float32)
        x[rng.integers(n)] = rng.choice([1.0, -1.0, 7.5, 8.0, -8.0, 6.0])
        return x * unit
    if kind == "outlier":
        x[rng.integers(n)] = np.float32(rng.choice([3e4, -3e4, 1e3]))
    if kind == "positive":
        x = np.abs(x) + np.float32(0.01)
    if kind == "negative":
        x = -np.abs(x) - np.float32(0.01)
    if kind == "equal":
        x[:] = x[0]
    if kind == "powers":
        signs = rng.choice([-1.0, 1.0], n)
        x = (signs * 2.0 ** rng.integers(-6, 3, n)).astype(np.float32)
        x = np.where(rng.random(n) < 0.2, np.nextafter(x, np.float32(0)), x)
    if kind == "mixed":
        x = np.where(rng.random(n) < 0.3, np.float32(0), x)
    return x.astype(np.float32)


def _values(coding: Coding, shape: tuple[int, int], kinds: list[str], seed: int) -> Floats:
    """Return x [rows, cols] whose stretches of 32 are of the kinds, one after the other."""
    rng = np.random.default_rng(seed)
    n = shape[0] * shape[1]
    parts = [_block(rng, kinds[i % len(kinds)], 32) for i in range(-(-n // 32))]
    return rounded(np.concatenate(parts)[:n].reshape(shape), coding.dtype)


INPUTS = {
    "rows": st.integers(1, 11),
    "units": st.integers(1, 5),
    "ragged": st.integers(0, 15),
    "kinds": st.lists(st.sampled_from(KINDS), min_size=1, max_size=4),
    "seed": st.integers(0, 2**32 - 1),
}


ALL_SUBNORMAL = {
    "rows": 3,
    "units": 3,
    "ragged": 1,
    "kinds": ["subnormal", "signed zeros"],
    "seed": 2,
}


def _drawn(coding: Coding, draw: dict[str, Any]) -> Floats:
    shape = _shape(coding, draw["rows"], draw["units"], draw["ragged"])
    return _values(coding, shape, draw["kinds"], draw["seed"])


def _compare(got: dict[str, Any], want: dict[str, Any], place: str) -> None:
    assert set(got) == set(want)
    for slot in want:
        wrong = np.flatnonzero(got[slot] != want[slot])
        assert not wrong.size, (
            f"{place}: {slot}: {wrong.size} of {got[slot].size} bytes differ, first {wrong[0]}: "
            f"{got[slot][wrong[0]]:#x}, expected {want[slot][wrong[0]]:#x}"
        )


@pytest.mark.parametrize("name", CODINGS)
@FEW
@given(draw=st.fixed_dictionaries(INPUTS))
@example(draw=ALL_SUBNORMAL)  # whole blocks whose scale underflows
def test_bytes_are_the_oracles(name: str, draw: dict[str, Any]) -> None:
    coding = CODINGS[name]
    x = _drawn(coding, draw)
    want = oracle.encode(coding, x)

    for isa in ISAS:
        assert _cpu.set_isa(isa)
        _compare(Coded(coding, *x.shape).encode(x).slots, want, isa)


# ---- decoding ------------------------------------------------------------------------------------


def _decodings() -> Iterator[tuple[str, Coding]]:
    skipped = (*oracle.GGUF, Format.DENSE)
    yield from ((n, c) for n, c in CODINGS.items() if c.format not in skipped and not c.search)
    yield "BNB_NF4-nested", Coding(Format.BNB_NF4, group=64, nested=True)
    yield "BNB_FP4-nested", Coding(Format.BNB_FP4, group=32, nested=True)
    yield "INT8", Coding(Format.INT8)


def _finite_bytes(coding: Coding, slot: str, n: int, rng: np.random.Generator) -> Any:
    """Return random bytes, but scales that are finite."""
    raw = rng.integers(0, 256, n, dtype=np.uint8)
    if slot == "nested":
        return rng.standard_normal(n // 4).astype(np.float32).view(np.uint8)
    if slot != "scales" or coding.nested:
        return np.where(raw & 0x7F == 0x7F, 0, raw) if coding.format is Format.FP8 else raw
    kind = ScaleType.F16 if coding.format in (Format.GPTQ, Format.AWQ) else coding.scale
    if kind is ScaleType.E4M3:
        return np.where(raw & 0x7F == 0x7F, 0, raw)
    if kind is ScaleType.E8M0:
        return rng.integers(90, 150, n, dtype=np.uint8)
    size = 4 if kind is ScaleType.F32 else 2
    return oracle.scale_bytes(kind, rng.standard_normal(n // size).astype(np.float32))


@pytest.mark.parametrize("name", dict(_decodings()))
@FEW
@given(draw=st.fixed_dictionaries(INPUTS))
def test_values_of_any_bytes_are_the_oracles(name: str, draw: dict[str, Any]) -> None:
    coding = dict(_decodings())[name]
    rows, cols = _shape(coding, draw["rows"], draw["units"], draw["ragged"])
    rng = np.random.default_rng(draw["seed"])
    fields = {"nested_offset": 0.75} if coding.nested else {}
    if coding.format is Format.NVFP4:
        fields["tensor_scale"] = 3.7
    coded = Coded(coding, rows, cols, **fields)
    for slot, a in coded.slots.items():
        a[:] = _finite_bytes(coding, slot, len(a), rng)

    want = decode(coding, rows, cols, coded.slots, **fields).reshape(-1)

    for isa in ISAS:
        assert _cpu.set_isa(isa)
        np.testing.assert_array_equal(coded.decode(), want, isa)


def test_columns_of_gptq_may_belong_to_any_group() -> None:
    coding = Coding(Format.GPTQ, scale=ScaleType.F16, group=32, symmetric=False, v1=True)
    rng = np.random.default_rng(1)
    coded = Coded(coding, 32, 96).encode(rng.standard_normal((32, 96)))
    group_of = rng.integers(0, 3, 96).astype(np.int32)
    coded.fields["group_of"] = group_of.ctypes.data

    want = decode(coding, 32, 96, coded.slots, group_of=group_of)

    np.testing.assert_array_equal(coded.decode(), want.reshape(-1))


WHOLE = {n: c for n, c in CODINGS.items() if not c.search and "cuda" not in n}


@pytest.mark.parametrize("name", WHOLE)
@FEW
@given(draw=st.fixed_dictionaries(INPUTS), data=st.data())
def test_a_part_decodes_as_it_does_in_the_whole(
    name: str, draw: dict[str, Any], data: st.DataObject
) -> None:
    coding = CODINGS[name]
    x = _drawn(coding, draw)
    coded = Coded(coding, *x.shape).encode(x)
    start = data.draw(st.integers(0, x.size))
    stop = data.draw(st.integers(start, x.size))

    for isa in ISAS:
        assert _cpu.set_isa(isa)
        np.testing.assert_array_equal(coded.decode(start, stop), coded.decode()[start:stop], isa)


def _cut(coded: Coded, row: int, rows: int) -> dict[str, Any]:
    """Return the fields of rows [row, row + rows), whose parts begin with what belongs to them."""
    start, stop = row * coded.cols, (row + rows) * coded.cols
    fields: dict[str, Any] = {"origin": start, "first": start}
    for spec in parts_of(coded.coding, coded.rows, coded.cols):
        first, end = spec.span(start, stop)
        part = coded.slots[spec.slot][first:end].copy()
        fields[spec.slot] = part.ctypes.data
        fields[f"_{spec.slot}"] = (part, first)
    return fields


@pytest.mark.parametrize("name", WHOLE)
@FEW
@given(draw=st.fixed_dictionaries(INPUTS), data=st.data())
def test_the_spans_of_pieces_are_all_of_each_part(
    name: str, draw: dict[str, Any], data: st.DataObject
) -> None:
    coding = CODINGS[name]
    rows, cols = _shape(coding, draw["rows"], draw["units"], draw["ragged"])
    unit = unit_rows(coding, cols) or rows
    at = unit * data.draw(st.integers(0, rows // unit))

    for spec in parts_of(coding, rows, cols):
        assert spec.span(0, rows * cols) == (0, spec.n_bytes), spec
        if spec.per_element is not None and 0 < at < rows:
            (first, end), (start, stop) = spec.span(0, at * cols), spec.span(at * cols, rows * cols)
            assert (first, end, stop) == (0, start, spec.n_bytes), spec


@pytest.mark.parametrize("name", [n for n, c in WHOLE.items() if unit_rows(c, 48)])
@FEW
@given(draw=st.fixed_dictionaries(INPUTS), data=st.data())
def test_a_tensor_in_pieces_is_the_same(
    name: str, draw: dict[str, Any], data: st.DataObject
) -> None:
    coding = CODINGS[name]
    x = _drawn(coding, {**draw, "rows": draw["rows"] + 8})
    rows, cols = x.shape
    whole = Coded(coding, rows, cols).encode(x)
    unit = unit_rows(coding, cols)
    at = unit * data.draw(st.integers(0, rows // unit))
    pieces = Coded(coding, rows, cols, **whole.fields)
    pieces.slots["codes"][:] = whole.slots["codes"] if coding.format is Format.FP8 else 0xA5
    decoded = []
    for row, n in ((0, at), (at, rows - at)):
        if not n:
            continue
        fields = _cut(whole if coding.group_rows == 0 else pieces, row, n)
        parts = {k: v for k, v in fields.items() if k[0] == "_"}
        fields = {k: v for k, v in fields.items() if k[0] != "_"}
        piece = np.ascontiguousarray(x[row : row + n])

        _cpu.encode(pieces.view(**fields), row, n, piece.ctypes.data)

        for slot, (part, first) in parts.items():
            pieces.slots[slot[1:]][first : first + len(part)] = part
        out = np.empty(n * cols, np.float32)
        _cpu.decode(pieces.view(**fields), n * cols, out.ctypes.data)
        decoded.append(out)
    _compare(pieces.slots, whole.slots, f"cut at row {at}")
    np.testing.assert_array_equal(np.concatenate(decoded), whole.decode())


@pytest.mark.parametrize("dtype", SCALES)
@pytest.mark.parametrize("format", [Format.BNB_NF4, Format.Q8_0])
@FEW
@given(rank=st.integers(1, 9), seed=st.integers(0, 2**32 - 1), cut=st.integers(0, 8 * 96))
def test_a_low_rank_addition_is_summed_in_order(
    format: Format, dtype: DType, rank: int, seed: int, cut: int
) -> None:
    rng = np.random.default_rng(seed)
    rows, cols, scale = 8, 96, np.float32(0.37)
    rotary = 4 if format is Format.Q8_0 else 0
    coded = Coded(Coding(format, group=64, rotary=rotary), rows, cols)
    plain = coded.encode(rng.standard_normal((rows, cols))).decode().reshape(rows, cols)
    a = rounded(rng.standard_normal((rank, cols)), dtype)
    b = rounded(rng.standard_normal((rows, rank)), dtype)
    total = np.zeros((rows, cols), np.float32)
    for j in range(rank):
        total += b[:, j : j + 1] * a[j]
    want = (plain + scale * total).reshape(-1)
    stored = [torch.from_numpy(v).to(getattr(torch, dtype.torch)) for v in (a, b)]
    coded.fields |= {
        "low_a": stored[0].data_ptr(), "low_b": stored[1].data_ptr(), "rank": rank,
        "low_type": dtype.code, "low_scale": float(scale),
    }  # fmt: skip

    for isa in ISAS:
        assert _cpu.set_isa(isa)
        np.testing.assert_array_equal(coded.decode(cut), want[cut:], isa)


# ---- scales --------------------------------------------------------------------------------------


@pytest.mark.parametrize("table_rule", [True, False])
@FEW
@given(blocks=st.integers(1, 600), seed=st.integers(0, 2**32 - 1), zeros=st.booleans())
def test_scales_of_scales_are_the_oracles(
    table_rule: bool, blocks: int, seed: int, zeros: bool
) -> None:
    absmax = np.random.default_rng(seed).gamma(2.0, 0.02, blocks).astype(np.float32)
    absmax[: 256 * zeros] = 0.5
    offset = np.float32(0.5) if zeros else absmax.mean(dtype=np.float32)
    codes, nested = np.empty(blocks, np.uint8), np.empty(-(-blocks // 256), np.float32)

    places = codes.ctypes.data, nested.ctypes.data
    _cpu.encode_nested(absmax.ctypes.data, blocks, float(offset), table_rule, *places)

    want_codes, want_nested = oracle.nested_codes(absmax, offset, table_rule)
    np.testing.assert_array_equal(nested, want_nested)
    np.testing.assert_array_equal(codes, want_codes)


@pytest.mark.parametrize("dtype", SCALES)
@pytest.mark.parametrize("peak", [0.0, 1e-45, 1e-38, 0.0123, 1.0, 5.99, 448.0, 3e38])
def test_the_scale_of_a_tensor(peak: float, dtype: DType) -> None:
    with np.errstate(all="ignore"):
        value = np.float32(oracle.in_type(np.float32(peak), dtype))
        divisor = oracle.nvfp4_divisor(dtype, value)
    got = _cpu.tensor_scale(
        Coded(Coding(Format.NVFP4, dtype, group=16), 1, 16).view(), float(value)
    )
    assert np.float32(got) == divisor
    got = _cpu.tensor_scale(Coded(Coding(Format.FP8, dtype), 1, 16).view(), float(value))
    assert np.float32(got) == (value / np.float32(448) if value > 0 else 1)


SEARCHED = {
    n: c for n, c in CODINGS.items()
    if c.search and c.format not in (Format.Q4_K, Format.Q8_0)
}  # fmt: skip


@pytest.mark.parametrize("name", SEARCHED)
@FEW
@given(draw=st.fixed_dictionaries(INPUTS))
def test_a_search_is_never_worse_than_the_nearest(name: str, draw: dict[str, Any]) -> None:
    kinds = [k for k in draw["kinds"] if k not in ("subnormal", "outlier")] or ["normal"]
    x = _drawn(SEARCHED[name], {**draw, "kinds": kinds})

    def error(coding: Coding) -> float:
        d = Coded(coding, *x.shape).encode(x).decode().astype(np.float64) - x.reshape(-1)
        return float((d * d).sum())

    plain = error(replace(SEARCHED[name], search=False))
    assert error(SEARCHED[name]) <= plain * (1 + 1e-5)


def test_a_search_is_better_on_normal_values() -> None:
    x = np.random.default_rng(0).standard_normal((32, 512)).astype(np.float32)
    for name, coding in SEARCHED.items():
        x_t = rounded(x, coding.dtype)
        errors = []
        for search in (False, True):
            d = Coded(replace(coding, search=search), 32, 512).encode(x_t).decode()
            errors.append(float(((d.astype(np.float64) - x_t.reshape(-1)) ** 2).sum()))
        assert errors[1] < errors[0], name


def test_what_can_only_be_read_is_not_written() -> None:
    for format in (Format.Q6_K, Format.GGUF_NVFP4, Format.INT8):
        with pytest.raises(ValueError, match="only be read"):
            _cpu.encode(Coded(Coding(format), 1, 256).view(), 0, 1, 0)
