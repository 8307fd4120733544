r"""How text is split before byte-pair merges: GGUF has a name for it, tokenizer.json the expressions.

Splits are written as a sequence of regular expressions, each applied to the pieces of the one before: a
match, and what is between two, is a piece.
"""

from __future__ import annotations

from typing import Any

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_HEAD, _PATHS = r"[^\r\n\p{L}\p{N}]?", r"| ?[^\s\p{L}\p{N}]+[\r\n/]*"
_PUNCTUATED = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""

GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",)
LLAMA3 = (_CONTRACTIONS + _WORDS + r"|\p{N}{1,3}" + _OTHERS + _SPACES,)
QWEN2 = (_CONTRACTIONS + _WORDS + r"|\p{N}" + _OTHERS + _SPACES,)
QWEN35 = (
    _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    + _SPACES,
)
GPT4O = (
    f"{_HEAD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_HEAD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    + r"|\p{N}{1,3}"
    + _PATHS
    + _SPACES,
)
TEKKEN = (f"{_HEAD}{_UPPER}*{_LOWER}+|{_HEAD}{_UPPER}+{_LOWER}*" + r"|\p{N}" + _PATHS + _SPACES,)
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    _PUNCTUATED + r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*" + _SPACES,
)
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")

#: GGUF's name -> the splits. Of names with the same splits the first is written.
SPLITS = {
    "gpt-2": GPT2,
    "smollm": (r"\p{N}", *GPT2),
    "llama-bpe": LLAMA3,
    "qwen2": QWEN2,
    "qwen35": QWEN35,
    "gpt-4o": GPT4O,
    "tekken": TEKKEN,
    "deepseek-v3": DEEPSEEK_V3,
    "deepseek-coder": DEEPSEEK_CODER,
    "smaug-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "dbrx": LLAMA3,
    "deepseek-r1-qwen": QWEN2,
    "starcoder": (r"\p{N}", *GPT2),
    "llama4": GPT4O,
}

#: Names by which llama.cpp takes a word that is a token as it is, whatever the merges say.
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")


def splits_of(pre_tokenizer: Any) -> tuple[str, ...] | None:
    """Return the splits of tokenizer.json's pre_tokenizer, None where they are of another kind."""
    if not isinstance(pre_tokenizer, dict):
        return None
    kind = pre_tokenizer.get("type")
    if kind == "Sequence":
        parts = [splits_of(p) for p in pre_tokenizer.get("pretokenizers") or ()]
        return None if None in parts else tuple(s for p in parts if p for s in p)
    if kind == "ByteLevel":
        return GPT2 if pre_tokenizer.get("use_regex", True) else ()
    if kind == "Digits" and pre_tokenizer.get("individual_digits"):
        return (r"\p{N}",)
    pattern = pre_tokenizer.get("pattern")
    how = pre_tokenizer.get("behavior"), bool(pre_tokenizer.get("invert"))
    if (
        kind != "Split"
        or not isinstance(pattern, dict)
        or not isinstance(pattern.get("Regex"), str)
    ):
        return None
    # Where the expression matches everything, to keep matches and to drop the rest is the same.
    if how not in (("Isolated", False), ("Removed", True)):
        return None
    return (pattern["Regex"].replace("\r", r"\r").replace("\n", r"\n"),)


def pre_name(pre_tokenizer: Any, whole_words: bool) -> str | None:
    """Return GGUF's name for tokenizer.json's pre_tokenizer, None if there is none we know.

    whole_words: the model's ignore_merges.
    """
    splits = splits_of(pre_tokenizer)
    names = [name for name, known in SPLITS.items() if known == splits]
    if len(names) > 1 and splits == LLAMA3 and not whole_words:
        return "smaug-bpe"
    return names[0] if names else None


def pre_tokenizer_of(name: str) -> dict[str, Any] | None:
    """Return tokenizer.json's pre_tokenizer for GGUF's name, None if we do not know it."""
    if name not in SPLITS:
        return None
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": s}, "behavior": "Isolated", "invert": False}
        for s in SPLITS[name]
    ]
    bytes_only = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*steps, {"type": "ByteLevel", **bytes_only}]}
