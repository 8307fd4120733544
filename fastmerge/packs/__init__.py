"""Packs: what models change of a base, compressed, in files of their own; docs/packs.md is the format."""

from fastmerge.packs.apply import ApplyReport, apply_packs, revert, sum_packs
from fastmerge.packs.build import ModuleReport, PackReport, pack
from fastmerge.packs.reading import Pack, open_pack
from fastmerge.packs.reversible import rmm

__all__ = [
    "ApplyReport",
    "ModuleReport",
    "Pack",
    "PackReport",
    "apply_packs",
    "open_pack",
    "pack",
    "revert",
    "rmm",
    "sum_packs",
]
