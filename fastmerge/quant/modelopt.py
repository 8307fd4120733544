"""TensorRT Model Optimizer: NVFP4 and FP8 checkpoints as inputs.

Its NVFP4 has the codes of compressed-tensors, but the tensor's scale is a factor where that has a divisor.
The reciprocal of one is not exactly the other, so the coding says which it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastmerge.checkpoint.wording import place, shown
from fastmerge.coding import Coding, Format, ScaleType
from fastmerge.dtypes import DType
from fastmerge.errors import CheckpointError
from fastmerge.quant.fp8 import read_tensors
from fastmerge.quant.stored import Found, Module, Stored, coded

SIDE_FILE = "hf_quant_config.json"
_GROUP = 16


def read(stored: Stored, config: Mapping[str, Any]) -> Iterator[Found]:
    """Yield the coded tensors of a checkpoint that ModelOpt wrote; config: config.json's or its own file."""
    inner = config.get("quantization", config)
    inner = inner if isinstance(inner, dict) else {}
    kind = inner.get("quant_algo")
    if kind == "FP8":
        yield from read_tensors(stored, "ModelOpt FP8")
    elif kind in ("NVFP4", "W4A16_NVFP4") and inner.get("group_size", _GROUP) == _GROUP:
        yield from map(_read_nvfp4, stored.modules(("weight_scale", "weight_scale_2")))
    else:
        what = (
            f"group_size {shown(inner['group_size'])}"
            if kind == "NVFP4"
            else f"quant_algo {shown(kind)}"
        )
        raise CheckpointError(
            f"{place(stored.path)}: configuration of ModelOpt has {what}; only FP8 and NVFP4 in groups "
            f"of {_GROUP} are read; convert the checkpoint to bfloat16 first"
        )


def _read_nvfp4(module: Module) -> Found:
    of = "ModelOpt NVFP4"
    packed = module.matrix("weight", (DType.U8,), of=of)
    rows, cols = packed.shape[0], 2 * packed.shape[1]
    if cols % _GROUP:
        module.fail("weight", f"has {cols} columns, not in groups of {_GROUP}")
    scales = module.need("weight_scale", (DType.F8_E4M3,), (rows, cols // _GROUP), of=of)
    factor = module.positive("weight_scale_2", of=of)
    dtype = module.stored.dtype
    coding = Coding(Format.NVFP4, dtype, ScaleType.E4M3, group=_GROUP, other_rule=True)
    parts = {"codes": packed, "scales": scales}
    info = coded(module.full("weight"), dtype, (rows, cols), coding, parts, tensor_scale=factor)
    return Found(info, module, {"weight_scale_2"})
