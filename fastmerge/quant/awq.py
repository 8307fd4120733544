"""AWQ for its gemm kernel: int4 with a scale and a zero point per group, eight outputs in a word."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastmerge.checkpoint.wording import shown
from fastmerge.coding import Coding, Format, ScaleType, parts_of
from fastmerge.dtypes import DType
from fastmerge.quant.format import Constant, Part, Quantised, Scales
from fastmerge.quant.gptq import SLOTS, group_size, refuse
from fastmerge.quant.modules import is_head, left_out, module_of
from fastmerge.quant.stored import Found, Module, Stored, coded


def read(stored: Stored, config: Mapping[str, Any]) -> Iterator[Found]:
    """Yield the coded tensors of a checkpoint that AutoAWQ wrote."""
    # Its own side file has other names for the same things.
    names = {"w_bit": "bits", "q_group_size": "group_size"}
    config = {names.get(key, key): value for key, value in config.items()}
    size = group_size(stored, "awq", config)
    version = config.get("version") or config.get("format") or "gemm"
    if not isinstance(version, str) or version.lower() != "gemm":
        refuse(stored, "awq", "version", version)
    if config.get("zero_point", True) is not True:
        refuse(stored, "awq", "zero_point", config["zero_point"])
    for module in stored.modules(("qweight", "qzeros", "scales")):
        yield _read(module, size)


def _read(module: Module, size: int) -> Found:
    of = "awq"
    codes = module.matrix("qweight", (DType.I32,), of=of)
    cols, rows = codes.shape[0], 8 * codes.shape[1]
    if size and cols % size:
        shape = shown(list(codes.shape))
        module.fail("qweight", f"has shape {shape}, which groups of {size} do not fit")
    groups = cols // (size or cols)
    parts = {
        "codes": codes,
        "scales": module.need("scales", (DType.F16,), (groups, rows), of=of),
        "zeros": module.need("qzeros", (DType.I32,), (groups, rows // 8), of=of),
    }
    dtype = module.stored.dtype
    coding = Coding(Format.AWQ, dtype, ScaleType.F16, group=size, symmetric=False)
    return Found(coded(module.full("weight"), dtype, (rows, cols), coding, parts), module)


# ---- as an output -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Awq:
    """Asymmetric, groups of 128; what AWQ scales before it codes needs activations and is not done."""

    name: str = "awq"
    group: int = 128
    family: str = "awq"

    def coding(self, dtype: DType, shape: tuple[int, ...]) -> Coding:
        return Coding(Format.AWQ, dtype, ScaleType.F16, group=self.group, symmetric=False)

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        rows, cols = shape
        if rows % 32:
            return f"{rows} rows are no multiple of 32"
        return f"{cols} columns are no multiple of {self.group}" if cols % self.group else None

    def parts(self, name: str, shape: tuple[int, ...], coding: Coding) -> Sequence[Part]:
        module = module_of(name)
        specs = parts_of(coding, *shape)
        return [Part(s.slot, f"{module}.{SLOTS[s.slot]}", s.dtype, s.shape) for s in specs]

    def constants(self, name: str, shape: tuple[int, ...], coding: Coding) -> Sequence[Constant]:
        return []

    def late(self, name: str, shape: tuple[int, ...], coding: Coding, scales: Scales) -> bytes:
        raise KeyError(name)  # nothing is left for later

    def config(self, model: Quantised) -> Mapping[str, Any]:
        explicit = any(map(is_head, model.coded)) or not all(map(is_head, model.kept))
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": self.group,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": left_out(model) if explicit else None,
        }

    def files(self, model: Quantised) -> Mapping[str, bytes]:
        return {}
