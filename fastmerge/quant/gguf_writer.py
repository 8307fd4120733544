"""Models as one GGUF file: which type each tensor gets, and the file's layout before a byte is merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmerge.checkpoint.gguf import (
    ALIGNMENT_KEY,
    BLOCK_TYPES,
    GgufFile,
    GgufValue,
    lay_out_gguf,
)
from fastmerge.checkpoint.header import TensorInfo
from fastmerge.checkpoint.layout import ShardLayout
from fastmerge.checkpoint.wording import shown
from fastmerge.coding import Coding, Format
from fastmerge.dtypes import BY_TORCH, DType
from fastmerge.errors import CheckpointError
from fastmerge.quant.format import Constant
from fastmerge.quant.gguf_config import (
    architecture_metadata,
    config_errors,
    head_dim_of,
    rope_factors_of,
    text,
    u32,
)
from fastmerge.quant.gguf_names import (
    BY_MODEL_TYPE,
    EMBEDDING,
    HEAD,
    ROPE_FACTORS,
    TYPE_OF,
    Architecture,
    architecture_of,
    gguf_name,
    rotary_heads,
)

FILE_NAME = "model.gguf"

#: general.file_type: what most of a file's elements are.
FILE_TYPES: dict[Format | DType, int] = {
    DType.F32: 0,
    DType.F16: 1,
    DType.BF16: 32,
    Format.Q4_0: 2,
    Format.Q4_1: 3,
    Format.Q8_0: 7,
    Format.Q4_K: 14,
    Format.Q6_K: 18,
    Format.GGUF_MXFP4: 38,
    Format.GGUF_NVFP4: 39,
}
QUANTIZATION_VERSION = 2

#: For rows that are not whole blocks of the type asked for. llama.cpp takes a type of 32 elements with more
#: bits, for a smaller error; of those that are written here that is Q8_0 alone: at 5 bits Q4_1's error is
#: 7 % above Q4_K's.
_FALLBACKS = (Format.Q8_0, DType.F16)

#: Keys of a GGUF source that do not hold for what is merged from it.
_OWN = ("general.file_type", "general.quantization_version", "general.name", "split.")


@dataclass(frozen=True)
class GgufTarget:
    """What one tensor becomes in the file: its name there, its coding, and its type's number."""

    name: str
    coding: Coding
    type: int


def gguf_targets(
    config: Mapping[str, Any] | None,
    shapes: Mapping[str, tuple[int, ...]],
    format: Format | DType,
    *,
    dtype: DType | None = None,
    embedding: Format | DType | None = None,
    head: Format | DType | None = None,
) -> dict[str, GgufTarget]:
    """Decide what each tensor of a model becomes; names that GGUF has no place for are left out.

    Matrices get `format`, tensors of one dimension float32. Rows that are not whole blocks become Q8_0, or
    where 32 does not divide them float16. A tied head and buffers such as inv_freq are left out.

    Args:
        config: config.json of the output; None: names are GGUF's own, and no row changes its place.
        shapes: name in Hugging Face's checkpoints -> shape.
        dtype: what values are rounded to before they are coded; None: config.json's type.
        embedding, head: of the token embedding and the output head; None: Q8_0 where `format` is of blocks.
    Raises:
        CheckpointError: an architecture or a tensor without a name in GGUF; names it and the remedy.
    """
    rows = _Rows.of(config) if config is not None else None
    if config is not None:
        dtype = dtype or _config_dtype(config)
    default = Format.Q8_0 if isinstance(format, Format) else format
    wanted = {EMBEDDING: embedding or default, HEAD: head or default}
    is_tied = config is not None and bool(config.get("tie_word_embeddings", False))
    targets = {}
    for hf, shape in shapes.items():
        name = gguf_name(hf) if rows else hf
        if hf.endswith(".rotary_emb.inv_freq") or (name == HEAD and is_tied):
            continue
        if name is None:
            raise CheckpointError(
                f"tensor {shown(hf)} has no name in a GGUF file of this kind; write safetensors instead"
            )
        what = _held(wanted.get(name, format), shape)
        rotary = rows.rotary(hf, name, shape) if rows else 0
        targets[hf] = GgufTarget(name, _coding(what, rotary, dtype or DType.F32), TYPE_OF[what])
    return targets


@dataclass(frozen=True)
class _Rows:
    """How a config.json arranges the rows of q and k."""

    interleaved: bool
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> _Rows:
        architecture = _known(config)
        with config_errors():
            heads = int(config["num_attention_heads"])
            kv_heads = int(config.get("num_key_value_heads") or heads)
            return cls(architecture.interleaved, heads, kv_heads, head_dim_of(config))

    def rotary(self, hf: str, name: str, shape: tuple[int, ...]) -> int:
        """Return the rows of a head where the file has them interleaved, else 0."""
        n = rotary_heads(name, self.heads, self.kv_heads) if self.interleaved else None
        if n is None:
            return 0
        if self.head_dim % 2 or len(shape) not in (1, 2) or shape[0] != n * self.head_dim:
            raise CheckpointError(
                f"tensor {shown(hf)} is {list(shape)}, but config.json says {n} heads of {self.head_dim} rows"
            )
        return self.head_dim


def _known(config: Mapping[str, Any]) -> Architecture:
    architecture = architecture_of(config)
    if architecture is None:
        raise CheckpointError(
            f"models of type {shown(config.get('model_type'))} cannot be written as GGUF, only "
            f"{', '.join(BY_MODEL_TYPE)}; write safetensors and use llama.cpp's convert_hf_to_gguf.py"
        )
    return architecture


def _config_dtype(config: Mapping[str, Any]) -> DType:
    said = config.get("dtype") or config.get("torch_dtype")
    found = BY_TORCH.get(said) if isinstance(said, str) else None
    return found if found is not None and found.is_merged else DType.F32


def _held(wanted: Format | DType, shape: tuple[int, ...]) -> Format | DType:
    """Return the type that holds a tensor: the one that is wanted, or what it falls back to."""
    if len(shape) < 2:
        return DType.F32
    for what in (wanted, *_FALLBACKS):
        if shape[-1] % BLOCK_TYPES[TYPE_OF[what]].elements == 0:
            return what
    raise AssertionError("float16 holds every shape")


def _coding(what: Format | DType, rotary: int, dtype: DType) -> Coding:
    if isinstance(what, DType):
        return Coding(Format.DENSE, what, rotary=rotary)
    return Coding(what, dtype, rotary=rotary)


def gguf_constants(config: Mapping[str, Any]) -> tuple[Constant, ...]:
    """Return the tensors of a file that follow from config.json: Llama 3's rotary factors."""
    content = rope_factors_of(config)
    if content is None:
        return ()
    return (Constant(ROPE_FACTORS, DType.F32, (len(content) // 4,), content),)


def gguf_metadata(
    config: Mapping[str, Any],
    format: Format | DType,
    tokenizer: Mapping[str, GgufValue],
    *,
    name: str = "",
) -> tuple[dict[str, GgufValue], list[str]]:
    """Return the metadata of a model that comes from a folder, and warnings.

    tokenizer: of `gguf_tokenizer.tokenizer_metadata`, or of a GGUF file by `copied_tokenizer`.

    Raises:
        CheckpointError: config.json lacks a number, or is of another architecture.
    """
    architecture = architecture_of(config)
    if architecture is None:
        raise CheckpointError(
            f"models of type {shown(config.get('model_type'))} cannot be written as GGUF"
        )
    described, warnings = architecture_metadata(config, architecture)
    return {**described, **_general(format, name), **tokenizer}, warnings


def copied_metadata(
    gguf: GgufFile, config: Mapping[str, Any] | None, format: Format | DType, *, name: str = ""
) -> tuple[dict[str, GgufValue], list[str]]:
    """Return the metadata of a model that comes from a GGUF file: its own, with what config.json says.

    config: of the output; None for an architecture that has none here.
    """
    copied = {
        k: v for k, v in gguf.metadata.items() if not k.startswith(_OWN) and k != ALIGNMENT_KEY
    }
    architecture = None if config is None else architecture_of(config)
    described: dict[str, GgufValue] = {}
    warnings: list[str] = []
    if config is not None and architecture is not None:
        described, warnings = architecture_metadata(config, architecture)
    return {
        **copied,
        **described,
        **_general(format, name or gguf.get("general.name", "")),
    }, warnings


def _general(format: Format | DType, name: str) -> dict[str, GgufValue]:
    general = {"general.type": text("model")}
    if name:
        general["general.name"] = text(name)
    general["general.file_type"] = u32(FILE_TYPES[format])
    general["general.quantization_version"] = u32(QUANTIZATION_VERSION)
    return general


def gguf_layout(
    metadata: Mapping[str, GgufValue],
    targets: Mapping[str, GgufTarget],
    shapes: Mapping[str, tuple[int, ...]],
    constants: Sequence[Constant] = (),
    file_name: str = FILE_NAME,
) -> ShardLayout:
    """Lay out one GGUF file with the tensors of `targets`, in their order.

    The layout's header ends where the first tensor's data begins: constants, which come first, are in it with
    their content. Its tensors go by their names in the file; blocks are U8 of [bytes].

    Raises:
        CheckpointError: two tensors of one name, or a name or value that cannot be stored.
    """
    fixed = [(c.name, TYPE_OF[c.dtype], c.shape) for c in constants]
    merged = [(t.name, t.type, shapes[hf]) for hf, t in targets.items()]
    header, places, size = lay_out_gguf(metadata, fixed + merged, file_name)
    for constant, at in zip(constants, places[: len(fixed)], strict=True):
        assert constant.content is not None and len(constant.content) == at.n_bytes
        header += bytes(at.offset - len(header)) + constant.content
    first = places[len(fixed)].offset if merged else size
    header += bytes(first - len(header))
    file = Path(file_name)
    tensors = {}
    for target, at in zip(targets.values(), places[len(fixed) :], strict=True):
        coding = target.coding
        dense = coding.format is Format.DENSE
        dtype, shape = (coding.dtype, at.shape) if dense else (DType.U8, (at.n_bytes,))
        tensors[at.name] = TensorInfo(at.name, dtype, shape, file, at.offset, at.n_bytes)
    return ShardLayout(file_name, header, size, tensors)
