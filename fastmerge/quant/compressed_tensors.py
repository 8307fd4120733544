"""compressed-tensors: int4, NVFP4, MXFP4 and FP8 weights, described by groups of modules in config.json."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from fastmerge.checkpoint.header import TensorInfo
from fastmerge.checkpoint.wording import place, shown
from fastmerge.coding import Coding, Format, ScaleType, parts_of
from fastmerge.dtypes import DType
from fastmerge.errors import CheckpointError
from fastmerge.quant.format import Constant, Part, Quantised, Scales
from fastmerge.quant.modules import left_out, module_of
from fastmerge.quant.stored import SCALE_TYPES, Found, Module, Stored, coded, scale_type

_WORDS = (
    *("weight_packed", "weight_scale", "weight_zero_point", "weight_global_scale"),
    *("weight_shape", "weight_g_idx"),
)
_SLOTS = {"codes": "weight_packed", "scales": "weight_scale", "zeros": "weight_zero_point"}
_REMEDY = "load the model with transformers and save it in bfloat16 first"
_FLOATS = tuple(SCALE_TYPES)

#: Names of formats that are read, and what they are for.
_READ = {
    "pack-quantized": "int4",
    "nvfp4-pack-quantized": "nvfp4",
    "mxfp4-pack-quantized": "mxfp4",
    "float-quantized": "fp8",
    "naive-quantized": "fp8",
}


# ---- what config.json says ----------------------------------------------------------------------


@dataclass(frozen=True)
class Scheme:
    """How the modules of one config group are coded. group, group_rows: as in Coding."""

    targets: tuple[str, ...]
    format: str
    kind: str  # a value of _READ
    group: int
    group_rows: int
    symmetric: bool


class _Groups:
    """config_groups, read strictly; errors name the key."""

    def __init__(self, stored: Stored, config: Mapping[str, Any]) -> None:
        self.where = f"{place(stored.path)}: quantization_config of compressed-tensors"
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            self.fail("config_groups", groups)
        for key in ("sparsity_config", "transform_config"):
            inner = config.get(key) or {}
            if inner and not (isinstance(inner, dict) and inner.get("format") == "dense"):
                self.fail(key, inner)
        overall = config.get("format")
        if overall is not None and overall != "mixed-precision" and _kind(overall) is None:
            self.fail("format", overall)
        self.schemes = [self._scheme(k, g, overall) for k, g in groups.items()]

    def fail(self, key: str, value: Any) -> NoReturn:
        raise CheckpointError(f"{self.where} has {key} {shown(value)}, not supported; {_REMEDY}")

    def _scheme(self, key: str, group: Any, overall: Any) -> Scheme:
        if not isinstance(group, dict):
            self.fail(key, group)
        weights, targets = group.get("weights"), group.get("targets")
        if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
            self.fail(f"{key}.targets", targets)
        if not isinstance(weights, dict):
            self.fail(f"{key}.weights", weights)
        name = group.get("format") or overall
        if name is None or name == "mixed-precision":
            name = _implied(weights)
        kind = _kind(name)
        if kind is None:
            self.fail(f"{key}.format", name)
        group_size, group_rows = self._blocks(f"{key}.weights", weights, kind)
        symmetric = weights.get("symmetric", True) is not False
        if not symmetric and kind != "int4":
            self.fail(f"{key}.weights.symmetric", False)
        return Scheme(tuple(targets), name, kind, group_size, group_rows, symmetric)

    def _blocks(self, place: str, weights: Mapping[str, Any], kind: str) -> tuple[int, int]:
        """Return group and group_rows, after a check of bits, type and strategy."""
        want = {"int4": ("int", 4), "fp8": ("float", 8)}.get(kind, ("float", 4))
        for key, value in zip(("type", "num_bits"), want, strict=True):
            if weights.get(key) != value:
                self.fail(f"{place}.{key}", weights.get(key))
        strategy, size = weights.get("strategy"), weights.get("group_size")
        if strategy is None:
            strategy = "tensor" if size is None else "channel" if size == -1 else "group"
        if strategy in ("group", "tensor_group"):
            fixed = {"nvfp4": 16, "mxfp4": 32}.get(kind)
            if type(size) is not int or size < 1 or size % 2 or (fixed and size != fixed):
                self.fail(f"{place}.group_size", size)
            return size, 1
        if strategy == "channel" and kind in ("int4", "fp8"):
            return 0, 1
        if strategy == "tensor" and kind == "fp8":
            return 0, 0
        if strategy == "block" and kind == "fp8":
            return self._block_structure(place, weights.get("block_structure"))
        self.fail(f"{place}.strategy", strategy)

    def _block_structure(self, place: str, value: Any) -> tuple[int, int]:
        sizes = value
        if isinstance(value, str) and re.fullmatch(r"\d{1,6}x\d{1,6}", value, re.ASCII):
            sizes = [int(v) for v in value.split("x")]
        good = isinstance(sizes, list) and len(sizes) == 2 and all(type(v) is int for v in sizes)
        if not good or min(sizes) < 1:
            self.fail(f"{place}.block_structure", value)
        return sizes[1], sizes[0]

    def of(self, module: Module) -> Scheme:
        """Return the scheme whose targets name the module, else match it, else name its class."""
        for matches in (_names, _matches, _is_class):
            for scheme in self.schemes:
                if any(matches(target, module.name) for target in scheme.targets):
                    return scheme
        word = next(iter(module.tensors))
        module.fail(word, "is of a module that no config group targets", "mend config.json")


def _kind(name: Any) -> str | None:
    return _READ.get(name) if isinstance(name, str) else None


def _implied(weights: Mapping[str, Any]) -> str:
    """Return the format of a group that does not say it; what does not fit it is refused later."""
    if weights.get("type") == "int":
        return "pack-quantized"
    if weights.get("num_bits") == 8:
        return "float-quantized"
    return "mxfp4-pack-quantized" if weights.get("group_size") == 32 else "nvfp4-pack-quantized"


def _names(target: str, module: str) -> bool:
    return target == module


def _matches(target: str, module: str) -> bool:
    if not target.startswith("re:"):
        return False
    try:
        return re.match(target[3:], module) is not None
    except re.error:
        return False


def _is_class(target: str, module: str) -> bool:
    return target == "Linear"


# ---- as an input --------------------------------------------------------------------------------


def read(stored: Stored, config: Mapping[str, Any]) -> Iterator[Found]:
    """Yield the coded tensors of a checkpoint that compressed-tensors wrote."""
    groups = _Groups(stored, config)
    for module in stored.modules(_WORDS):
        scheme = groups.of(module)
        if "weight_g_idx" in module.tensors:
            module.fail("weight_g_idx", "orders columns by activation, not supported", _REMEDY)
        if scheme.symmetric and "weight_zero_point" in module.tensors:
            _check_zero(module, module.tensors["weight_zero_point"])
        yield {"int4": _read_int4, "fp8": _read_fp8}.get(scheme.kind, _read_fp4)(module, scheme)


def _check_zero(module: Module, info: TensorInfo) -> None:
    """Refuse zero points of a symmetric weight unless they are all 0, as old versions stored them."""
    zero = b"\x88" if info.dtype is DType.I32 else b"\0"
    if module.stored.read(info).strip(zero):
        module.fail(
            "weight_zero_point", "is not 0, but config.json says that weights are symmetric"
        )


def _read_int4(module: Module, scheme: Scheme) -> Found:
    of = scheme.format
    info = module.need("weight_shape", (DType.I64, DType.I32), (2,), of=of)
    rows, cols = (int(v) for v in module.numbers(info))
    if min(rows, cols) < 1 or (scheme.group and cols % scheme.group):
        module.fail(
            "weight_shape", f"is [{rows}, {cols}], no matrix of columns in groups of {scheme.group}"
        )
    groups = cols // (scheme.group or cols)
    parts = {
        "codes": module.need("weight_packed", (DType.I32,), (rows, -(-cols // 8)), of=of),
        "scales": module.need("weight_scale", _FLOATS, (rows, groups), of=of),
    }
    if not scheme.symmetric:
        packed = (-(-rows // 8), groups)
        parts["zeros"] = module.need("weight_zero_point", (DType.I32,), packed, of=of)
    scale = parts["scales"].dtype
    coding = Coding(
        Format.INT4, scale, SCALE_TYPES[scale], group=scheme.group, symmetric=scheme.symmetric
    )
    return _found(module, (rows, cols), coding, parts, {"weight_shape"})


def _read_fp4(module: Module, scheme: Scheme) -> Found:
    of = scheme.format
    packed = module.matrix("weight_packed", (DType.U8,), of=of)
    rows, cols = packed.shape[0], 2 * packed.shape[1]
    if cols % scheme.group:
        shape = shown(list(packed.shape))
        module.fail(
            "weight_packed", f"has shape {shape}: {cols} columns, not in groups of {scheme.group}"
        )
    groups = (rows, cols // scheme.group)
    if scheme.kind == "mxfp4":
        exponents = (DType.U8, DType.F8_E8M0)
        parts = {"codes": packed, "scales": module.need("weight_scale", exponents, groups, of=of)}
        coding = Coding(Format.MXFP4, module.stored.dtype, ScaleType.E8M0, group=32)
        return _found(module, (rows, cols), coding, parts, set())
    scales = module.need("weight_scale", (DType.F8_E4M3,), groups, of=of)
    divisor = module.positive("weight_global_scale", of=of)
    coding = Coding(Format.NVFP4, module.stored.dtype, ScaleType.E4M3, group=16)
    parts = {"codes": packed, "scales": scales}
    read = {"weight_global_scale"}
    return _found(module, (rows, cols), coding, parts, read, tensor_scale=divisor)


def _read_fp8(module: Module, scheme: Scheme) -> Found:
    codes = module.matrix("weight", (DType.F8_E4M3,), of=scheme.format)
    rows, cols = codes.shape
    shapes: tuple[tuple[int, ...], ...]
    if scheme.group_rows == 0:
        shapes = ((1,), (), (1, 1))
    elif scheme.group == 0:
        shapes = ((rows, 1), (rows,))
    else:
        shapes = ((-(-rows // scheme.group_rows), -(-cols // scheme.group)),)
    scales = module.need("weight_scale", _FLOATS, *shapes, of=scheme.format)
    coding = Coding(
        *(Format.FP8, module.stored.dtype, scale_type(scales), scheme.group, scheme.group_rows)
    )
    return _found(module, (rows, cols), coding, {"codes": codes, "scales": scales}, set())


def _found(
    module: Module,
    shape: tuple[int, int],
    coding: Coding,
    parts: Mapping[str, TensorInfo],
    read: set[str],
    tensor_scale: float = 1.0,
) -> Found:
    name, dtype = module.full("weight"), module.stored.dtype
    weight = coded(name, dtype, shape, coding, parts, tensor_scale=tensor_scale)
    return Found(weight, module, read)


# ---- as an output -------------------------------------------------------------------------------


@dataclass(frozen=True)
class CompressedTensors:
    """Any format of the family; group and group_rows as in Coding."""

    name: str
    format: Format
    group: int = 0
    group_rows: int = 1
    symmetric: bool = True
    family: str = "compressed-tensors"

    def coding(self, dtype: DType, shape: tuple[int, ...]) -> Coding:
        fixed = {Format.NVFP4: ScaleType.E4M3, Format.MXFP4: ScaleType.E8M0}
        scale = fixed.get(self.format) or SCALE_TYPES[dtype]
        return Coding(self.format, dtype, scale, self.group, self.group_rows, self.symmetric)

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        rows, cols = shape
        if self.group and cols % self.group:
            return f"{cols} columns are no multiple of {self.group}"
        if not self.symmetric and (rows % 8 or rows <= 8):
            return f"{rows} rows are no multiple of 8 above 8, in which zero points are packed"
        return None

    def parts(self, name: str, shape: tuple[int, ...], coding: Coding) -> Sequence[Part]:
        module, slots = module_of(name), _SLOTS
        if self.format is Format.FP8:
            slots = _SLOTS | {"codes": "weight"}
        specs = parts_of(coding, *shape)
        return [Part(s.slot, f"{module}.{slots[s.slot]}", s.dtype, s.shape) for s in specs]

    def constants(self, name: str, shape: tuple[int, ...], coding: Coding) -> Sequence[Constant]:
        module = module_of(name)
        if self.format is Format.INT4:
            content = struct.pack("<2q", *shape)
            return [Constant(f"{module}.weight_shape", DType.I64, (2,), content)]
        if self.format is Format.NVFP4:
            return [Constant(f"{module}.weight_global_scale", DType.F32, (1,), None)]
        return []

    def late(self, name: str, shape: tuple[int, ...], coding: Coding, scales: Scales) -> bytes:
        return struct.pack("<f", scales.tensor_scale)

    def config(self, model: Quantised) -> Mapping[str, Any]:
        schemes: dict[str, list[str]] = {}  # by what tells them apart, in order
        described: dict[str, dict[str, Any]] = {}
        for name, coding in model.coded.items():
            scheme = _described(coding)
            schemes.setdefault(str(scheme), []).append(name)
            described[str(scheme)] = scheme
        # The commonest is that of every Linear that is not named: other groups name theirs.
        order = sorted(schemes, key=lambda key: -len(schemes[key]))
        groups, formats = {}, []
        for i, key in enumerate(order):
            scheme = described[key]
            formats.append(scheme.pop("format"))
            targets = [module_of(n) for n in schemes[key]] if i else ["Linear"]
            groups[f"group_{i}"] = {"targets": targets} | scheme
        mixed = len(set(formats)) > 1
        if mixed:
            for group, name in zip(groups.values(), formats, strict=True):
                group["format"] = name
        return {
            "quant_method": "compressed-tensors",
            "format": "mixed-precision" if mixed else formats[0],
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": left_out(model),
            "config_groups": groups,
        }

    def files(self, model: Quantised) -> Mapping[str, bytes]:
        return {}


def _described(coding: Coding) -> dict[str, Any]:
    """Return a config group without its targets, and its format."""
    f = coding.format
    weights: dict[str, Any] = {
        "num_bits": 8 if f is Format.FP8 else 4,
        "type": "int" if f is Format.INT4 else "float",
        "symmetric": coding.symmetric,
    }
    if f is Format.NVFP4:
        weights |= {
            "strategy": "tensor_group",
            "group_size": 16,
            "scale_dtype": "torch.float8_e4m3fn",
        }
    elif f is Format.MXFP4:
        weights |= {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    elif coding.group:
        weights |= {"strategy": "group", "group_size": coding.group}
    else:
        weights |= {"strategy": "channel" if coding.group_rows else "tensor", "group_size": None}
    weights |= {
        "dynamic": False,
        "observer": "minmax",
        "observer_kwargs": {},
        "block_structure": None,
        "actorder": None,
    }
    # FP8 products are of FP8 with FP8: rows of the other side are coded as they come.
    tokens = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "token",
        "group_size": None,
        "dynamic": True,
    }
    return {
        "input_activations": tokens if f is Format.FP8 else None,
        "output_activations": None,
        "weights": weights,
        "format": {
            Format.INT4: "pack-quantized",
            Format.NVFP4: "nvfp4-pack-quantized",
            Format.MXFP4: "mxfp4-pack-quantized",
            Format.FP8: "float-quantized",
        }[f],
    }
