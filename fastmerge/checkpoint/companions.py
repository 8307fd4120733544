"""What travels with the weights: tokenizer, templates, processors, code, configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastmerge.checkpoint.files import read_json_object
from fastmerge.checkpoint.folder import CONFIG
from fastmerge.dtypes import DType
from fastmerge.errors import CheckpointError

_NAMES = (
    "added_tokens.json",
    "chat_template.json",
    "config_sentence_transformers.json",
    "feature_extractor_config.json",
    "generation_config.json",
    "merges.txt",
    "modules.json",
    "normalizer.json",
    "preprocessor_config.json",
    "processor_config.json",
    "sentence_bert_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.bpe",
    "vocab.json",
    "vocab.txt",
)
_PATTERNS = ("*.jinja", "additional_chat_templates/*.jinja", "*.tiktoken", "image_processor*.json")

#: sentence-transformers: one folder per step after the encoder, described by its own configuration.
_STEP = re.compile(r"\d+_\w+")

#: Files that may name custom code under `auto_map`.
_CODE_NAMERS = (
    CONFIG,
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
_RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import|^\s*from\s+\.\s+import\s+(\w+)", re.M)

_DTYPE_KEYS = ("dtype", "torch_dtype")

#: How the weights were packed; the merged ones are not.
_QUANTISATION_KEYS = ("quantization_config", "compression_config")


def companion_files(folder: Path) -> dict[str, Path]:
    """Return the files of a model folder that its merge needs too: name in the folder -> path.

    Neither weights nor config.json nor README nor licence: those are the merge's own.
    """
    found = {name: folder / name for name in _NAMES}
    for pattern in _PATTERNS:
        found |= {p.relative_to(folder).as_posix(): p for p in folder.glob(pattern)}
    for path in folder.glob("*/config.json"):
        if _STEP.fullmatch(path.parent.name):
            found[path.relative_to(folder).as_posix()] = path
    found |= {f"{module}.py": folder / f"{module}.py" for module in _custom_code(folder)}
    return {name: path for name, path in sorted(found.items()) if path.is_file()}


def _custom_code(folder: Path) -> set[str]:
    """Return the modules in the folder that an auto_map names, and those that these import."""
    wanted = []
    for name in _CODE_NAMERS:
        try:
            auto_map = read_json_object(folder / name, strict=False).get("auto_map")
        except CheckpointError:  # absent, or broken: the file itself is copied as it is
            continue
        if isinstance(auto_map, dict):
            wanted += [module for value in auto_map.values() for module in _modules(value)]
    modules: set[str] = set()
    while wanted:
        module = wanted.pop()
        path = folder / f"{module}.py"
        if module in modules or not path.is_file():
            continue
        modules.add(module)
        text = path.read_bytes().decode(errors="replace")
        wanted += [a or b for a, b in _RELATIVE_IMPORT.findall(text)]
    return modules


def _modules(value: Any) -> Iterable[str]:
    """Yield the modules of an auto_map value: `file.Class`, or for tokenizers a list of such."""
    for text in value if isinstance(value, list) else [value]:
        # `owner/repository--file.Class` is fetched from the hub, not from this folder.
        if isinstance(text, str) and re.fullmatch(r"\w+\.\w+", text):
            yield text.split(".")[0]


def merged_config(
    config: dict[str, Any],
    dtype: DType,
    tie: bool | None,
    quantisation: Mapping[str, Any] | None = None,
) -> bytes:
    """Return the merge's config.json, made from the donor's.

    The element type is set under the keys that the donor uses (`dtype` where it has none), also in
    its sub-configurations; tie sets tie_word_embeddings unless None; what describes packed weights
    is left out, and `quantisation` is what describes those of the merge.
    """
    out = _adapted(config, dtype, tie)
    if not any(key in out for key in _DTYPE_KEYS):
        out["dtype"] = dtype.torch
    if tie is not None:
        out["tie_word_embeddings"] = tie
    if quantisation is not None:
        out["quantization_config"] = dict(quantisation)
    return (json.dumps(out, indent=2) + "\n").encode()


def _adapted(config: dict[str, Any], dtype: DType, tie: bool | None) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in config.items():
        if key in _QUANTISATION_KEYS:
            continue
        if key in _DTYPE_KEYS:
            value = dtype.torch
        elif key == "tie_word_embeddings" and tie is not None:
            value = tie
        elif key.endswith("_config") and isinstance(value, dict):
            value = _adapted(value, dtype, tie)
        out[key] = value
    return out
