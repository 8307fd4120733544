"""config.json of the Llama family from a GGUF file's metadata, and back."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from fastmerge.checkpoint.gguf import GgufFile, GgufValue, ValueType
from fastmerge.checkpoint.wording import place, shown
from fastmerge.dtypes import DType
from fastmerge.errors import CheckpointError
from fastmerge.quant.gguf_names import EMBEDDING, HEAD, Architecture

#: GGUF's key without the architecture in front -> config.json's.
_WHOLE = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
_TOKENS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}

#: Scaled rotary embeddings: config.json's key -> GGUF's, after `rope.scaling.`.
_SCALING = {
    "factor": "factor",
    "original_max_position_embeddings": "original_context_length",
    "extrapolation_factor": "yarn_ext_factor",
    "attention_factor": "yarn_attn_factor",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}
_WHOLE_SCALING = ("original_max_position_embeddings",)

#: What Llama 3.1 to 3.3 have beside their factor; GGUF stores only what follows from them.
LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LARGEST_HEAD = 8192  # far above any, far below what would take long
ROPE_THETA = 10000.0
EPSILON = 1e-6


def text(value: str) -> GgufValue:
    return GgufValue(ValueType.STRING, value)


def u32(value: int) -> GgufValue:
    return GgufValue(ValueType.U32, value)


def f32(value: float) -> GgufValue:
    return GgufValue(ValueType.F32, value)


# ---- metadata to config.json --------------------------------------------------------------------


def heads_of(gguf: GgufFile, architecture: str) -> tuple[int, int]:
    """Return the numbers of query and of key heads."""
    heads = _whole(gguf, f"{architecture}.attention.head_count")
    key = f"{architecture}.attention.head_count_kv"
    return heads, heads if key not in gguf.metadata else _whole(gguf, key)


def config_of(
    gguf: GgufFile, architecture: Architecture, dtype: DType, rope_factors: bytes | None
) -> tuple[dict[str, Any], list[str]]:
    """Return config.json for a file's metadata, and what it cannot say as warnings.

    rope_factors: content of the tensor rope_freqs.weight, where there is one.

    Raises:
        CheckpointError: a value is missing, or not a number; names the key.
    """
    name, warnings = architecture.name, list[str]()
    config: dict[str, Any] = {
        "architectures": [architecture.model_class],
        "model_type": architecture.model_type,
        "hidden_act": "silu",
    }
    config |= {key: _whole(gguf, f"{name}.{source}") for source, key in _WHOLE.items()}
    heads, config["num_key_value_heads"] = heads_of(gguf, name)
    config["head_dim"] = _head_dim(gguf, name, config["hidden_size"], heads)
    config["rms_norm_eps"] = _shortest(_number(gguf, f"{name}.attention.layer_norm_rms_epsilon"))
    theta_key = f"{name}.rope.freq_base"
    config["rope_theta"] = _number(gguf, theta_key) if theta_key in gguf.metadata else ROPE_THETA
    scaling = _scaling(gguf, name, warnings)
    if rope_factors is not None:
        scaling = _llama3(rope_factors, config, warnings, place(gguf.path))
    if scaling is not None:
        config["rope_scaling"] = scaling
    if EMBEDDING not in gguf.tensors or len(gguf.tensors[EMBEDDING].shape) != 2:
        raise CheckpointError(f"{place(gguf.path)} has no matrix {EMBEDDING}")
    config["vocab_size"] = gguf.tensors[EMBEDDING].shape[0]
    config["tie_word_embeddings"] = HEAD not in gguf.tensors
    if architecture.name == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in gguf.tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in gguf.tensors
    elif architecture.name == "qwen3":
        config["attention_bias"] = "blk.0.attn_q.bias" in gguf.tensors
    for source, key in _TOKENS.items():
        if f"tokenizer.ggml.{source}_token_id" in gguf.metadata:
            config[key] = _whole(gguf, f"tokenizer.ggml.{source}_token_id", least=0)
    config["torch_dtype"] = dtype.torch
    return config, warnings


def _head_dim(gguf: GgufFile, name: str, width: int, heads: int) -> int:
    for key in (f"{name}.attention.key_length", f"{name}.rope.dimension_count"):
        if key in gguf.metadata:
            return _whole(gguf, key)
    return width // heads


def _scaling(gguf: GgufFile, name: str, warnings: list[str]) -> dict[str, Any] | None:
    kind = gguf.get(f"{name}.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        warnings.append(
            f"{place(gguf.path)} scales rotary embeddings by {shown(kind)}, which config.json cannot say; "
            "take config.json from the original model"
        )
        return None
    found = {"rope_type": kind}
    for key, source in _SCALING.items():
        source = f"{name}.rope.scaling.{source}"
        if source in gguf.metadata:
            whole = key in _WHOLE_SCALING
            found[key] = _whole(gguf, source) if whole else _shortest(_number(gguf, source))
    return found


def _llama3(
    data: bytes, config: Mapping[str, Any], warnings: list[str], where: str
) -> dict[str, Any] | None:
    """Return the rope_scaling that gives these factors, or None with a warning."""
    factors = struct.unpack(f"<{len(data) // 4}f", data)
    if len(factors) == config["head_dim"] // 2 and all(0 < f < math.inf for f in factors):
        guess = {"rope_type": "llama3", "factor": max(factors)} | LLAMA3
        wanted = llama3_factors(guess, config["rope_theta"], config["head_dim"])
        if all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(factors, wanted, strict=True)):
            return guess
    warnings.append(
        f"{where} holds rotary factors that are not Llama 3's, which config.json cannot say; take "
        "config.json from the original model"
    )
    return None


def llama3_factors(rope: Mapping[str, Any], theta: float, head_dim: int) -> list[float]:
    """Return what each rotary frequency is divided by in Llama 3's scaling, one number per pair.

    1 for wavelengths shorter than original / high_freq_factor, `factor` for those longer than
    original / low_freq_factor, and in between 1 over the line between both in 1 / wavelength.
    """
    factor = float(rope.get("factor", 8.0))
    low, high = (float(rope.get(k, LLAMA3[k])) for k in ("low_freq_factor", "high_freq_factor"))
    original = rope.get("original_max_position_embeddings", 8192)
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def _whole(gguf: GgufFile, key: str, least: int = 1) -> int:
    found = gguf.metadata.get(key)
    value = found.value if found is not None else None
    if found is not None and found.of is not None and value and value.count(value[0]) == len(value):
        value = value[0]  # one number per layer, all the same
    if type(value) is not int or value < least:
        what = (
            "is missing"
            if found is None
            else f"is {shown(value)}, not a whole number from {least} on"
        )
        raise CheckpointError(f"{place(gguf.path)}: key {shown(key)} {what}")
    return value


def _number(gguf: GgufFile, key: str) -> float:
    value = gguf.get(key)
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
        what = "is missing" if value is None else f"is {shown(value)}, not a positive number"
        raise CheckpointError(f"{place(gguf.path)}: key {shown(key)} {what}")
    return float(value)


def _shortest(value: float) -> float:
    """Return the shortest decimal number that is this one in float32: 1e-05, not 9.999999747378752e-06."""
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        with suppress(OverflowError):  # beyond float32: rounded up, or as it is in the file
            if struct.pack("<f", short) == struct.pack("<f", value):
                return short
    return value


# ---- config.json to metadata --------------------------------------------------------------------


@contextmanager
def config_errors() -> Iterator[None]:
    """Turn what a config.json without a number where one belongs causes into one clear line."""
    try:
        yield
    except KeyError as error:
        raise CheckpointError(
            f"config.json has no {error.args[0]}, which a GGUF file needs"
        ) from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"config.json has a value that a GGUF file cannot take: {shown(str(error))}"
        ) from None


def rope_of(config: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    """Return rope_theta and the scaling of a config.json, old or new: where scaling is none, {}."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", ROPE_THETA))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return float(theta), {}
    return float(theta), {**rope, "rope_type": kind}


def head_dim_of(config: Mapping[str, Any]) -> int:
    """Return the rows of one head of a config.json."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def architecture_metadata(
    config: Mapping[str, Any], architecture: Architecture
) -> tuple[dict[str, GgufValue], list[str]]:
    """Return the keys that describe a model, general.architecture first, and warnings.

    Raises:
        CheckpointError: config.json lacks a number; names its key.
    """
    name, warnings = architecture.name, list[str]()
    metadata = {"general.architecture": text(name)}
    with config_errors():
        for target, key in _WHOLE.items():
            metadata[f"{name}.{target}"] = u32(int(config[key]))
        kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        head_dim, (theta, rope) = head_dim_of(config), rope_of(config)
        metadata[f"{name}.attention.head_count_kv"] = u32(int(kv_heads))
        metadata[f"{name}.attention.key_length"] = u32(head_dim)
        metadata[f"{name}.attention.value_length"] = u32(head_dim)
        epsilon = float(config.get("rms_norm_eps", EPSILON))
        metadata[f"{name}.attention.layer_norm_rms_epsilon"] = f32(epsilon)
        metadata[f"{name}.rope.dimension_count"] = u32(head_dim)
        metadata[f"{name}.rope.freq_base"] = f32(theta)
        metadata[f"{name}.vocab_size"] = u32(int(config["vocab_size"]))
        kind = rope.get("rope_type")
        if kind in ("linear", "yarn"):
            metadata |= _scaling_metadata(f"{name}.rope.scaling", rope)
        elif kind not in (None, "llama3"):
            warnings.append(
                f"config.json scales rotary embeddings by {shown(kind)}, which a GGUF file cannot say: long "
                "contexts will be worse"
            )
    return metadata, warnings


def _scaling_metadata(prefix: str, rope: Mapping[str, Any]) -> dict[str, GgufValue]:
    metadata = {f"{prefix}.type": text(rope["rope_type"])}
    for key, target in _SCALING.items():
        if rope.get(key) is not None:
            whole = key in _WHOLE_SCALING
            metadata[f"{prefix}.{target}"] = u32(int(rope[key])) if whole else f32(float(rope[key]))
    return metadata


def rope_factors_of(config: Mapping[str, Any]) -> bytes | None:
    """Return the content of rope_freqs.weight, [head_dim / 2] in float32, where config.json asks for it."""
    with config_errors():
        theta, rope = rope_of(config)
        if rope.get("rope_type") != "llama3":
            return None
        head_dim = head_dim_of(config)
        if head_dim > LARGEST_HEAD:
            raise ValueError(f"heads of {head_dim}")
        factors = llama3_factors(rope, theta, head_dim)
    return struct.pack(f"<{len(factors)}f", *factors)
