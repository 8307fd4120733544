"""What a user asks for when a merge is to be stored in a few bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastmerge.coding import Coding, Format
from fastmerge.dtypes import DType, parse_dtype
from fastmerge.errors import RecipeError
from fastmerge.quant.gguf_formats import GGUF_FORMATS
from fastmerge.quant.hessians import identified
from fastmerge.quant.policy import Rules

ROUNDINGS = ("nearest", "mse")

#: Formats with more than one rule of choosing scales.
_SEARCHED = {
    *(Format.BNB_NF4, Format.BNB_FP4, Format.INT4, Format.NVFP4, Format.MXFP4),
    *(Format.GPTQ, Format.AWQ),
}


@dataclass(frozen=True)
class Quantize:
    """A format for the weights of linear modules, and what differs from its defaults.

    format:   a name of `formats.FORMATS` or `gguf_formats.GGUF_FORMATS`.
    rules:    which weights, and exceptions.
    rounding: `nearest` chooses scales as the format's library does; `mse` by least squared error.
    dtype:    what values are rounded to before they are coded; None: the merge's own type, as when a library
              quantises the merged model.
    hessians: a safetensors file (see `hessians.Hessians`): weights that have one in it are rounded by GPTQ.
    """

    format: str
    rules: Rules = field(default_factory=Rules)
    rounding: str = "nearest"
    dtype: DType | None = None
    hessians: Path | str | None = None

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDINGS:
            raise RecipeError(
                f"rounding must be one of {', '.join(ROUNDINGS)}, got {self.rounding!r}"
            )

    @property
    def is_gguf(self) -> bool:
        return self.format in GGUF_FORMATS

    def adapted(self, coding: Coding) -> Coding:
        """Return the coding with the rounding that was asked for, where the format has a choice."""
        if self.rounding == "mse" and coding.format in _SEARCHED:
            return replace(coding, search=True)
        return coding

    def as_dict(self) -> dict[str, Any]:
        """Return everything that decides bytes, as JSON-able data."""
        rules = self.rules
        return {
            "format": self.format,
            "keep": list(rules.keep),
            "quantize": list(rules.quantize),
            "head": rules.head,
            "first_last_layers": rules.first_last_layers,
            "overrides": dict(rules.overrides),
            "rounding": self.rounding,
            "dtype": self.dtype.torch if self.dtype else None,
            "hessians": identified(Path(self.hessians)) if self.hessians is not None else None,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | None) -> Quantize | None:
        """Return what `as_dict` came from."""
        if data is None:
            return None
        rules = Rules(
            tuple(data["keep"]),
            tuple(data["quantize"]),
            data["head"],
            data["first_last_layers"],
            dict(data["overrides"]),
        )
        dtype = parse_dtype(data["dtype"], "quant dtype") if data["dtype"] else None
        known = data.get("hessians")
        hessians = Path(known["path"]) if known else None
        return cls(data["format"], rules, data["rounding"], dtype, hessians)
