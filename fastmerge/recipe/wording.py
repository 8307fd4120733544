"""How messages and paths are spelt: values and places in one short line, `~` as a folder."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastmerge.errors import RecipeError
from fastmerge.registry import Param

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlevel = 3


def show(value: Any) -> str:
    """Return a one-line, bounded spelling of any value, with YAML's null, true and false."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    try:
        return " ".join(_SHORT.repr(value).split())
    except ValueError:  # Python refuses to print integers of more than 4300 digits
        return f"a huge {type(value).__name__}"


def convert(param: Param, value: Any, place: str) -> Any:
    """Return `value` as the type of `param`, or raise RecipeError naming `place`."""
    try:
        return param.convert(value, place)
    except (OverflowError, ValueError):  # 1e400 as an integer, infinity as a whole number
        raise RecipeError(f"{place} must be a number within range, got {show(value)}") from None


def expand_home(path: str) -> str:
    """Return `path` with a leading `~` or `~user` replaced by that home, where there is one."""
    try:
        return os.path.expanduser(path)
    except ValueError:  # a user name that the system's encoding cannot spell
        return path


@contextmanager
def located(*places: str) -> Iterator[None]:
    """Put the places that are not empty in front of any RecipeError raised inside."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError(": ".join([*filter(None, places), str(error)])) from None
