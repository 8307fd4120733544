"""bitsandbytes: NF4 and FP4 with or without double quantisation, and LLM.int8 as an input.

Blocks run over the flattened tensor. Beside the codes `P.weight` lie `P.weight.absmax`, the table of values
and a JSON object with the shape; 8 bits: `P.SCB`, the largest magnitudes of rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from fastmerge.checkpoint.files import parse_json
from fastmerge.checkpoint.header import TensorInfo
from fastmerge.checkpoint.wording import place, shown
from fastmerge.coding import Coding, Format, ScaleType, parts_of
from fastmerge.dtypes import BY_TORCH, DType
from fastmerge.errors import CheckpointError
from fastmerge.quant.format import Constant, Part, Quantised, Scales
from fastmerge.quant.modules import is_head, left_out
from fastmerge.quant.stored import SCALE_TYPES, Found, Module, Stored, coded

_FORMATS = {"nf4": Format.BNB_NF4, "fp4": Format.BNB_FP4}
_NESTED_BLOCK = 256
_STATE = "quant_state.bitsandbytes__"
_WORDS = (
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    _STATE + "nf4",
    _STATE + "fp4",
)
_KEYS = ("quant_type", "blocksize", "dtype", "shape")
_NESTED_KEYS = ("nested_blocksize", "nested_dtype", "nested_offset")
_STATE_LIMIT = 4096  # bytes; real ones have 200
_SLOTS = {"codes": "", "scales": ".absmax", "nested": ".nested_absmax"}

#: Characters of the longest number that a float32 above zero is written as.
_LONGEST = 24

_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # times 12


@cache
def quant_map(kind: str) -> npt.NDArray[np.float32]:
    """Return the values of the 16 codes of nf4 or fp4."""
    if kind == "nf4":
        return np.array(_NF4, np.float32)
    values = np.array(_FP4, np.float32) / np.float32(12)
    return np.concatenate([values, 0 - values])  # both zeros are +0


@cache
def dynamic_map() -> npt.NDArray[np.float32]:
    """Return the values of the 256 codes of a scale: means of even steps in seven decades, both signs.

    Steps go from either end to the middle, each with one rounding, as torch's linspace has them.
    """
    low, one = np.float32(0.1), np.float32(1)
    values = [np.array([0, 1], np.float32)]
    for i in range(7):
        n = 2**i
        step = np.float64((one - low) / np.float32(n))
        k = np.arange(n + 1)
        ends = np.where(k < (n + 1) // 2, low + k * step, one - (n - k) * step).astype(np.float32)
        means = np.float32(10.0 ** (i - 6)) * ((ends[:-1] + ends[1:]) / np.float32(2))
        values += [means, -means]
    return np.sort(np.concatenate(values))


# ---- as an input --------------------------------------------------------------------------------


def read(stored: Stored, config: Mapping[str, Any]) -> Iterator[Found]:
    """Yield the coded tensors of a checkpoint that bitsandbytes wrote."""
    eight = config.get("load_in_8bit", config.get("_load_in_8bit"))
    if eight is True:
        yield from map(_read_int8, stored.modules(("SCB", "weight_format")))
    elif config.get("load_in_4bit", config.get("_load_in_4bit")) is True:
        yield from map(_read_four, stored.modules(_WORDS))
    else:
        raise CheckpointError(
            f"{place(stored.path)}: quantization_config of bitsandbytes sets neither load_in_4bit nor "
            "load_in_8bit to true; download config.json again"
        )


def _read_four(module: Module) -> Found:
    kind, state = _state(module)
    of = f"bitsandbytes {kind}"
    shape, group, nested = state["shape"], state["blocksize"], "nested_offset" in state
    n = math.prod(shape)
    blocks = -(-n // group)
    _table(module, "quant_map", quant_map(kind), of)
    read = {"quant_map", _STATE + kind}
    parts = {"codes": _codes(module, n, of)}
    if nested:
        _table(module, "nested_quant_map", dynamic_map(), of)
        read.add("nested_quant_map")
        parts["scales"] = module.need("absmax", (DType.U8,), (blocks,), of=of)
        over = -(-blocks // _NESTED_BLOCK)
        parts["nested"] = module.need("nested_absmax", (DType.F32,), (over,), of=of)
    else:
        parts["scales"] = module.need("absmax", (DType.F32,), (blocks,), of=of)
    known = {info.name for info in parts.values()} | {module.full(word) for word in read}
    for word, info in module.tensors.items():
        if info.name not in known:
            module.fail(word, f"does not belong to {of}, whose readers refuse it", "remove it")
    dtype = BY_TORCH[state["dtype"]]
    coding = _coding(kind, dtype, group, nested)
    offset = state.get("nested_offset", 0.0)
    weight = coded(module.name, dtype, shape, coding, parts, nested_offset=offset)
    return Found(weight, module, read)


def _state(module: Module) -> tuple[str, dict[str, Any]]:
    """Return nf4 or fp4 and the object that describes a weight, checked."""
    kinds = [kind for kind in _FORMATS if _STATE + kind in module.tensors]
    kind = kinds[0] if kinds else "nf4"
    word, of = _STATE + kind, f"bitsandbytes {kind}"
    info = module.need(word, (DType.U8,), of=of)
    if len(info.shape) != 1 or info.n_bytes > _STATE_LIMIT:
        module.fail(word, f"has shape {shown(list(info.shape))}, but holds one short line of text")
    where = f"{place(info.file)}: tensor {shown(info.name)}"
    state = parse_json(module.stored.read(info), where, strict=True)
    if not isinstance(state, dict):
        module.fail(word, f"is not a JSON object but {shown(state)}")
    nested = any(key in state for key in _NESTED_KEYS) or "nested_absmax" in module.tensors
    keys = _KEYS + (_NESTED_KEYS if nested else ())
    for key in keys:
        if key not in state:
            module.fail(word, f"has no {key}")
    for key in state:
        if key not in keys:
            module.fail(word, f"has an unknown key {shown(key)}")
    _check_state(module, word, state, kind)
    return kind, state | {"shape": tuple(state["shape"])}


def _check_state(module: Module, word: str, state: Mapping[str, Any], kind: str) -> None:
    def check(key: str, good: bool, wanted: str) -> None:
        if not good:
            module.fail(word, f"has {key} {shown(state[key])}, but {wanted} is needed")

    shape, block = state["shape"], state["blocksize"]
    check("quant_type", state["quant_type"] == kind, kind)
    check("blocksize", _is_whole(block) and block in (2**i for i in range(5, 13)), "32 to 4096")
    known = isinstance(state["dtype"], str) and BY_TORCH.get(state["dtype"]) in SCALE_TYPES
    check("dtype", known, "float32, float16 or bfloat16")
    sizes = isinstance(shape, list) and len(shape) == 2 and all(map(_is_whole, shape))
    check("shape", sizes and min(shape) > 0, "[out, in] of a matrix")
    if "nested_offset" in state:
        check("nested_blocksize", state["nested_blocksize"] == _NESTED_BLOCK, str(_NESTED_BLOCK))
        check("nested_dtype", state["nested_dtype"] == "float32", "float32")
        offset = state["nested_offset"]
        number = isinstance(offset, float) or _is_whole(offset)
        check("nested_offset", number and abs(offset) < 3e38, "a number that float32 holds")


def _is_whole(value: Any) -> bool:
    return type(value) is int  # bool is an int to Python


def _codes(module: Module, n: int, of: str) -> TensorInfo:
    """Return the codes, whose bytes may be stored as those of any type."""
    stored = (DType.U8, DType.I8, DType.BF16, DType.F16, DType.F32, DType.F64)
    info = module.need("", stored, of=of)
    if info.n_bytes != -(-n // 2) or info.shape != (info.n, 1):
        module.fail(
            "",
            f"has shape {shown(list(info.shape))}, but {of} of {n} elements needs {-(-n // 2)} bytes",
        )
    return info


def _table(module: Module, word: str, known: npt.NDArray[np.float32], of: str) -> None:
    """Refuse a table that is not the library's; its last bit depends on the machine that wrote it."""
    table = module.numbers(module.need(word, (DType.F32,), known.shape, of=of))
    if not np.allclose(table, known, rtol=5e-7, atol=0):
        i = int(np.argmax(~np.isclose(table, known, rtol=5e-7, atol=0)))
        module.fail(word, f"has {table[i]} at {i}, but {of} has {known[i]}")


def _read_int8(module: Module) -> Found:
    of = "bitsandbytes LLM.int8"
    codes = module.matrix("weight", (DType.I8,), of=of)
    rows, cols = codes.shape
    scales = module.need("SCB", (DType.F32,), (rows,), of=of)
    if "weight_format" in module.tensors:
        info = module.need("weight_format", (DType.U8,), (), (1,), of=of)
        if layout := int(module.numbers(info)[0]):
            module.fail(
                "weight_format",
                f"is {layout}, an order of one kind of GPU; only 0, row by row, is read",
                "save the model again with a newer bitsandbytes",
            )
    for word in module.tensors:
        if "." not in word and word not in ("weight", "SCB", "weight_format", "bias"):
            module.fail(word, f"does not belong to {of}", "remove it")
    dtype = module.stored.dtype
    coding = Coding(Format.INT8, dtype, ScaleType.F32)
    parts = {"codes": codes, "scales": scales}
    return Found(
        coded(module.full("weight"), dtype, (rows, cols), coding, parts), module, {"weight_format"}
    )


# ---- as an output -------------------------------------------------------------------------------


def _coding(kind: str, dtype: DType, group: int, nested: bool) -> Coding:
    scale = ScaleType.U8 if nested else ScaleType.F32
    return Coding(_FORMATS[kind], dtype, scale, group=group, nested=nested)


@dataclass(frozen=True)
class Bitsandbytes:
    """NF4 or FP4 in blocks of 64, `nested` with 8-bit scales."""

    name: str
    kind: str
    nested: bool = False
    group: int = 64
    family: str = "bitsandbytes"

    def coding(self, dtype: DType, shape: tuple[int, ...]) -> Coding:
        return _coding(self.kind, dtype, self.group, self.nested)

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        return None

    def parts(self, name: str, shape: tuple[int, ...], coding: Coding) -> Sequence[Part]:
        specs = parts_of(coding, *shape)
        return [Part(s.slot, name + _SLOTS[s.slot], s.dtype, s.shape) for s in specs]

    def constants(self, name: str, shape: tuple[int, ...], coding: Coding) -> Sequence[Constant]:
        table = Constant(f"{name}.quant_map", DType.F32, (16,), quant_map(self.kind).tobytes())
        state = f"{name}.{_STATE}{self.kind}"
        if not self.nested:
            text = self._state(shape, coding)
            return [table, Constant(state, DType.U8, (len(text),), text)]
        scales = dynamic_map().tobytes()
        size = len(self._state(shape, coding, 0.0)) - len("0.0") + _LONGEST
        return [
            table,
            Constant(f"{name}.nested_quant_map", DType.F32, (256,), scales),
            Constant(state, DType.U8, (size,), None),
        ]

    def late(self, name: str, shape: tuple[int, ...], coding: Coding, scales: Scales) -> bytes:
        # The header is written before the offset is known, so the text has room: JSON may end in spaces.
        text = self._state(shape, coding, scales.nested_offset)
        return text.ljust(len(self._state(shape, coding, 0.0)) - len("0.0") + _LONGEST)

    def _state(self, shape: tuple[int, ...], coding: Coding, offset: float | None = None) -> bytes:
        state: dict[str, Any] = {
            "quant_type": self.kind,
            "blocksize": coding.group,
            "dtype": coding.dtype.torch,
            "shape": list(shape),
        }
        if offset is not None:
            state["nested_blocksize"] = _NESTED_BLOCK
            state["nested_dtype"] = "float32"
            state["nested_offset"] = float(np.float32(offset))
        return json.dumps(state).encode()

    def config(self, model: Quantised) -> Mapping[str, Any]:
        # The library leaves the output head alone by itself, unless it is given a list.
        head = any(map(is_head, model.coded))
        skip = left_out(model) if head or not all(map(is_head, model.kept)) else None
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": self.kind,
            "bnb_4bit_use_double_quant": self.nested,
            "bnb_4bit_compute_dtype": model.dtype.torch,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_threshold": 6.0,
            "llm_int8_skip_modules": skip,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
        }

    def files(self, model: Quantised) -> Mapping[str, bytes]:
        return {}
