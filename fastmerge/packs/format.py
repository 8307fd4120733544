"""pack.json: what a pack says of itself, checked line by line; docs/packs.md defines it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from fastmerge.checkpoint.wording import is_clean, is_plain_name, shown
from fastmerge.dtypes import BY_SAFETENSORS, DType
from fastmerge.errors import CheckpointError
from fastmerge.packs.few_bits import NAMES
from fastmerge.packs.terms import KINDS, TermInfo

PACK = "pack.json"
FORMAT = "fastmerge-pack"
VERSION = 1

#: Elements or directions: what a signed 32-bit number holds.
_MOST = 2**31 - 1


@dataclass(frozen=True)
class StoredTerm:
    """A term in pack.json. checksums: of its stored tensors, by slot."""

    info: TermInfo
    checksums: Mapping[str, int]


@dataclass(frozen=True)
class Module:
    """One tensor of the base that changes.

    shape, dtype: of the base's tensor; base: its checksum. residual: ||change - stored|| / ||change||.
    """

    shape: tuple[int, ...]
    dtype: DType
    base: int
    residual: float
    terms: Sequence[StoredTerm]


@dataclass(frozen=True)
class Manifest:
    """All of pack.json. weight: of the changes, where none is given. experts: names of the models."""

    strategy: str
    options: Mapping[str, Any]
    base_name: str
    experts: Sequence[str]
    weight: float
    files: Sequence[str]
    modules: Mapping[str, Module]

    def text(self) -> bytes:
        """Return pack.json."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "strategy": self.strategy,
            "options": dict(self.options),
            "base": self.base_name,
            "experts": list(self.experts),
            "weight": self.weight,
            "files": list(self.files),
            "modules": {name: _module_json(module) for name, module in self.modules.items()},
        }
        return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()


def stored_name(module: str, term: int, slot: str) -> str:
    """Return the name of a stored tensor."""
    return f"{module}:{term}.{slot}"


def _module_json(module: Module) -> dict[str, Any]:
    return {
        "shape": list(module.shape),
        "dtype": module.dtype.safetensors,
        "base": _hex(module.base),
        "residual": module.residual,
        "terms": [_term_json(term) for term in module.terms],
    }


def _term_json(term: StoredTerm) -> dict[str, Any]:
    info = term.info
    expert = {} if info.expert is None else {"expert": info.expert}
    return {
        "kind": info.kind,
        "format": info.format,
        **info.numbers,
        **expert,
        "scale": info.scale,
        "checksums": {slot: _hex(value) for slot, value in term.checksums.items()},
    }


def _hex(value: int) -> str:
    return f"{value:016x}"


def parse_manifest(content: Mapping[str, Any], where: str) -> Manifest:
    """Return pack.json's content, checked.

    Raises:
        CheckpointError: begins with `where` and names the key that is wrong.
    """
    top = _Map(content, where)
    if top.take("format") != FORMAT:
        top.fail("format", f"must be {FORMAT!r}", content["format"])
    if top.take("version") != VERSION:
        raise CheckpointError(
            f"{where}: version {shown(content['version'])} is unknown; this fastmerge reads version {VERSION}"
        )
    experts = [top.clean_text("experts", e) for e in top.sequence("experts")]
    if not experts or len(set(experts)) != len(experts):
        top.fail("experts", "must name one model or several different ones", content["experts"])
    files = [top.clean_text("files", f) for f in top.sequence("files")]
    for file in files:
        if not (is_plain_name(file) and file.endswith(".safetensors")):
            top.fail("files", "must be names of .safetensors files", file)
    if len(set(files)) != len(files):
        top.fail("files", "names a file twice", files)
    modules = top.mapping("modules")
    found = Manifest(
        top.clean_text("strategy", top.take("strategy")),
        top.mapping("options"),
        top.clean_text("base", top.take("base")),
        experts,
        top.number("weight"),
        files,
        {
            name: _module(modules[name], f"{where}: modules[{shown(name)}]", len(experts))
            for name in modules
        },
    )
    top.finish()
    return found


def _module(content: Any, where: str, n_experts: int) -> Module:
    this = _Map(content, where)
    shape = tuple(this.whole("shape", size, 1) for size in this.sequence("shape"))
    if math.prod(shape) > 2**60:
        this.fail("shape", "has too many elements", list(shape))
    dtype = BY_SAFETENSORS.get(this.clean_text("dtype", this.take("dtype")))
    if dtype is None or not dtype.is_merged:
        this.fail("dtype", "must be a floating type that merges", content["dtype"])
    residual = this.number("residual")
    if residual < 0:
        this.fail("residual", "must be at least 0", residual)
    terms = [
        _term(term, f"{where}.terms[{i}]", shape, n_experts)
        for i, term in enumerate(this.sequence("terms"))
    ]
    base = this.checksum("base", this.take("base"))
    this.finish()
    return Module(shape, dtype, base, residual, terms)


def _term(content: Any, where: str, shape: tuple[int, ...], n_experts: int) -> StoredTerm:
    this = _Map(content, where)
    name = this.clean_text("kind", this.take("kind"))
    if name not in KINDS:
        this.fail("kind", f"must be one of {', '.join(KINDS)}", name)
    kind = KINDS[name]
    if kind.of_matrices and len(shape) != 2:
        this.fail("kind", f"is for matrices, not for shape {list(shape)}", name)
    format = this.clean_text("format", this.take("format"))
    if format not in NAMES:
        this.fail("format", f"must be one of {', '.join(NAMES)}", format)
    numbers = {
        number: this.whole(number, this.take(number), 0 if number == "basis" else 1)
        for number in kind.numbers
    }
    if numbers.get("experts", n_experts) != n_experts:
        this.fail(
            "experts", f"must be {n_experts}, the pack's number of models", numbers["experts"]
        )
    expert = None
    if "expert" in this.content:
        expert = this.whole("expert", this.take("expert"))
        if expert >= n_experts:
            this.fail("expert", f"must be less than {n_experts}", expert)
    scale = this.number("scale")
    sums = this.mapping("checksums")
    checksums = {slot: this.checksum(f"checksums[{shown(slot)}]", sums[slot]) for slot in sums}
    this.finish()
    return StoredTerm(TermInfo(name, format, numbers, expert, scale), checksums)


class _Map:
    """A JSON object being taken apart: every key is used once, none is unknown."""

    def __init__(self, content: Any, where: str) -> None:
        if not isinstance(content, dict):
            raise CheckpointError(f"{where} is not an object but {shown(content)}; {_AGAIN}")
        self.content: dict[str, Any] = content
        self.where = where
        self.used: set[str] = set()

    def fail(self, key: str, what: str, value: Any) -> NoReturn:
        raise CheckpointError(f"{self.where}: {key} {what}, got {shown(value)}; {_AGAIN}")

    def take(self, key: str) -> Any:
        if key not in self.content:
            raise CheckpointError(f"{self.where} has no {key}; {_AGAIN}")
        self.used.add(key)
        return self.content[key]

    def clean_text(self, key: str, value: Any) -> str:
        if not isinstance(value, str) or not value or not is_clean(value):
            self.fail(key, "must be text on one line", value)
        return value

    def whole(self, key: str, value: Any, least: int = 0) -> int:
        if type(value) is not int or not least <= value <= _MOST:
            self.fail(key, f"must be a whole number in [{least}, {_MOST}]", value)
        return value

    def number(self, key: str) -> float:
        value = self.take(key)
        if type(value) not in (int, float) or not abs(value) <= _LARGEST:
            self.fail(key, "must be a finite number", value)
        return float(value)

    def checksum(self, key: str, value: Any) -> int:
        if not (isinstance(value, str) and len(value) == 16 and set(value) <= _DIGITS):
            self.fail(key, "must be 16 hexadecimal digits", value)
        return int(value, 16)

    def sequence(self, key: str) -> list[Any]:
        value = self.take(key)
        if not isinstance(value, list):
            self.fail(key, "must be a list", value)
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.take(key)
        if not isinstance(value, dict):
            self.fail(key, "must be an object", value)
        return value

    def finish(self) -> None:
        for key in sorted(self.content.keys() - self.used):
            raise CheckpointError(f"{self.where} has an unknown key {shown(key)}; {_AGAIN}")


_AGAIN = "the pack is damaged, make or download it again"
_DIGITS = set("0123456789abcdef")
_LARGEST = 1e30
