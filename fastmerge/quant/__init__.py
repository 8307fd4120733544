"""Formats of a few bits per weight: one file per format (or tight family)."""

from fastmerge.quant.format import OutFormat
from fastmerge.quant.formats import FORMATS, output_format
from fastmerge.quant.modules import shares_scale
from fastmerge.quant.recognise import recognise

__all__ = ["FORMATS", "OutFormat", "output_format", "recognise", "shares_scale"]
