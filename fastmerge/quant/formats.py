"""The formats that are written, by the names that `--quantize` takes."""

from __future__ import annotations

import difflib

from fastmerge.coding import Format
from fastmerge.errors import RecipeError
from fastmerge.quant.awq import Awq
from fastmerge.quant.bitsandbytes import Bitsandbytes
from fastmerge.quant.compressed_tensors import CompressedTensors
from fastmerge.quant.format import OutFormat
from fastmerge.quant.fp8 import BlockFp8
from fastmerge.quant.gptq import Gptq

_ALL: tuple[OutFormat, ...] = (
    Bitsandbytes("nf4", "nf4"),
    Bitsandbytes("fp4", "fp4"),
    Bitsandbytes("nf4-dq", "nf4", nested=True),
    Bitsandbytes("fp4-dq", "fp4", nested=True),
    CompressedTensors("int4", Format.INT4, 128),
    CompressedTensors("int4-g32", Format.INT4, 32),
    CompressedTensors("int4-g64", Format.INT4, 64),
    CompressedTensors("int4-channel", Format.INT4),
    CompressedTensors("int4-asym", Format.INT4, 128, symmetric=False),
    CompressedTensors("nvfp4", Format.NVFP4, 16),
    CompressedTensors("mxfp4", Format.MXFP4, 32),
    CompressedTensors("fp8", Format.FP8),
    CompressedTensors("fp8-tensor", Format.FP8, group_rows=0),
    BlockFp8(),
    Gptq("gptq"),
    Gptq("gptq-v2", v1=False),
    Gptq("gptq-asym", symmetric=False),
    Awq(),
)

#: Name -> format; bitsandbytes' ones have a second name each.
FORMATS: dict[str, OutFormat] = {f.name: f for f in _ALL} | {
    f"bnb-{f.name}": f for f in _ALL if isinstance(f, Bitsandbytes)
}


def output_format(name: str) -> OutFormat:
    """Return the format of that name. Raises RecipeError with the nearest name if there is none."""
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(name.lower(), FORMATS, n=1, cutoff=0.0)
    raise RecipeError(
        f"no format is called {name!r}; the nearest is {near[0]!r}, all are {', '.join(FORMATS)}"
    )
