"""FP8 weights with a scale beside them: DeepSeek's blocks of 128 x 128, fbgemm's rows, ModelOpt's tensors.

In all of them a value is code * scale, whatever the scale is called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastmerge.checkpoint.wording import place, shown
from fastmerge.coding import Coding, Format, ScaleType, parts_of
from fastmerge.dtypes import DType
from fastmerge.errors import CheckpointError
from fastmerge.quant.format import Constant, Part, Quantised, Scales
from fastmerge.quant.modules import is_head, left_out, module_of
from fastmerge.quant.stored import SCALE_TYPES, Found, Module, Stored, coded, scale_type

_BLOCK = 128
_FLOATS = tuple(SCALE_TYPES)


def read(stored: Stored, config: Mapping[str, Any]) -> Iterator[Found]:
    """Yield the coded tensors of a checkpoint in DeepSeek's form; the blocks are those config.json names."""
    where = f"{place(stored.path)}: quantization_config of fp8"
    if config.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise CheckpointError(
            f"{where} has fmt {shown(config['fmt'])}; only e4m3 is read; convert it to bfloat16 first"
        )
    if config.get("expert_dtype", "fp8") != "fp8":
        raise CheckpointError(
            f"{where} has expert_dtype {shown(config['expert_dtype'])}, not supported; "
            "convert it to bfloat16 first"
        )
    block = config.get("weight_block_size")
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block)
    ):
        raise CheckpointError(
            f"{where} has weight_block_size {shown(block)}, not two whole numbers; download it again"
        )
    rows, cols = block or (0, 0)
    exponents = config.get("scale_fmt") == "ue8m0"
    for module in stored.modules(("weight_scale_inv",)):
        yield _read(module, "weight_scale_inv", "fp8", rows, cols, exponents)


def read_fbgemm(stored: Stored, config: Mapping[str, Any]) -> Iterator[Found]:
    """Yield the coded tensors of a checkpoint in fbgemm's form: a scale of each row."""
    for module in stored.modules(("weight_scale", "input_scale_ub")):
        yield _read(module, "weight_scale", "fbgemm_fp8", 1, 0, False)


def read_tensors(stored: Stored, of: str) -> Iterator[Found]:
    """Yield the coded tensors of a checkpoint with one scale per tensor, `weight_scale`."""
    for module in stored.modules(("weight_scale",)):
        yield _read(module, "weight_scale", of, 0, 0, False)


def _read(
    module: Module, word: str, of: str, group_rows: int, group: int, exponents: bool
) -> Found:
    codes = module.matrix("weight", (DType.F8_E4M3,), of=of)
    rows, cols = codes.shape
    types = (*_FLOATS, DType.F8_E8M0) + ((DType.U8,) if exponents else ())
    grid = (-(-rows // (group_rows or rows)), -(-cols // (group or cols)))
    others: tuple[tuple[int, ...], ...] = ((), (1,)) if group_rows == 0 else ()
    scales = module.need(word, types, grid, *others, of=of)
    dtype = module.stored.dtype
    coding = Coding(Format.FP8, dtype, scale_type(scales), group, group_rows)
    parts = {"codes": codes, "scales": scales}
    return Found(coded(module.full("weight"), dtype, (rows, cols), coding, parts), module)


# ---- as an output -------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockFp8:
    """DeepSeek's form: a float32 scale per block of 128 x 128, those at the edges being smaller."""

    name: str = "fp8-block"
    family: str = "fp8-block"

    def coding(self, dtype: DType, shape: tuple[int, ...]) -> Coding:
        return Coding(Format.FP8, dtype, ScaleType.F32, _BLOCK, _BLOCK)

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        return None

    def parts(self, name: str, shape: tuple[int, ...], coding: Coding) -> Sequence[Part]:
        names = {"codes": name, "scales": f"{module_of(name)}.weight_scale_inv"}
        return [Part(s.slot, names[s.slot], s.dtype, s.shape) for s in parts_of(coding, *shape)]

    def constants(self, name: str, shape: tuple[int, ...], coding: Coding) -> Sequence[Constant]:
        return []

    def late(self, name: str, shape: tuple[int, ...], coding: Coding, scales: Scales) -> bytes:
        raise KeyError(name)  # nothing is left for later

    def config(self, model: Quantised) -> Mapping[str, Any]:
        config: dict[str, Any] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [_BLOCK, _BLOCK],
        }
        if any(map(is_head, model.coded)) or not all(map(is_head, model.kept)):
            config["modules_to_not_convert"] = left_out(model)
        return config

    def files(self, model: Quantised) -> Mapping[str, bytes]:
        return {}
