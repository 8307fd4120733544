"""GPTQ: int4 with a scale and a zero point per group, eight inputs of one output in a word."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

import numpy as np

from fastmerge.checkpoint.wording import place, shown
from fastmerge.coding import Coding, Format, ScaleType, parts_of
from fastmerge.dtypes import DType
from fastmerge.errors import CheckpointError
from fastmerge.quant.format import Constant, Part, Quantised, Scales
from fastmerge.quant.modules import is_head, left_out, module_of
from fastmerge.quant.stored import Found, Module, Stored, coded

WORDS = ("qweight", "qzeros", "scales", "g_idx")
SLOTS = {"codes": "qweight", "scales": "scales", "zeros": "qzeros"}
SIDE_FILE = "quantize_config.json"


def refuse(stored: Stored, method: str, key: str, value: Any) -> NoReturn:
    raise CheckpointError(
        f"{place(stored.path)}: quantization_config of {method} has {key} {shown(value)}, not supported; "
        "load the model with transformers and save it in bfloat16 first"
    )


def group_size(stored: Stored, method: str, config: Mapping[str, Any]) -> int:
    """Return the columns of a group, 0 for all, of a configuration that must be of 4 bits."""
    if config.get("bits") != 4:
        refuse(stored, method, "bits", config.get("bits"))
    size = config.get("group_size", 128)
    if size == -1:
        return 0
    if type(size) is not int or size < 8 or size % 8:
        refuse(stored, method, "group_size", size)
    return size


def read(stored: Stored, config: Mapping[str, Any]) -> Iterator[Found]:
    """Yield the coded tensors of a checkpoint that AutoGPTQ or GPTQModel wrote."""
    size = group_size(stored, "gptq", config)
    version = config.get("checkpoint_format") or config.get("format") or "gptq"
    if version not in ("gptq", "gptq_v2") or config.get("is_marlin_format"):
        refuse(stored, "gptq", "checkpoint_format", version if version != "gptq" else "marlin")
    rules = config.get("dynamic") or {}
    for rule in rules if isinstance(rules, dict) else [rules]:
        if not (isinstance(rule, str) and rule.startswith("-:")):
            refuse(stored, "gptq", "dynamic", rules)
    for module in stored.modules(WORDS):
        yield _read(module, size, version == "gptq")


def _read(module: Module, size: int, v1: bool) -> Found:
    of = "gptq"
    codes = module.matrix("qweight", (DType.I32,), of=of)
    cols, rows = 8 * codes.shape[0], codes.shape[1]
    if rows % 8 or (size and cols % size):
        shape = shown(list(codes.shape))
        module.fail("qweight", f"has shape {shape}, which groups of {size} do not fit")
    groups = cols // (size or cols)
    parts = {
        "codes": codes,
        "scales": module.need("scales", (DType.F16,), (groups, rows), of=of),
        "zeros": module.need("qzeros", (DType.I32,), (groups, rows // 8), of=of),
    }
    if "g_idx" in module.tensors:
        info = module.need("g_idx", (DType.I32,), (cols,), of=of)
        order = module.numbers(info)
        if order.min() < 0 or order.max() >= groups:
            module.fail("g_idx", f"names group {order.max()} or {order.min()} of {groups}")
        if order.tobytes() != _in_order(cols, size or cols):
            parts["group_of"] = info
    # Zero points are always stored: no need to trust config.json on whether they are all the same.
    dtype = module.stored.dtype
    coding = Coding(Format.GPTQ, dtype, ScaleType.F16, group=size, symmetric=False, v1=v1)
    weight = coded(module.full("weight"), dtype, (rows, cols), coding, parts)
    return Found(weight, module, {"g_idx"})


@lru_cache(maxsize=64)
def _in_order(cols: int, group: int) -> bytes:
    return (np.arange(cols, dtype="<i4") // np.int32(group)).tobytes()


# ---- as an output -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gptq:
    """Version 1 stores zero points less one, version 2 as they are."""

    name: str
    symmetric: bool = True
    v1: bool = True
    group: int = 128

    @property
    def family(self) -> str:
        return self.name  # one description for all modules of a folder

    def coding(self, dtype: DType, shape: tuple[int, ...]) -> Coding:
        return Coding(
            *(Format.GPTQ, dtype, ScaleType.F16),
            group=self.group,
            symmetric=self.symmetric,
            v1=self.v1,
        )

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        rows, cols = shape
        if rows % 32 or cols % 32:
            return f"{rows} x {cols} is no multiple of 32 x 32"
        return f"{cols} columns are no multiple of {self.group}" if cols % self.group else None

    def parts(self, name: str, shape: tuple[int, ...], coding: Coding) -> Sequence[Part]:
        module = module_of(name)
        specs = parts_of(coding, *shape)
        return [Part(s.slot, f"{module}.{SLOTS[s.slot]}", s.dtype, s.shape) for s in specs]

    def constants(self, name: str, shape: tuple[int, ...], coding: Coding) -> Sequence[Constant]:
        order = _in_order(shape[1], self.group)
        return [Constant(f"{module_of(name)}.g_idx", DType.I32, (shape[1],), order)]

    def late(self, name: str, shape: tuple[int, ...], coding: Coding, scales: Scales) -> bytes:
        raise KeyError(name)  # nothing is left for later

    def config(self, model: Quantised) -> Mapping[str, Any]:
        head = any(map(is_head, model.coded))
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": self.group,
            "sym": self.symmetric,
            "desc_act": False,
            "true_sequential": True,
            "damp_percent": 0.1,
            "lm_head": head,
            "checkpoint_format": "gptq" if self.v1 else "gptq_v2",
            "pack_dtype": "int32",
        }
        if not all(map(is_head, model.kept)):
            names = [n for n in left_out(model) if not is_head(n)]
            config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in names}
        return config

    def files(self, model: Quantised) -> Mapping[str, bytes]:
        return {SIDE_FILE: (json.dumps(self.config(model), indent=2) + "\n").encode()}
