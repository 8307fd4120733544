"""Model references, `PATH[@REV][+LORA[@REV]]` or a mapping, and the local folders they mean."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmerge.errors import RecipeError
from fastmerge.recipe.wording import expand_home, show

_FORM = "PATH[@REVISION][+LORA[@REVISION]]"


@dataclass(frozen=True)
class ModelRef:
    """One model as a recipe names it. path is as written: `~` and relative paths are kept.

    override_architecture takes the place of `architectures` in the model's config.json.
    """

    path: str
    revision: str | None = None
    lora: ModelRef | None = None
    override_architecture: str | None = None

    @property
    def key(self) -> tuple[str | None, ...]:
        """What makes two references the same model: `./math/` and `math` are, by spelling alone."""
        own = (os.path.normpath(expand_home(self.path)), self.revision)
        return own if self.lora is None else (*own, *self.lora.key)

    def __str__(self) -> str:
        own = self.path if self.revision is None else f"{self.path}@{self.revision}"
        return own if self.lora is None else f"{own}+{self.lora}"


def parse_reference(value: Any, place: str, folder: Path | None = None) -> ModelRef:
    """Return the model that `value` names.

    A text that exists as a folder (from the current directory, or from `folder`, the recipe's own)
    is a path as it stands, even with `+` or `@` in it.

    Raises:
        RecipeError: neither a text of the form PATH[@REVISION][+LORA[@REVISION]] nor a mapping
            {model: {path, revision}, lora: {path, revision}, override_architecture}.
    """
    if isinstance(value, str):
        if _find(value, folder) is not None:
            return ModelRef(_checked_path(value, place))
        model, *lora = value.split("+")
        if len(lora) > 1:
            raise RecipeError(f"{place} has more than one '+', got {show(value)}; write {_FORM}")
        return ModelRef(
            *_split_revision(model, place),
            lora=ModelRef(*_split_revision(lora[0], place)) if lora else None,
        )
    if isinstance(value, Mapping) and "model" in value:
        architecture = value.get("override_architecture")
        if not isinstance(architecture, str | None):
            raise RecipeError(
                f"{place}.override_architecture must be a text, got {show(architecture)}"
            )
        lora_value = value.get("lora")
        return ModelRef(
            *_parse_path(value["model"], f"{place}.model", folder),
            lora=None
            if lora_value is None
            else ModelRef(*_parse_path(lora_value, f"{place}.lora", folder)),
            override_architecture=architecture,
        )
    raise RecipeError(
        f"{place} must be a text {_FORM} or a mapping {{model: {{path, revision}}, lora, "
        f"override_architecture}}, got {show(value)}"
    )


def resolve_path(ref: ModelRef, recipe_dir: Path) -> Path:
    """Return a model's absolute folder or GGUF file, from the current directory or else `recipe_dir`.

    Raises:
        RecipeError: no such folder, or a revision was asked for; names the model.
    """
    return _resolve(ref, "model", recipe_dir)


def resolve_adapter(ref: ModelRef, recipe_dir: Path) -> Path | None:
    """Return the folder of a model's LoRA adapter in the same way, None without one.

    Raises:
        RecipeError: no such folder, or a revision was asked for; names the adapter.
    """
    return None if ref.lora is None else _resolve(ref.lora, "adapter", recipe_dir)


def _resolve(ref: ModelRef, kind: str, recipe_dir: Path) -> Path:
    remedy = f"{kind}s must be local folders; download first, then give the folder"
    if ref.revision is not None:
        name = f"{ref.path}@{ref.revision}"
        raise RecipeError(f"{kind} {show(name)} names a revision; {remedy}")
    found = _find(ref.path, recipe_dir)
    if found is not None and (kind == "model" or found.is_dir()):
        return found
    for candidate in _candidates(ref.path, recipe_dir):
        if os.path.isfile(candidate):
            raise RecipeError(f"{kind} {show(ref.path)} is a file; give the folder that holds it")
    raise RecipeError(f"{kind} {show(ref.path)} was not found; {remedy}")


def _candidates(path: str, folder: Path | None) -> list[str]:
    expanded = expand_home(path)
    return [os.path.join(root, expanded) for root in (os.getcwd(), folder) if root is not None]


def _find(path: str, folder: Path | None) -> Path | None:
    if not path or "\0" in path:
        return None
    return next((Path(c) for c in _candidates(path, folder) if _is_model(c)), None)


def _is_model(path: str) -> bool:
    return os.path.isdir(path) or (path.endswith(".gguf") and os.path.isfile(path))


def _checked_path(path: str, place: str) -> str:
    if not path or "\0" in path:
        raise RecipeError(f"{place} must be the path of a model, got {show(path)}")
    return path


def _split_revision(text: str, place: str) -> tuple[str, str | None]:
    path, *revision = text.split("@")
    if len(revision) > 1 or revision == [""]:
        raise RecipeError(f"{place} must name one revision after '@', got {show(text)}")
    return _checked_path(path, place), revision[0] if revision else None


def _parse_path(value: Any, place: str, folder: Path | None) -> tuple[str, str | None]:
    if isinstance(value, str):
        if _find(value, folder) is not None:
            return value, None
        return _split_revision(value, place)
    if isinstance(value, Mapping):
        path, revision = value.get("path"), value.get("revision")
        if isinstance(path, str) and isinstance(revision, str | None):
            return _checked_path(path, f"{place}.path"), revision
    raise RecipeError(f"{place} must be a path or a mapping {{path, revision}}, got {show(value)}")
