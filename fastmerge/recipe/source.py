"""From a file, a text or a mapping to one plain document; syntax errors get one line each."""

from __future__ import annotations

import numbers
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fastmerge.errors import RecipeError
from fastmerge.recipe.wording import expand_home, located, show

# A recipe is five levels deep at most; beyond this a mapping refers to itself.
_DEEPEST = 12


@dataclass(frozen=True)
class Source:
    """Where a recipe comes from. label: the file as the caller spelt it, or an empty text.

    folder: what relative model paths are relative to, after the current directory.
    """

    label: str
    folder: Path
    text: str
    document: Any
    warnings: tuple[str, ...] = ()


def read_source(source: str | os.PathLike[str] | Mapping[Any, Any]) -> Source:
    """Read a recipe. A text with a newline is YAML; any other text is the path of a YAML file."""
    if isinstance(source, Mapping):
        document = _plain(source, "", _DEEPEST)
        text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
        return Source("", Path.cwd(), text, document)
    if isinstance(source, str) and "\n" in source:
        document, warnings = parse_yaml(source)
        return Source("", Path.cwd(), source, document, warnings)
    if not isinstance(source, str | os.PathLike):
        raise RecipeError(f"recipe must be a path, a YAML text or a mapping, got {show(source)}")
    label = os.fspath(source)
    path = expand_home(label)
    text = _read_text(path)
    with located(label):
        document, warnings = parse_yaml(text)
    return Source(label, Path(path).absolute().parent, text, document, warnings)


def _read_text(path: str) -> str:
    if not os.path.isfile(path):
        kind = "is a folder" if os.path.isdir(path) else "was not found"
        raise RecipeError(f"recipe {show(path)} {kind}; give the path of a YAML file")
    try:
        return Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise RecipeError(f"recipe {show(path)} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"recipe {show(path)} is not UTF-8 text (byte {error.start}); "
            "give the path of a YAML file"
        ) from None


class _Loader(yaml.SafeLoader):
    """The safe loader, which also notes keys written twice: YAML keeps the last one in silence."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.repeated: list[str] = []

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Looked at before `<<` merges are expanded, where a repeated key is meant.
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                self.repeated.append(
                    f"key {show(key.value)} is written twice in the same mapping "
                    f"(line {key.start_mark.line + 1}); the last one counts"
                )
            seen.add((key.tag, key.value))
        return node


def parse_yaml(text: str) -> tuple[Any, tuple[str, ...]]:
    """Return the only document of a YAML text and the warnings that reading it gave."""
    try:
        loader = _Loader(text)
        documents = []
        # types-PyYAML leaves both methods untyped.
        while loader.check_data():  # type: ignore[no-untyped-call]
            documents.append(loader.get_data())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise RecipeError(f"{where}not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise RecipeError("not a recipe: nested too deeply") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # PyYAML lets these out of its constructors: month 13, `!!bool 7`, 5000-digit integers.
        raise RecipeError(f"not valid YAML: {' '.join(str(error).split())}") from None
    documents = [d for d in documents if d is not None]
    if not documents:
        raise RecipeError("recipe is empty; it needs at least merge_method and models")
    if len(documents) > 1:
        raise RecipeError(f"holds {len(documents)} merge documents; give each a file of its own")
    return documents[0], tuple(loader.repeated)


def _plain(value: Any, place: str, depth: int) -> Any:
    """Return `value` in YAML's own types: paths become texts, numpy scalars numbers."""
    if depth == 0:
        raise RecipeError(f"{place[:80]} is nested too deeply")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, os.PathLike):
        return str(os.fspath(value))
    if isinstance(value, Mapping):
        return {
            _plain_key(k, place): _plain(v, _child(place, k), depth - 1) for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(v, f"{place}[{i}]", depth - 1) for i, v in enumerate(value)]
    if isinstance(value, numbers.Integral):
        if (
            int(value).bit_length() > 1024
        ):  # more than a float64 holds; Python may not even print it
            raise RecipeError(f"{place} must be a number within range, got {show(int(value))}")
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise RecipeError(
        f"{place} must be a text, number, true or false, list or mapping, got {show(value)}"
    )


def _plain_key(key: Any, place: str) -> Any:
    if key is None or isinstance(key, str | int | float):
        return key
    raise RecipeError(f"keys of {place or 'recipe'} must be texts, got {show(key)}")


def _child(place: str, key: Any) -> str:
    name = key if isinstance(key, str) and key.isprintable() else show(key)
    return f"{place}.{name}" if place else name
