"""How errors spell names, values and paths from files nobody trusts: one bounded line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

_LONGEST = 120


def shown(value: Any) -> str:
    """Return a one-line spelling of any JSON value, cut in the middle beyond 120 characters."""
    text = repr(value)  # escapes newlines, control characters and lone surrogates
    if len(text) <= _LONGEST:
        return text
    half = _LONGEST // 2 - 2
    return f"{text[:half]}...{text[-half:]}"


def place(path: Path) -> str:
    """Return a path as it is where that prints on one line, else with escapes."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def reason(error: OSError) -> str:
    """Return what the operating system says, without the path that the message already names."""
    return (error.strerror or str(error)).lower()


def is_plain_name(name: str) -> bool:
    """Return whether `name` is a file name without any path and without control characters."""
    return (
        name not in ("", os.curdir, os.pardir)
        and not any(c in name for c in "/\\")
        and is_clean(name)
    )


def is_inside(name: str) -> bool:
    """Return whether `name` is a plain name, or two with a slash between: a file in a model folder."""
    parts = name.split("/")
    return len(parts) <= 2 and all(map(is_plain_name, parts))


def is_clean(text: str) -> bool:
    """Return whether text is free of control characters, line breaks included, and is UTF-8."""
    return not any(c < " " or "\x7f" <= c <= "\x9f" or "\ud800" <= c <= "\udfff" for c in text)
