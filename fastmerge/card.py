"""The merge's README.md: what was merged, how, and the recipe to do it again."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastmerge.backends import Residual
from fastmerge.coding import Coding

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_ARXIV = re.compile(r"(arxiv:)?(?P<id>\d{4}\.\d{4,5}(v\d+)?)", re.ASCII | re.IGNORECASE)
_URL = re.compile(r"https?://[^\s<>()\[\]]+")
_MARKUP = re.compile(r"([\\`*_\[\]<>#|~])")


@dataclass(frozen=True)
class Quantisation:
    """What a card says of weights that are codes. tensors: name, coding, what coding cost if it is known."""

    format: str
    bits_per_weight: float
    tensors: Sequence[tuple[str, Coding, Residual | None]]


def hub_id(reference: str, config: Mapping[str, Any] | None = None) -> str | None:
    """Return the hub's name of a model, None if it has none that is safe to publish.

    That is the reference itself, if it looks like `owner/name` and is no local path, else what the
    model's config.json gives as `_name_or_path` under the same condition.
    """
    for name in (reference, (config or {}).get("_name_or_path")):
        if isinstance(name, str) and _HUB_ID.fullmatch(name) and not os.path.exists(name):
            return name
    return None


def model_card(
    title: str,
    recipe_text: str,
    method_title: str,
    method_paper: str,
    base_models: Sequence[str],
    inputs: Sequence[tuple[str, str | None]],
    dtype: str,
    quantisation: Quantisation | None = None,
) -> str:
    """Return README.md with the front matter that the hub reads.

    base_models: hub names (see `hub_id`); local paths have no place there. inputs: all models and
    their adapters as the recipe writes them; of a local path only the folder's name is published.
    method_paper: an arXiv number, with or without `arXiv:`, a link, or empty.
    """
    recipe = recipe_text.rstrip("\n")
    fence = "`" * max(3, 1 + _longest_run(recipe))
    lines = [
        "---",
        *_front_matter(base_models),
        "---",
        "",
        f"# {_escaped(title)}",
        "",
        "This model is a merge of the models below, made with fastmerge.",
        "",
        "## Method",
        "",
        f"{_method(method_title, method_paper)}, stored as {_escaped(dtype)}.",
        "",
        "## Models",
        "",
        *[f"- {_adapted(*names)}" for names in dict.fromkeys(inputs)],
        "",
        *(_quantised(quantisation) if quantisation else []),
        "## Configuration",
        "",
        f"{fence}yaml",
        recipe,
        fence,
        "",
    ]
    return "\n".join(lines)


def _quantised(of: Quantisation) -> list[str]:
    """Return a section with the relative error of each tensor, and of all together."""
    known = [r for _, _, r in of.tensors if r is not None and r.squares]
    total = Residual.of_all(known)
    lines = [
        "## Quantisation",
        "",
        f"{len(of.tensors)} tensors are stored as {_escaped(of.format)}; the model takes "
        f"{of.bits_per_weight:.2f} bits per parameter.",
    ]
    if known:
        # A merge that was finished by another run does not know what the first one's coding cost.
        whole = all(r is not None for _, _, r in of.tensors)
        which = "these weights" if whole else "those listed with an error"
        lines += [
            f"Coding moved {which} by {100 * total.relative_rms:.2f} % of their root mean square.",
            "",
            "| tensor | format | relative RMS error |",
            "|---|---|---|",
        ]
        for name, coding, found in of.tensors:
            error = f"{100 * found.relative_rms:.2f} %" if found and found.squares else ""
            lines.append(f"| {_code(name)} | {coding.format.name.lower()} | {error} |")
    return [*lines, "", *_with_hessians(of)]


def _with_hessians(of: Quantisation) -> list[str]:
    """Return what rounding with Hessians gained, tensor by tensor."""
    outputs = [(name, r.relative_output) for name, _, r in of.tensors if r is not None]
    rows = [
        f"| {_code(name)} | {100 * found[0]:.2f} % | {100 * found[1]:.2f} % |"
        for name, found in outputs
        if found is not None
    ]
    if not rows:
        return []
    return [
        "These were rounded by [GPTQ](https://arxiv.org/abs/2210.17323) with Hessians of their inputs. The "
        "error is that of what a layer gives, by its root mean square.",
        "",
        "| tensor | output error | if rounded to nearest |",
        "|---|---|---|",
        *rows,
        "",
    ]


def _front_matter(base_models: Sequence[str]) -> list[str]:
    names = list(dict.fromkeys(base_models))
    lines = ["base_model:", *[f"- {_quoted(name)}" for name in names]] if names else []
    if names:
        lines.append("base_model_relation: merge")
    # `mergekit` because the recipe is of its format, which is what the hub's tag is searched for.
    return [*lines, "library_name: transformers", "tags:", "- fastmerge", "- merge", "- mergekit"]


def _quoted(text: str) -> str:
    """Return a YAML double-quoted scalar, which takes JSON's escapes.

    Characters that YAML does not allow, or folds as line breaks, are escaped; those beyond 16 bits
    are not, for JSON would make surrogate pairs of them. Lone surrogates are no text and become
    U+FFFD.
    """
    text = re.sub("[\ud800-\udfff]", "\ufffd", text)
    quoted = json.dumps(text, ensure_ascii=False)
    return re.sub(
        "[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", lambda m: f"\\u{ord(m[0]):04x}", quoted
    )


def _method(title: str, paper: str) -> str:
    paper = paper.strip()
    title = _escaped(title)
    if match := _ARXIV.fullmatch(paper):
        return f"[{title}](https://arxiv.org/abs/{match['id']}) (arXiv:{match['id']})"
    if _URL.fullmatch(paper):
        return f"[{title}]({paper})"
    return f"{title} ({_escaped(paper)})" if paper else title


def _adapted(model: str, adapter: str | None) -> str:
    return _model(model) + (f" with the adapter {_model(adapter)}" if adapter else "")


def _model(name: str) -> str:
    if hub_id(name):
        return f"[{name}](https://huggingface.co/{name})"
    folder = os.path.basename(os.path.normpath(name)) if name else name
    return _code(folder)


def _code(text: str) -> str:
    """Return a code span that survives backticks in the text."""
    text = _one_line(text)
    ticks = "`" * (1 + _longest_run(text))
    pad = " " if text[:1] in ("`", " ") or text[-1:] in ("`", " ") else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def _escaped(text: str) -> str:
    return _MARKUP.sub(r"\\\1", _one_line(text))


def _one_line(text: str) -> str:
    text = re.sub("[\ud800-\udfff]", "\ufffd", text)
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
