"""Tiny models of the Llama family with random weights, tokenizers, and GGUF files filled by numpy alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from fastmerge.checkpoint.gguf import GgufValue
from fastmerge.checkpoint.layout import ShardLayout
from fastmerge.coding import Format
from fastmerge.dtypes import DType
from fastmerge.quant.gguf_writer import (
    GgufTarget,
    gguf_constants,
    gguf_layout,
    gguf_metadata,
    gguf_targets,
)

#: Text with what pre-tokenizers disagree on.
TEXT = (
    "Hello world, it's 12345 o'clock!\n\n  The naïve café's   price: 3.50€ (x+=y) HeLLo I'M\t\n ab"
)
CORPUS = [
    TEXT,
    "the quick brown fox jumps over the lazy dog " * 3,
    "def f(x):\n    return x + 1\n",
] * 5

_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rms_norm_eps": 1e-5,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def tiny_model(kind: str, **options: Any) -> transformers.PreTrainedModel:
    """Return a model whose norms and biases are no constants, so that a mix-up shows."""
    configs = {
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
    }
    config = configs[kind](**{**_SHAPE, **options})
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config, torch_dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(
                    torch.randn_like(parameter) * 0.1 + (1.0 if "norm" in name else 0.0)
                )
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def tensors_of(model: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    """Return what save_pretrained stores: a tied head once."""
    state = {n: t.detach().numpy() for n, t in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    return state


def logits(model: transformers.PreTrainedModel) -> np.ndarray:
    with torch.no_grad():
        return model(torch.arange(3, 35)[None]).logits[0].numpy()


def stored(values: np.ndarray, target: GgufTarget) -> bytes:
    """Return a tensor's bytes: rows of a head taken from its two halves in turn, then its type."""
    import gguf

    rotary = target.coding.rotary
    if rotary:
        heads = values.reshape(-1, 2, rotary // 2, *values.shape[1:])
        values = heads.swapaxes(1, 2).reshape(values.shape)
    if target.coding.format is not Format.DENSE:
        blocks = gguf.quantize(values, gguf.GGMLQuantizationType(target.type))
        return np.ascontiguousarray(blocks).tobytes()
    if target.coding.dtype is DType.BF16:
        bits = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
        return bits.view(torch.uint8).numpy().tobytes()
    return values.astype(
        {DType.F32: np.float32, DType.F16: np.float16}[target.coding.dtype]
    ).tobytes()


def plan(
    model: transformers.PreTrainedModel,
    what: Format | DType,
    tokenizer: dict[str, GgufValue],
    **options: Any,
) -> tuple[dict[str, GgufTarget], ShardLayout]:
    config = model.config.to_dict()
    shapes = {n: t.shape for n, t in tensors_of(model).items()}
    targets = gguf_targets(config, shapes, what, **options)
    metadata, warnings = gguf_metadata(config, what, tokenizer, name="tiny")
    assert warnings == []
    return targets, gguf_layout(metadata, targets, shapes, gguf_constants(config))


def write_file(path: Path, targets: dict[str, GgufTarget], layout: ShardLayout, model: Any) -> None:
    """Fill a layout the way the engine does: whole file first, tensors in any order."""
    tensors = tensors_of(model)
    with path.open("wb") as file:
        file.truncate(layout.size)
        file.write(layout.header)
        for hf, target in reversed(targets.items()):
            data = stored(tensors[hf], target)
            assert len(data) == layout.tensors[target.name].n_bytes
            file.seek(layout.tensors[target.name].offset)
            file.write(data)


def save_model(path: Path, what: Format | DType, model: Any, **options: Any) -> Path:
    """Write a model without a real tokenizer, as one GGUF file."""
    targets, layout = plan(model, what, plain_tokens(model.config.vocab_size), **options)
    write_file(path, targets, layout, model)
    return path


def plain_tokens(n: int) -> dict[str, GgufValue]:
    from fastmerge.checkpoint.gguf import ValueType
    from fastmerge.quant.gguf_config import text

    tokens = GgufValue(ValueType.ARRAY, [f"<{i}>" for i in range(n)], ValueType.STRING)
    return {"tokenizer.ggml.model": text("none"), "tokenizer.ggml.tokens": tokens}


# ---- tokenizers ---------------------------------------------------------------------------------

SPECIAL = ["<unk>", "<s>", "</s>"]

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")


def byte_level(pre: str) -> Tokenizer:
    """Train a byte-level tokenizer that splits as models known under this name in GGUF do."""
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    with_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    splits = {
        "gpt-2": [with_words],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), with_words],
        "llama-bpe": [pre_tokenizers.Split(Regex(_LLAMA3), "isolated"), bytes_only],
        "qwen2": [pre_tokenizers.Split(Regex(_QWEN2), "isolated"), bytes_only],
        "default": [pre_tokenizers.Split(Regex(r"\w+"), "isolated"), bytes_only],
    }[pre]
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits) if len(splits) > 1 else splits[0]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=317,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Train a tokenizer as Llama 2's: spaces are pieces, unknown characters their bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=319,
        special_tokens=[*SPECIAL, *(f"<0x{i:02X}>" for i in range(256))],
        limit_alphabet=20,
        show_progress=False,
    )
    tokenizer.train_from_iterator([c.replace(" ", "▁") for c in CORPUS], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in SPECIAL]
    return Tokenizer.from_str(json.dumps(content))


def save_tokenizer(tokenizer: Tokenizer, folder: Path, **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **options
    )
    fast.save_pretrained(folder)
    return folder
