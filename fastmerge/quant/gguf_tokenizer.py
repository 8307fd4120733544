"""Tokenizers: a model folder's files to a GGUF file's metadata, and back."""

from __future__ import annotations

import enum
import importlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastmerge.checkpoint.files import read_json_object
from fastmerge.checkpoint.gguf import GgufFile, GgufValue, ValueType
from fastmerge.checkpoint.wording import place, shown
from fastmerge.errors import CheckpointError
from fastmerge.quant.gguf_config import text
from fastmerge.quant.gguf_pretokenizer import WHOLE_WORDS, pre_name, pre_tokenizer_of

PREFIX = "tokenizer."

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # sentencepiece's spelling of a space
_PADDING_SCORE = -10000.0
#: What reading files that are not what they seem raises.
_MALFORMED = (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OSError)


class _Kind(enum.IntEnum):
    """What a token is, by its number in the file."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass
class _Vocabulary:
    """Tokens by number. scores: None for byte-level ones, which are merged by rank."""

    model: str
    pre: str
    tokens: dict[int, str] = field(default_factory=dict)
    kinds: dict[int, _Kind] = field(default_factory=dict)
    scores: dict[int, float] | None = None


# ---- files to metadata --------------------------------------------------------------------------


def tokenizer_metadata(folder: Path, vocab_size: int) -> tuple[dict[str, GgufValue], list[str]]:
    """Return the metadata keys of a folder's tokenizer, padded to the model's vocab_size, and warnings.

    tokenizer.model wins over tokenizer.json, for it holds the scores themselves. Without either the file
    has no tokenizer, with a warning.

    Raises:
        CheckpointError: the package gguf is missing, or the tokenizer is broken, of a kind that llama.cpp
            lacks, or larger than the vocabulary; names the file.
    """
    package = _gguf_package()
    warnings: list[str] = []
    path = folder / "tokenizer.json"
    tokenizer = read_json_object(path, strict=False) if path.is_file() else {}
    pieces = folder / "tokenizer.model"
    if not tokenizer and not pieces.is_file():
        warnings.append(f"{place(folder)} has no tokenizer: the GGUF file will have none")
        return {"tokenizer.ggml.model": text("none")}, warnings
    try:
        if pieces.is_file():
            vocabulary = _from_pieces(folder, package)
        else:
            vocabulary = _from_json(tokenizer, path, warnings)
        _add_tokens(vocabulary, tokenizer)
        special = _special(folder, vocabulary, vocab_size, package)
    except _MALFORMED as error:
        raise CheckpointError(
            f"{place(folder)}: the tokenizer cannot be made GGUF's: {_line(error)}"
        ) from None
    last = max(vocabulary.tokens, default=-1)
    if last >= vocab_size:
        raise CheckpointError(
            f"{place(folder)}: the tokenizer has {last + 1} tokens, but the model has {vocab_size}; take the "
            "tokenizer that belongs to the model"
        )
    metadata = _token_lists(vocabulary, vocab_size)
    if vocabulary.model == "llama" and (prefix := _space_prefix(folder, tokenizer)) is not None:
        metadata["tokenizer.ggml.add_space_prefix"] = GgufValue(ValueType.BOOL, prefix)
    if vocabulary.model == "gpt2":  # llama.cpp's default depends on the splits
        special.setdefault("tokenizer.ggml.add_bos_token", GgufValue(ValueType.BOOL, False))
    return metadata | special, warnings


def _gguf_package() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise CheckpointError(
            f"writing a tokenizer to GGUF needs the package gguf ({_line(error)}); install it with "
            "pip install 'fastmerge[gguf]'"
        ) from None


def _line(error: BaseException) -> str:
    return shown(f"{type(error).__name__}: {error}")


def _from_json(tokenizer: Mapping[str, Any], path: Path, warnings: list[str]) -> _Vocabulary:
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise CheckpointError(
            f"{place(path)} is a tokenizer of type {shown(model.get('type'))}; GGUF takes BPE here; write "
            "safetensors instead"
        )
    tokens = {int(number): str(token) for token, number in model["vocab"].items()}
    if model.get("byte_fallback"):
        found = _Vocabulary("llama", "default", tokens, scores=_scores(model))
        unknown = model.get("unk_token")
        for number, token in tokens.items():
            if _BYTE.fullmatch(token):
                found.kinds[number] = _Kind.BYTE
            elif token == unknown:
                found.kinds[number] = _Kind.UNKNOWN
        return found
    pre = pre_name(tokenizer.get("pre_tokenizer"), bool(model.get("ignore_merges")))
    if pre is None:
        warnings.append(
            f"{place(path)} splits text in a way that has no known name in GGUF; 'default' is written, and "
            "runtimes may split some text into other tokens"
        )
    return _Vocabulary("gpt2", pre or "default", tokens)


def _scores(model: Mapping[str, Any]) -> dict[int, float]:
    """Return scores by which runtimes merge in the order of the merges: minus the rank of a token's first."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    return {number: -float(ranks.get(token, 0)) for token, number in model["vocab"].items()}


def _from_pieces(folder: Path, package: Any) -> _Vocabulary:
    found = _Vocabulary("llama", "default", scores={})
    assert found.scores is not None
    for number, (token, score, kind) in enumerate(package.SentencePieceVocab(folder).all_tokens()):
        found.tokens[number] = token.decode()
        found.kinds[number] = _Kind(int(kind))
        found.scores[number] = float(score)
    return found


def _add_tokens(vocabulary: _Vocabulary, tokenizer: Mapping[str, Any]) -> None:
    """Add tokenizer.json's added tokens, or say what those that are there already are."""
    for added in tokenizer.get("added_tokens") or ():
        number, content = int(added["id"]), str(added["content"])
        if vocabulary.kinds.get(number) is _Kind.UNKNOWN:
            continue
        is_control = bool(added.get("special"))
        if vocabulary.model == "llama" and not is_control:
            content = content.replace(_SPACE, " ")  # runtimes look for it in the text itself
        vocabulary.tokens[number] = content
        vocabulary.kinds[number] = _Kind.CONTROL if is_control else _Kind.USER_DEFINED


def _token_lists(vocabulary: _Vocabulary, vocab_size: int) -> dict[str, GgufValue]:
    numbers = range(vocab_size)
    tokens = [vocabulary.tokens.get(i, f"[PAD{i}]") for i in numbers]
    kinds = [
        int(vocabulary.kinds.get(i, _Kind.NORMAL if i in vocabulary.tokens else _Kind.UNUSED))
        for i in numbers
    ]
    metadata = {
        "tokenizer.ggml.model": text(vocabulary.model),
        "tokenizer.ggml.pre": text(vocabulary.pre),
        "tokenizer.ggml.tokens": GgufValue(ValueType.ARRAY, tokens, ValueType.STRING),
    }
    if vocabulary.scores is not None:
        scores = [vocabulary.scores.get(i, _PADDING_SCORE) for i in numbers]
        metadata["tokenizer.ggml.scores"] = GgufValue(ValueType.ARRAY, scores, ValueType.F32)
    metadata["tokenizer.ggml.token_type"] = GgufValue(ValueType.ARRAY, kinds, ValueType.I32)
    return metadata


def _special(
    folder: Path, vocabulary: _Vocabulary, vocab_size: int, package: Any
) -> dict[str, GgufValue]:
    """Return merges, the numbers of special tokens and the chat template, as the package gguf finds them."""
    writer = package.GGUFWriter(None, "llama")
    byte_level = vocabulary.model == "gpt2"
    special = package.SpecialVocab(folder, load_merges=byte_level, n_vocab=vocab_size)
    special.add_to_gguf(writer, quiet=True)
    found = {}
    for key, value in writer.kv_data[0].items():
        if key.startswith(PREFIX):
            kind = ValueType(int(value.type))
            of = ValueType.STRING if kind is ValueType.ARRAY else None
            found[key] = GgufValue(kind, value.value, of)
    return found


def _space_prefix(folder: Path, tokenizer: Mapping[str, Any]) -> bool | None:
    """Return whether text gets a space in front, None where nothing says so."""
    with suppress(CheckpointError):  # absent, or broken: then the other file decides
        said = read_json_object(folder / "tokenizer_config.json", strict=False).get(
            "add_prefix_space"
        )
        if isinstance(said, bool):
            return said
    if not tokenizer:
        return None
    kinds = (tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer"))
    steps = [step for kind in kinds if isinstance(kind, dict) for step in _steps(kind)]
    return any(
        step.get("type") == "Prepend"
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )


def _steps(kind: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    inner = kind.get("normalizers") or kind.get("pretokenizers") or [kind]
    return [step for step in inner if isinstance(step, dict)]


# ---- metadata to files --------------------------------------------------------------------------


def copied_tokenizer(gguf: GgufFile) -> dict[str, GgufValue]:
    """Return the metadata keys of a GGUF file's tokenizer, for another GGUF file."""
    return {key: value for key, value in gguf.metadata.items() if key.startswith(PREFIX)}


def tokenizer_files(gguf: GgufFile) -> tuple[dict[str, bytes], list[str]]:
    """Return tokenizer.json and tokenizer_config.json for a GGUF file's metadata, and warnings.

    The vocabulary is converted by transformers; without it, or where it fails, there are no files but a
    warning.
    """
    where = place(gguf.path)
    model = gguf.get("tokenizer.ggml.model", "none")
    if model in ("none", "no_vocab"):
        return {}, [f"{where} has no tokenizer: the output folder will have none"]
    convert = _converter()
    if convert is None:
        return {}, [
            f"the tokenizer in {where} needs transformers to be written as files; pip install "
            "transformers, or copy the original model's tokenizer files into the output folder"
        ]
    warnings: list[str] = []
    try:
        backend, _ = convert(gguf.get("general.architecture"), _tokenizer_dict(gguf))
        content = json.loads(backend.to_str())
        _mend(content, gguf, warnings)
        config = _tokenizer_config(gguf)
        content["post_processor"] = _post_processor(gguf, config)
    except _MALFORMED as error:
        return {}, [
            f"the tokenizer in {where} cannot be written as files ({_line(error)}); copy the original "
            "model's tokenizer files into the output folder"
        ]
    files = {"tokenizer.json": content, "tokenizer_config.json": config}
    return {
        n: (json.dumps(c, ensure_ascii=False, indent=2) + "\n").encode() for n, c in files.items()
    }, warnings


def _converter() -> Any:
    """Return transformers' convert_gguf_tokenizer, None where there is none."""
    for module in ("transformers.integrations.gguf", "transformers.integrations.ggml"):
        with suppress(ImportError, AttributeError):
            return importlib.import_module(module).convert_gguf_tokenizer
    return None


def _tokenizer_dict(gguf: GgufFile) -> dict[str, Any]:
    """Return what convert_gguf_tokenizer takes."""
    names = {
        "tokenizer_type": "model",
        "pre_tokenizer_type": "pre",
        "tokens": "tokens",
        "scores": "scores",
        "token_type": "token_type",
        "merges": "merges",
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "unk_token_id": "unknown_token_id",
        "pad_token_id": "padding_token_id",
        "add_prefix_space": "add_space_prefix",
    }
    keys = {name: f"tokenizer.ggml.{key}" for name, key in names.items()}
    return {name: gguf.get(key) for name, key in keys.items() if key in gguf.metadata}


def _mend(content: dict[str, Any], gguf: GgufFile, warnings: list[str]) -> None:
    """Let tokenizer.json split text as the file says runtimes do: the converter knows fewer ways."""
    model = gguf.get("tokenizer.ggml.model")
    if model == "llama":
        content |= _pieces(gguf.get("tokenizer.ggml.add_space_prefix", True) is True)
    if model != "gpt2":
        return
    pre = gguf.get("tokenizer.ggml.pre", "default")
    known = pre_tokenizer_of(pre)
    if known is None:
        warnings.append(
            f"{place(gguf.path)} splits text as {shown(pre)}, which is not known here; tokenizer.json may "
            "split some text into other tokens"
        )
        return
    content["pre_tokenizer"] = known
    content["model"]["ignore_merges"] = pre in WHOLE_WORDS


def _pieces(prefix: bool) -> dict[str, Any]:
    """Return the parts of tokenizer.json that spell spaces as pieces do. prefix: text gets one in front."""
    replace: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    spell = [{"type": "Prepend", "prepend": _SPACE}, replace] if prefix else [replace]
    undo: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        undo.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": spell},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": undo},
    }


def _tokenizer_config(gguf: GgufFile) -> dict[str, Any]:
    tokens = gguf.get("tokenizer.ggml.tokens")
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = gguf.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(number, int) and 0 <= number < len(tokens):
            config[f"{name}_token"] = tokens[number]
    is_pieces = gguf.get("tokenizer.ggml.model") == "llama"
    starts = is_pieces or gguf.get("tokenizer.ggml.pre") in WHOLE_WORDS  # llama.cpp's defaults
    for name, default in (("bos", starts), ("eos", False)):
        wanted = bool(gguf.get(f"tokenizer.ggml.add_{name}_token", default))
        config[f"add_{name}_token"] = wanted and f"{name}_token" in config
    template = gguf.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    config["clean_up_tokenization_spaces"] = False
    return config


def _post_processor(gguf: GgufFile, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return tokenizer.json's post_processor: what is put around a text."""
    specials: dict[str, Any] = {}

    def around(text: str, kind: int) -> list[dict[str, Any]]:
        steps: list[dict[str, Any]] = [{"Sequence": {"id": text, "type_id": kind}}]
        for name, at in (("bos", 0), ("eos", 2)):
            if config[f"add_{name}_token"]:
                token = config[f"{name}_token"]
                number = gguf.get(f"tokenizer.ggml.{name}_token_id")
                specials[token] = {"id": token, "ids": [number], "tokens": [token]}
                steps.insert(at, {"SpecialToken": {"id": token, "type_id": kind}})
        return steps

    single, pair = around("A", 0), around("A", 0) + around("B", 1)
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": specials,
    }
