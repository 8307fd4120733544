"""LoRA adapters made of what a model changes of its base, and of other adapters; docs/lora.md."""

from fastmerge.lora.extract import extract_lora
from fastmerge.lora.merge import merge_adapters
from fastmerge.lora.report import LoraReport, ModuleResult

__all__ = ["LoraReport", "ModuleResult", "extract_lora", "merge_adapters"]
