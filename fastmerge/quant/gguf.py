"""GGUF files as checkpoints: Hugging Face's names, a config.json made from the metadata, blocks as codes."""

from __future__ import annotations

import math
import os
import struct
from dataclasses import replace
from pathlib import Path

from fastmerge.checkpoint.coded import CodedInfo
from fastmerge.checkpoint.files import opened, read_at
from fastmerge.checkpoint.folder import Checkpoint
from fastmerge.checkpoint.gguf import BLOCK_TYPES, GgufFile, GgufTensor, read_gguf
from fastmerge.checkpoint.header import TensorInfo
from fastmerge.checkpoint.wording import place, reason, shown
from fastmerge.coding import Coding, Format
from fastmerge.dtypes import DType
from fastmerge.errors import CheckpointError
from fastmerge.quant.gguf_config import LARGEST_HEAD, config_of, heads_of
from fastmerge.quant.gguf_names import (
    ARCHITECTURES,
    AUXILIARY,
    CODED_TYPES,
    DENSE_TYPES,
    ROPE_FACTORS,
    TYPE_OF,
    Architecture,
    hf_name,
    rotary_heads,
)

#: What a dense copy of blocks is: they do not say, and nearly all models were trained in it.
CODED_DTYPE = DType.BF16

#: Bytes of the largest tensor that is read on opening: rotary factors, of a pair each.
_SMALL = LARGEST_HEAD // 2 * 4


def find_gguf(path: Path | str) -> Path:
    """Return the GGUF file that a path means: itself, or the only one in a folder.

    Raises:
        CheckpointError: no such path, or a folder with none or several; names them.
    """
    path = Path(path)
    try:
        if not path.is_dir():
            return path
        names = sorted(n for n in os.listdir(path) if n.endswith(".gguf") and not n.startswith("."))
    except OSError as error:
        raise CheckpointError(f"{place(path)} cannot be read: {reason(error)}") from None
    if len(names) != 1:
        which = ": " + shown(", ".join(names)) if names else ""
        raise CheckpointError(
            f"{place(path)} holds {len(names) or 'no'} .gguf files{which}; give the path of one"
        )
    return path / names[0]


def is_gguf(path: Path) -> bool:
    """Return whether a path is a GGUF file, or a folder whose weights are in one."""
    if not path.is_dir():
        return path.suffix == ".gguf"
    names = [n for n in os.listdir(path) if not n.startswith(".")]
    return any(n.endswith(".gguf") for n in names) and not any(
        n.endswith((".safetensors", ".bin")) for n in names
    )


def open_gguf(path: Path | str) -> Checkpoint:
    """Open a GGUF file, or the only one in a folder, as a checkpoint; no weight is read.

    Tensors of the Llama family have the names that Hugging Face's checkpoints give them, others their own.
    Blocks are codes whose dense copy is bfloat16; rows of q and k that are stored interleaved are codes too,
    of DENSE (a bias counts as [rows, 1]).

    Raises:
        CheckpointError: the file is broken, is not a whole model, or holds a type that is not decoded;
            names the file, the tensor and the remedy.
    """
    path = Path(path)
    gguf = read_gguf(find_gguf(path))
    _check_model(gguf)
    name = gguf.get("general.architecture")
    architecture = ARCHITECTURES.get(name) if isinstance(name, str) else None
    warnings = []
    config = None
    if architecture is None:
        warnings.append(
            f"{place(gguf.path)} is of architecture {shown(name)}, whose tensors keep their GGUF names and "
            f"which gets no config.json; known are {', '.join(ARCHITECTURES)}"
        )
    else:
        factors = _content(gguf, ROPE_FACTORS)
        config, warnings = config_of(gguf, architecture, model_dtype(gguf), factors)
    tensors = _tensors(gguf, architecture, warnings)
    return Checkpoint(path, tensors, config, [gguf.path], [gguf.identity], warnings=tuple(warnings))


def model_dtype(gguf: GgufFile) -> DType:
    """Return the type that most of a file's elements have, or their dense copy has."""
    n: dict[DType, int] = {}
    for tensor in gguf.tensors.values():
        dtype = DENSE_TYPES.get(tensor.type, CODED_DTYPE)
        n[dtype] = n.get(dtype, 0) + math.prod(tensor.shape)
    floats = {dtype: count for dtype, count in n.items() if dtype.is_merged}
    return max(floats, key=lambda dtype: floats[dtype], default=CODED_DTYPE)


def _check_model(gguf: GgufFile) -> None:
    kind = gguf.get("general.type", "model")
    if kind != "model":
        raise CheckpointError(f"{place(gguf.path)} holds {shown(kind)}, not a model")
    parts = gguf.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise CheckpointError(
            f"{place(gguf.path)} is one of {parts} parts; join them with llama-gguf-split --merge"
        )


def _tensors(
    gguf: GgufFile, architecture: Architecture | None, warnings: list[str]
) -> dict[str, TensorInfo | CodedInfo]:
    heads = heads_of(gguf, architecture.name) if architecture and architecture.interleaved else None
    tensors: dict[str, TensorInfo | CodedInfo] = {}
    unknown = []
    for tensor in gguf.tensors.values():
        name = hf_name(tensor.name) if architecture else tensor.name
        if architecture and (tensor.name in AUXILIARY or _is_scale(tensor, gguf)):
            continue
        if name is None:
            unknown.append(name := tensor.name)
        if name in tensors:
            raise CheckpointError(f"{place(gguf.path)} holds tensor {shown(name)} under two names")
        rotary = _rotary(tensor, heads, gguf) if heads else 0
        tensors[name] = _tensor(name, tensor, rotary, gguf)
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        warnings.append(
            f"{place(gguf.path)} holds {shown(unknown[0])}{more}, which keep their GGUF names: the "
            "original model's names are not known"
        )
    return tensors


def _tensor(name: str, tensor: GgufTensor, rotary: int, gguf: GgufFile) -> TensorInfo | CodedInfo:
    dtype = DENSE_TYPES.get(tensor.type)
    if dtype is not None:
        stored = TensorInfo(
            tensor.name, dtype, tensor.shape, gguf.path, tensor.offset, tensor.n_bytes
        )
        if not rotary:
            return replace(stored, name=name)
        coding = Coding(Format.DENSE, dtype, rotary=rotary)
        return CodedInfo(name, dtype, tensor.shape, coding, {"codes": stored})
    if tensor.type not in CODED_TYPES:
        known = ", ".join(BLOCK_TYPES[number].name for number in sorted(DENSE_TYPES | CODED_TYPES))
        raise CheckpointError(
            f"{place(gguf.path)}: tensor {shown(tensor.name)} is {BLOCK_TYPES[tensor.type].name}, which is "
            f"not decoded; take a file of {known}"
        )
    coding = Coding(CODED_TYPES[tensor.type], CODED_DTYPE, rotary=rotary)
    stored = TensorInfo(
        tensor.name, DType.U8, (tensor.n_bytes,), gguf.path, tensor.offset, tensor.n_bytes
    )
    scale = 1.0
    if coding.format is Format.GGUF_NVFP4:
        scale = _tensor_scale(tensor, gguf)
    return CodedInfo(name, CODED_DTYPE, tensor.shape, coding, {"codes": stored}, tensor_scale=scale)


def _rotary(tensor: GgufTensor, heads: tuple[int, int], gguf: GgufFile) -> int:
    """Return the rows of one head where they are stored interleaved, else 0."""
    n = rotary_heads(tensor.name, *heads)
    if n is None:
        return 0
    rows = tensor.shape[0] if tensor.shape else 0
    if len(tensor.shape) > 2 or rows % (2 * n) or not rows:
        raise CheckpointError(
            f"{place(gguf.path)}: tensor {shown(tensor.name)} is {list(tensor.shape)}, which is not rows of "
            f"{n} heads, each of two halves"
        )
    return rows // n


def _is_scale(tensor: GgufTensor, gguf: GgufFile) -> bool:
    """Return whether a tensor is the factor of an NVFP4 one, of its weight or of activations."""
    stem, _, kind = tensor.name.rpartition(".")
    weight = gguf.tensors.get(f"{stem}.weight")
    is_nvfp4 = weight is not None and weight.type == TYPE_OF[Format.GGUF_NVFP4]
    return is_nvfp4 and kind in ("scale", "input_scale")


def _tensor_scale(tensor: GgufTensor, gguf: GgufFile) -> float:
    name = tensor.name.removesuffix("weight") + "scale"
    data = _content(gguf, name)
    if data is None:
        return 1.0
    values = struct.unpack(f"<{len(data) // 4}f", data)
    if len(values) != 1 or not math.isfinite(values[0]):
        raise CheckpointError(
            f"{place(gguf.path)}: tensor {shown(name)} is not one finite factor; experts that share a tensor "
            "are not supported"
        )
    return float(values[0])


def _content(gguf: GgufFile, name: str) -> bytes | None:
    """Return the bytes of a small float32 tensor, None where there is none."""
    tensor = gguf.tensors.get(name)
    if tensor is None:
        return None
    if tensor.type != TYPE_OF[DType.F32] or tensor.n_bytes > _SMALL:
        raise CheckpointError(
            f"{place(gguf.path)}: tensor {shown(name)} is {BLOCK_TYPES[tensor.type].name} of "
            f"{tensor.n_bytes} bytes; float32 of at most {_SMALL} is expected"
        )
    with opened(gguf.path) as (fd, _):
        return read_at(fd, gguf.path, tensor.offset, tensor.n_bytes)
