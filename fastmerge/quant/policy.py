"""Which weights of a model are coded, and in which format: the default, and what users say.

Matrices of linear modules are coded. Heads, towers beside the language model and blocks of multi-token
prediction stay in 16 bit unless they are asked for; embeddings, norms, routers, convolutions and whatever
is no matrix stay so always.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from fastmerge.errors import RecipeError
from fastmerge.quant.format import OutFormat
from fastmerge.quant.formats import output_format
from fastmerge.quant.modules import (
    is_beside,
    is_convolution,
    is_embedding,
    is_head,
    is_norm,
    is_router,
    layer_of,
    module_of,
)

HEADS = ("keep", "q8", "same")

#: Formats of 8 bits for a head, by the family of the others.
_EIGHT_BITS = {"compressed-tensors": "fp8"}

#: Formats whose experts transformers 5 fuses without their scales, or not at all.
_FUSED_BADLY = ("nf4", "fp4", "nf4-dq", "fp4-dq", "nvfp4")

#: Kinds of models whose linear modules store [in, out]: their rows are no outputs.
_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")

_ALWAYS: dict[str, Callable[[str], bool]] = {
    "an embedding": is_embedding,
    "a norm": is_norm,
    "a router": is_router,
    "a convolution": is_convolution,
}


@dataclass(frozen=True)
class Rules:
    """What a user says of weights. Patterns are globs, or `re:` and an expression, of names or modules.

    keep:        these stay in 16 bit, whatever else says.
    quantize:    these are coded although they would be kept by default.
    head:        the output head: `keep` in 16 bit, 8 bits with `q8`, or the `same` as all.
    first_last_layers: that many blocks at either end stay in 16 bit.
    overrides:   pattern -> the name of another format; the first that matches counts.
    """

    keep: Sequence[str] = ()
    quantize: Sequence[str] = ()
    head: str = "keep"
    first_last_layers: int = 0
    overrides: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """What becomes of each weight.

    formats:  every weight -> how it is coded, None where it is not.
    kept:     those that are not, and are matrices of linear modules.
    warnings: what a user would not expect, a line each.
    """

    formats: dict[str, OutFormat | None]
    kept: list[str]
    warnings: list[str]


def choose(
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
    default: OutFormat,
    rules: Rules,
) -> Choice:
    """Return how each tensor of a model is stored.

    shapes: the tensors of the model, by name. config: its config.json.

    Raises:
        RecipeError: a rule is not one, or asks for formats that no single folder holds.
    """
    return _Chooser(shapes, config, default, rules).choose()


class _Patterns:
    """Patterns of one key, each of which should match some weight that may be coded."""

    def __init__(self, key: str, patterns: Iterable[str]) -> None:
        self.key = key
        self._unused = dict.fromkeys(patterns, "no weight")
        self._tests = {pattern: self._test(pattern) for pattern in self._unused}

    def _test(self, pattern: str) -> Callable[[str], bool]:
        if not pattern.startswith("re:"):
            return lambda name: fnmatchcase(name, pattern)
        try:
            compiled = re.compile(pattern[3:])
        except re.error as error:
            raise RecipeError(
                f"{self.key} has {pattern!r}, which is no regular expression: {error}"
            ) from None
        return lambda name: compiled.match(name) is not None

    def match(self, name: str, never: str | None) -> str | None:
        """Return the first pattern that matches a weight or its module. never: why it is not coded."""
        for pattern, test in self._tests.items():
            if test(name) or test(module_of(name)):
                if never is None:
                    self._unused.pop(pattern, None)
                elif pattern in self._unused:
                    self._unused[pattern] = f"only what is never coded: {name!r} is {never}"
                return pattern
        return None

    def warnings(self) -> list[str]:
        return [f"{self.key}: {p!r} matches {what}" for p, what in self._unused.items()]


class _Chooser:
    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        config: Mapping[str, Any],
        default: OutFormat,
        rules: Rules,
    ) -> None:
        if rules.head not in HEADS:
            raise RecipeError(f"head must be one of {', '.join(HEADS)}, got {rules.head!r}")
        if rules.first_last_layers < 0:
            raise RecipeError(f"first_last_layers must be 0 or more, got {rules.first_last_layers}")
        self.shapes, self.default, self.rules = shapes, default, rules
        text = config.get("text_config")
        self.config = {**config, **text} if isinstance(text, dict) else config
        self.layers = self._layers()
        self.keep = _Patterns("keep", rules.keep)
        self.quantize = _Patterns("quantize", rules.quantize)
        self.overrides = _Patterns("overrides", rules.overrides)
        self.formats = {p: self._mixable(output_format(f)) for p, f in rules.overrides.items()}
        self.reasons: dict[str, list[str]] = {}  # why a weight is not what was asked -> weights

    def choose(self) -> Choice:
        formats = {name: self._format(name, shape) for name, shape in self.shapes.items()}
        kept = [n for n, f in formats.items() if f is None and self._is_linear(n)]
        warnings = [self._warning(reason, names) for reason, names in self.reasons.items()]
        for patterns in (self.keep, self.quantize, self.overrides):
            warnings += patterns.warnings()
        return Choice(formats, kept, warnings)

    def _format(self, name: str, shape: tuple[int, ...]) -> OutFormat | None:
        """Return how one weight is coded; what deserves a warning goes into `reasons`."""
        never = self._never(name, shape)
        kept = self.keep.match(name, None)
        wanted, override = self.quantize.match(name, never), self.overrides.match(name, never)
        asked = bool(wanted or override)
        if never or kept:
            if len(shape) == 3 and not is_convolution(name) and not kept:
                self._note("stays in 16 bit: experts in one tensor fit no format of matrices", name)
            return None
        if override:
            found: OutFormat | None = self.formats[override]
        elif is_head(name):
            found = self._head(name, asked)
        else:
            found = self.default if asked or not self._is_kept_by_default(name) else None
        return self._fitting(found, name, shape)

    def _fitting(
        self, found: OutFormat | None, name: str, shape: tuple[int, ...]
    ) -> OutFormat | None:
        if found is None:
            return None
        if self.config.get("model_type") in _TRANSPOSED:
            self._note("stays in 16 bit: this kind of model stores matrices as [in, out]", name)
            return None
        if reason := found.refuses(shape):
            self._note(f"stays in 16 bit, as {found.name} cannot hold it: {reason}", name)
            return None
        if ".experts." in name and found.name in _FUSED_BADLY:
            self._note(
                f"is an expert, and transformers 5 fuses experts: it then misreads {found.name}; keep "
                "'*.experts.*' in 16 bit, or choose int4 or fp8 if it is to read them",
                name,
            )
        if found.family == "bitsandbytes" and shape[1] % 64:
            # Its file is right; versions up to 0.50 misread it where processors have AVX-512.
            self._note(
                f"has {shape[1]} columns, which some versions of bitsandbytes misread on a CPU",
                name,
            )
        return found

    def _never(self, name: str, shape: tuple[int, ...]) -> str | None:
        """Return what a weight is that is never coded, None for others."""
        if len(shape) != 2 or not name.endswith(".weight"):
            return f"no matrix of a linear module, {list(shape)}"
        if 0 in shape:
            return "empty"
        return next((what for what, test in _ALWAYS.items() if test(name)), None)

    def _is_linear(self, name: str) -> bool:
        shape = self.shapes[name]
        if len(shape) != 2 or not name.endswith(".weight"):
            return False
        return is_router(name) or not any(test(name) for test in _ALWAYS.values())

    def _head(self, name: str, asked: bool) -> OutFormat | None:
        if self.rules.head == "keep" and not asked:
            return None
        if self.config.get("tie_word_embeddings"):
            self._note("stays in 16 bit: it is tied to the embedding", name)
            return None
        if self.rules.head != "q8":
            return self.default
        if self.default.family not in _EIGHT_BITS:
            raise RecipeError(
                f"head cannot be q8 beside {self.default.name}: its readers take one format; "
                "set head to keep or same"
            )
        return output_format(_EIGHT_BITS[self.default.family])

    def _is_kept_by_default(self, name: str) -> bool:
        layer, last = layer_of(name), self.layers
        if is_beside(name):
            return True
        if layer is None or not last:
            return False
        n = self.rules.first_last_layers
        return layer < n or layer >= last - n  # blocks past the last are multi-token prediction's

    def _layers(self) -> int:
        """Return how many blocks the model has, by config.json or else by the names."""
        for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
            if type(self.config.get(key)) is int:
                return int(self.config[key])
        found = [i for n in self.shapes if not is_beside(n) and (i := layer_of(n)) is not None]
        return max(found, default=-1) + 1

    def _mixable(self, other: OutFormat) -> OutFormat:
        if other.family != self.default.family:
            raise RecipeError(
                f"overrides: {other.name} cannot lie beside {self.default.name} in one folder; "
                f"choose another format of {self.default.family}"
            )
        return other

    def _note(self, reason: str, name: str) -> None:
        self.reasons.setdefault(reason, []).append(name)

    @staticmethod
    def _warning(reason: str, names: list[str]) -> str:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return f"{names[0]!r}{more}: {reason}"
