"""Tensors in memory as codes: against bitsandbytes and plain numpy, and merges of coded and dense ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmerge
from fastmerge import ops
from fastmerge.coded_tensors import QuantTensor, code, dequantize_4bit, quantize_4bit
from fastmerge.coding import READ_ONLY, Coding, Format
from fastmerge.dtypes import DType
from fastmerge.errors import ConflictError, NonFiniteError, RecipeError
from fastmerge.evaluate import Operands
from fastmerge.quant.formats import FORMATS
from fastmerge.quant.gguf_formats import GGUF_FORMATS
from fastmerge.stages import Copy
from fastmerge.tensors import merge_state_dicts, merge_tensors, merge_to_4bit

CODED = [*FORMATS, *(name for name, kind in GGUF_FORMATS.items() if isinstance(kind, Format))]
FLOATS = [torch.float16, torch.bfloat16, torch.float32]

#: Relative RMS error on Gaussian weights that no format here exceeds: 8 bits and 4 bits, with room.
MOST_ERROR = {"fp8": 0.03, "fp8-tensor": 0.03, "fp8-block": 0.03, "q8_0": 0.01}


def weights(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 0.05).to(dtype)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    difference = found.double() - wanted.double()
    return float(difference.norm() / wanted.double().norm())


def same(a: QuantTensor, b: QuantTensor) -> bool:
    """Whether two hold the same bytes, in torch or numpy."""

    def raw(part: Any) -> bytes:
        return np.asarray(
            part if isinstance(part, np.ndarray) else part.view(torch.uint8)
        ).tobytes()

    numbers = (a.tensor_scale, a.nested_offset) == (b.tensor_scale, b.nested_offset)
    return numbers and all(raw(a.parts[slot]) == raw(b.parts[slot]) for slot in a.parts)


# ---- against the library --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(64, 128), (5, 64), (7, 100), (1, 1), (193,)], ids=str)
def test_bytes_are_those_of_bitsandbytes(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    import bitsandbytes.functional as functional

    w = weights(*shape, dtype=dtype)
    codes, state = functional.quantize_4bit(w, quant_type=kind)

    q = quantize_4bit(w, kind)

    assert torch.equal(q.parts["codes"], codes)
    assert torch.equal(q.parts["scales"], state.absmax)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_double_quantisation_is_that_of_bitsandbytes(kind: str) -> None:
    import bitsandbytes.functional as functional

    w = weights(128, 256, dtype=torch.bfloat16)
    codes, state = functional.quantize_4bit(w, quant_type=kind, compress_statistics=True)

    q = quantize_4bit(w, f"{kind}-dq")

    assert torch.equal(q.parts["codes"], codes)
    assert torch.equal(q.parts["scales"], state.absmax)
    assert torch.equal(q.parts["nested"], state.state2.absmax)
    assert q.nested_offset == state.offset.item()
    assert q.bits_per_weight == pytest.approx(4 + 8 / 64 + 32 / 64 / 256)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_decodes_what_bitsandbytes_coded(kind: str) -> None:
    import bitsandbytes.functional as functional

    codes, state = functional.quantize_4bit(weights(64, 192), quant_type=kind)
    coding = quantize_4bit(weights(64, 192), kind).coding
    q = QuantTensor(coding, (64, 192), {"codes": codes, "scales": state.absmax})
    assert torch.equal(dequantize_4bit(q), functional.dequantize_4bit(codes, state))


# ---- round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", CODED)
def test_round_trip(name: str, dtype: torch.dtype) -> None:
    w = weights(64, 256, dtype=dtype)
    q = quantize_4bit(w, name)
    back = dequantize_4bit(q)
    assert (back.dtype, back.shape) == (dtype, w.shape)
    assert relative(back, w) < MOST_ERROR.get(name, 0.14)
    assert 4 <= q.bits_per_weight <= 8.6
    assert q.nbytes == sum(p.numel() * p.element_size() for p in q.parts.values())


@pytest.mark.parametrize("name", CODED)
def test_what_a_format_holds_is_coded_without_loss(name: str) -> None:
    """Once decoded, values are on the grid: coding them again moves them by rounding of scales at most."""
    once = dequantize_4bit(quantize_4bit(weights(64, 256), name), "float32")
    again = dequantize_4bit(quantize_4bit(once, name), "float32")
    assert relative(again, once) < 0.1


@pytest.mark.parametrize("name", CODED)
def test_numpy_and_torch_agree(name: str) -> None:
    w = weights(64, 256, dtype=torch.float16)
    held, array = quantize_4bit(w, name), quantize_4bit(w.numpy(), name)
    assert same(held, array)
    back = dequantize_4bit(array)
    assert isinstance(back, np.ndarray)
    assert back.tobytes() == dequantize_4bit(held).numpy().tobytes()


def test_numpy_holds_bfloat16_as_bits() -> None:
    w = weights(64, 256)
    q = quantize_4bit(w.numpy(), "int4", dtype="bfloat16")
    assert q.parts["scales"].dtype == np.uint16
    assert same(q, quantize_4bit(w, "int4", dtype=torch.bfloat16))
    assert dequantize_4bit(q).dtype == np.float32
    with pytest.raises(RecipeError, match="bfloat16 does not exist in numpy"):
        dequantize_4bit(q, "bfloat16")


@pytest.mark.parametrize("name", CODED)
def test_backends_agree(name: str) -> None:
    w = weights(32, 256, dtype=torch.bfloat16)
    assert same(quantize_4bit(w, name), quantize_4bit(w, name, backend="reference"))
    q = quantize_4bit(w, name)
    assert torch.equal(dequantize_4bit(q), dequantize_4bit(q, backend="reference"))


def test_float64_is_coded_as_float32() -> None:
    w = weights(64, 256)
    assert same(quantize_4bit(w.double(), "nf4"), quantize_4bit(w, "nf4"))


def test_strided_and_higher_dimensional_tensors() -> None:
    w = weights(256, 64)
    assert same(quantize_4bit(w.T, "int4"), quantize_4bit(w.T.contiguous(), "int4"))
    cube = weights(4, 16, 256)
    q = quantize_4bit(cube, "nvfp4")
    assert q.shape == (4, 16, 256) and q.parts["codes"].shape == (64, 128)
    assert torch.equal(
        dequantize_4bit(q),
        dequantize_4bit(quantize_4bit(cube.view(64, 256), "nvfp4")).view(cube.shape),
    )


@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "int4", "nvfp4", "q4_0", "fp8-tensor"])
def test_zeros_and_nothing(name: str) -> None:
    assert not dequantize_4bit(quantize_4bit(torch.zeros(16, 256), name)).any()
    empty = quantize_4bit(torch.zeros(0, 256), name)
    assert dequantize_4bit(empty).shape == (0, 256) and empty.bits_per_weight == 0


@pytest.mark.parametrize(
    "name", ["nf4", "fp4", "int4", "int4-asym", "nvfp4", "mxfp4", "gptq", "awq"]
)
def test_searched_scales_lower_the_error(name: str) -> None:
    w = weights(64, 256)
    errors = {
        rounding: relative(dequantize_4bit(quantize_4bit(w, name, rounding=rounding)), w)
        for rounding in ("nearest", "mse")
    }
    # MXFP4 chooses among two powers of two, of which the larger one seldom wins.
    assert errors["mse"] < errors["nearest"] or (
        name == "mxfp4" and errors["mse"] == errors["nearest"]
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=200),
    st.sampled_from(["nf4", "fp4"]),
    st.sampled_from(FLOATS),
)
def test_flat_codes_are_the_nearest(values: list[float], kind: str, dtype: torch.dtype) -> None:
    """Of every value no other code times the block's largest magnitude is nearer."""
    w = torch.tensor(values).to(dtype)
    q = quantize_4bit(w, kind)
    if kind == "nf4":
        import bitsandbytes.functional as functional

        table = functional.get_4bit_type("nf4", device="cpu").double()
    else:
        magnitudes = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3], dtype=torch.float64) / 12
        table = torch.cat([magnitudes, -magnitudes])
    absmax = q.parts["scales"].double().repeat_interleave(64)[: w.numel()]
    reach = (table[:, None] * absmax - w.double()).abs().min(0).values
    back = dequantize_4bit(q, "float32").double()
    assert ((back - w.double()).abs() <= reach + 1e-6 * absmax).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**32 - 1), st.sampled_from(FLOATS))
def test_symmetric_integers_by_their_definition(
    rows: int, groups: int, seed: int, dtype: torch.dtype
) -> None:
    """In float64: no value is further from its code than half a step, the clamped peak but."""
    rng = np.random.default_rng(seed)
    w = torch.from_numpy(rng.standard_t(4, (rows, 32 * groups)) * 10.0 ** rng.uniform(-3, 2)).to(
        dtype
    )
    q = quantize_4bit(w, "int4-g32")
    scale = q.parts["scales"].double().repeat_interleave(32, 1)
    back = dequantize_4bit(q, "float32").double()
    steps = (back - w.double()).abs() / scale
    inside = w.double().abs() < 7 * scale
    narrow = 0.06 if dtype is torch.bfloat16 else 1e-2  # what rounding to the type adds
    assert (steps[inside] <= 0.5 + narrow).all()


# ---- merges ---------------------------------------------------------------------------------------

METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weight": [0.6, 0.4]},
    "ties": {"density": 0.5, "weight": 0.7},
    "dare_ties": {"density": 0.5, "weight": 0.7},
    "slerp": {"t": 0.3},
    "task_arithmetic": {"weight": [0.5, 0.4]},
    "model_stock": {},
    "sce": {"select_topk": 0.5},
}


def operands(method: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, list[torch.Tensor]]:
    base = weights(64, 256, seed=9, dtype=dtype)
    n = 1 if method == "slerp" else 2
    experts = [(base + weights(64, 256, seed=k) * 0.2).to(dtype) for k in range(n)]
    return (None if method == "linear" else base), experts


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name", ["nf4", "nf4-dq", "int4-asym", "nvfp4", "awq", "fp8-tensor", "q4_k"]
)
def test_merged_and_coded_at_once_is_merged_then_coded(method: str, name: str) -> None:
    base, experts = operands(method)
    params = METHODS[method]
    at_once = merge_to_4bit(base, experts, method=method, format=name, seed=3, **params)
    dense = merge_tensors(base, experts, method=method, seed=3, **params)
    assert same(at_once, quantize_4bit(dense, name))


@pytest.mark.parametrize("chunk", [1, 1000, 1 << 13])
@pytest.mark.parametrize("name", CODED)
def test_chunks_do_not_show(name: str, chunk: int) -> None:
    base, experts = operands("ties")
    how: dict[str, Any] = {"method": "ties", "format": name, "density": 0.5, "weight": 0.6}
    whole = merge_to_4bit(base, experts, **how)
    assert same(merge_to_4bit(base, experts, chunk_elements=chunk, **how), whole)


@pytest.mark.parametrize("coded", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize(
    "name", ["nf4", "nf4-dq", "int4", "int4-asym", "nvfp4", "gptq", "q4_k", "fp8"]
)
def test_coded_operands_are_what_they_decode_to(name: str, coded: tuple[int, ...]) -> None:
    base, experts = operands("ties", torch.float32)
    mixed: list[Any] = [base, *experts]
    for i in coded:
        mixed[i] = quantize_4bit(mixed[i], name)
    dense = [dequantize_4bit(x, "float32") if isinstance(x, QuantTensor) else x for x in mixed]
    how: dict[str, Any] = {"method": "ties", "density": 0.5, "weight": 0.6}

    merged = merge_tensors(mixed[0], mixed[1:], **how)

    assert merged.dtype == torch.float32
    assert torch.equal(merged, merge_tensors(dense[0], dense[1:], **how))
    again = merge_to_4bit(mixed[0], mixed[1:], format="nf4", **how)
    assert same(again, merge_to_4bit(dense[0], dense[1:], format="nf4", **how))


def test_state_dicts_of_coded_tensors() -> None:
    base, experts = operands("linear", torch.bfloat16)
    del base
    states = [{"a": quantize_4bit(e, "nf4"), "b": e} for e in experts]
    merged = merge_state_dicts(None, states, method="linear", weight=0.5)
    assert list(merged) == ["a", "b"] and merged["a"].dtype == torch.bfloat16
    dense = [dequantize_4bit(s["a"], "float32") for s in states]
    assert torch.equal(
        merged["a"], merge_tensors(None, dense, method="linear", weight=0.5).bfloat16()
    )


def test_operands_of_several_formats_types_and_libraries() -> None:
    base, experts = operands("task_arithmetic", torch.float32)
    mixed = [quantize_4bit(experts[0], "mxfp4"), experts[1].numpy()]
    merged = merge_tensors(base.bfloat16(), mixed, method="task_arithmetic", weight=0.5)
    assert merged.dtype == torch.bfloat16
    dense = [dequantize_4bit(mixed[0], "float32"), experts[1]]
    assert torch.equal(
        merged, merge_tensors(base.bfloat16(), dense, method="task_arithmetic", weight=0.5)
    )


def test_numpy_merges_into_numpy() -> None:
    base, experts = operands("ties", torch.float32)
    arrays = [e.numpy() for e in experts]
    q = merge_to_4bit(base.numpy(), arrays, method="ties", format="nf4", weight=1.0)
    assert isinstance(q.parts["codes"], np.ndarray)
    assert same(q, merge_to_4bit(base, experts, method="ties", format="nf4", weight=1.0))
    back = merge_tensors(q, [q, q], method="linear", weight=0.5)
    assert isinstance(back, np.ndarray) and back.dtype == np.float32


def test_rounding_before_codes() -> None:
    base, experts = operands("ties", torch.float32)
    q = merge_to_4bit(base, experts, method="ties", format="int4", dtype="bfloat16", weight=1.0)
    merged = merge_tensors(base, experts, method="ties", weight=1.0).bfloat16()
    assert same(q, quantize_4bit(merged, "int4"))


def test_public_names() -> None:
    assert fastmerge.quantize_4bit is quantize_4bit is ops.quantize_4bit
    assert fastmerge.dequantize_4bit is dequantize_4bit is ops.dequantize_4bit
    assert fastmerge.merge_to_4bit is merge_to_4bit is ops.merge_to_4bit
    assert fastmerge.QuantTensor is QuantTensor is ops.QuantTensor
    with pytest.raises(AttributeError, match="quantise_4bit"):
        _ = ops.quantise_4bit


# ---- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nf4", "nvfp4", "q4_0", "fp8-tensor"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_is_named(name: str, value: float) -> None:
    w = weights(16, 256)
    w[1, 44] = value
    with pytest.raises(
        NonFiniteError, match=r"^tensor holds NaN or infinity at flat index 300; mend"
    ):
        quantize_4bit(w, name)
    with pytest.raises(
        NonFiniteError, match=r"^'w' of experts\[1\] holds NaN .* index 300; mend it$"
    ):
        merge_to_4bit(None, [weights(16, 256), w], method="linear", weight=1.0,
                      format=name, name="w")  # fmt: skip


def test_nonfinite_scale_of_a_coded_operand_is_named() -> None:
    q = quantize_4bit(weights(16, 256), "nf4")
    q.parts["scales"][3] = float("inf")
    with pytest.raises(
        NonFiniteError, match=r"'tensor' of base holds NaN or infinity at flat index 19[2-9]"
    ):
        merge_tensors(q, [weights(16, 256)], method="task_arithmetic", weight=1.0)


@pytest.mark.parametrize("name", ["nf4", "nvfp4", "int4"])
def test_what_a_type_cannot_hold(name: str) -> None:
    with pytest.raises(NonFiniteError, match="beyond what float16 holds; give dtype='float32'"):
        quantize_4bit(weights(16, 256) * 1e8, name, dtype="float16")


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("int4", (8, 100), r"int4 cannot hold \[8, 100\]: 100 columns are no multiple of 128"),
        ("nvfp4", (8, 24), "24 columns are no multiple of 16"),
        ("int4-asym", (12, 128), "12 rows are no multiple of 8"),
        ("q4_k", (8, 128), r"q4_k cannot hold \[8, 128\]: 128 columns are no multiple of 256"),
        ("gptq", (16, 128), "no multiple of 32 x 32"),
        ("q4_0", (33,), "33 columns are no multiple of 32"),
    ],
)
def test_shapes_that_do_not_fit(name: str, shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(ConflictError, match=reason):
        quantize_4bit(torch.ones(shape), name)
    with pytest.raises(ConflictError, match=reason):
        merge_to_4bit(None, [torch.ones(shape)] * 2, method="linear", weight=1.0, format=name)


@pytest.mark.parametrize("name", ["nf5", "gguf-f16", ""])
def test_unknown_formats(name: str) -> None:
    with pytest.raises(RecipeError, match=f"no format is called '{name}'; known are nf4, fp4"):
        quantize_4bit(torch.ones(8, 64), name)


def test_other_arguments() -> None:
    with pytest.raises(RecipeError, match="rounding must be one of nearest, mse, got 'best'"):
        quantize_4bit(torch.ones(8, 64), rounding="best")
    with pytest.raises(RecipeError, match="dtype must be one of float16"):
        quantize_4bit(torch.ones(8, 64), dtype=torch.int8)
    with pytest.raises(ConflictError, match="tensor is int64"):
        quantize_4bit(torch.ones(8, 64, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda p: p | {"scales": p["scales"][1:]},
         r"'scales' of bnb_nf4 \[8, 64\] must be float32 \[8\], got float32 \[7\]"),
        (lambda p: p | {"codes": p["codes"].float()}, r"must be uint8 \[256, 1\], got float32"),
        (lambda p: {"codes": p["codes"]}, r"bnb_nf4 \[8, 64\] lacks its part 'scales'"),
        (lambda p: p | {"zeros": p["scales"]}, "has no part 'zeros'; its parts are codes, scales"),
        (lambda p: p | {"scales": torch.ones(16)[::2]}, "is strided; pass a contiguous one"),
        (lambda p: p | {"scales": 3}, "must be float32 .*, got int"),
        (lambda p: p | {"scales": p["scales"].to("meta")}, "one device"),
    ],
)  # fmt: skip
def test_wrong_parts(change: Any, reason: str) -> None:
    q = quantize_4bit(weights(8, 64), "nf4")
    with pytest.raises(ConflictError, match=reason):
        QuantTensor(q.coding, q.shape, change(dict(q.parts)))


def test_shapes_of_coded_operands_must_agree() -> None:
    q = quantize_4bit(weights(8, 64), "nf4")
    with pytest.raises(
        ConflictError, match=r"\[8, 64\] in experts\[0\] but \[8, 128\] in experts\[1\]"
    ):
        merge_tensors(None, [q, weights(8, 128)], method="linear", weight=1.0)


@pytest.mark.parametrize("kind", READ_ONLY, ids=lambda kind: kind.name)
def test_formats_that_are_only_read_are_not_written(kind: Format) -> None:
    w = weights(4, 256)
    operands = Operands(None, [ops.buffer_of(w, "w")], 256, DType.F32)
    with pytest.raises(ConflictError, match=f"{kind.name.lower()} is only read"):
        code(ops.choose("cpu", None), Copy(), operands, Coding(kind), w)
