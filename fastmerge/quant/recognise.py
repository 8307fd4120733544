"""Which stored tensors of an opened checkpoint are parts of one coded tensor: several become one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from fastmerge.checkpoint.coded import CodedInfo
from fastmerge.checkpoint.files import read_json_object
from fastmerge.checkpoint.folder import CONFIG, Checkpoint
from fastmerge.checkpoint.header import TensorInfo
from fastmerge.checkpoint.wording import place, shown
from fastmerge.dtypes import DType
from fastmerge.errors import CheckpointError
from fastmerge.quant import awq, bitsandbytes, compressed_tensors, fp8, gptq, modelopt, mxfp4
from fastmerge.quant.stored import Found, Stored

_READERS: dict[str, Callable[[Stored, Mapping[str, Any]], Iterator[Found]]] = {
    "awq": awq.read,
    "bitsandbytes": bitsandbytes.read,
    "compressed-tensors": compressed_tensors.read,
    "fbgemm_fp8": fp8.read_fbgemm,
    "fp8": fp8.read,
    "gptq": gptq.read,
    "modelopt": modelopt.read,
    "mxfp4": mxfp4.read,
}
_KEYS = ("quantization_config", "compression_config")

#: Files of writers that leave config.json as it was -> their method where they do not name it.
_SIDE_FILES = {gptq.SIDE_FILE: "gptq", "quant_config.json": "awq", modelopt.SIDE_FILE: "modelopt"}

#: Last words of names that only coded weights have.
_SIGNS = (
    *(".qweight", ".weight_packed", ".SCB", ".weight_scale_inv", ".weight_scale_2", ".absmax"),
    *(".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4", "_blocks"),
)
_CODES = (DType.F8_E4M3, DType.F8_E5M2, DType.I8, DType.U8, DType.I32)

#: Last words of tensors that serve a runtime and are no weights.
_RUNTIME = {
    "activation_scale": "scale of activations",
    "input_global_scale": "scale of activations",
    "input_scale": "scale of activations",
    "input_scale_ub": "bound of the scale of activations",
    "input_zero_point": "zero point of activations",
    "output_scale": "scale of activations",
    "k_scale": "scale of the key-value cache",
    "q_scale": "scale of the key-value cache",
    "v_scale": "scale of the key-value cache",
}


def recognise(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with the parts of each coded weight as one tensor, and a config that is dense.

    Small tensors are read; codes and scales are not. A checkpoint without quantisation comes back as it is.

    Raises:
        CheckpointError: a format or version that is not read, or parts that are missing, of another
            type or shape, or do not fit; names the file, the tensor and the value.
    """
    config, source = _configuration(checkpoint)
    if config is None:
        _check_plain(checkpoint)
        return checkpoint
    method = config.get("quant_method") or _SIDE_FILES.get(source)
    if not isinstance(method, str) or method not in _READERS:
        raise CheckpointError(
            f"{place(checkpoint.path / source)} has quant_method {shown(method)}; those that are read are "
            f"{', '.join(_READERS)}; convert the checkpoint to bfloat16 first"
        )
    with Stored(checkpoint) as stored:
        found = list(_READERS[method](stored, config))
    if not found:
        raise CheckpointError(
            f"{place(checkpoint.path / source)} says that weights are coded by {method}, but none is; "
            + ("remove its quantization_config" if source == CONFIG else f"remove {source}")
        )
    return _replaced(checkpoint, found, method)


def _configuration(checkpoint: Checkpoint) -> tuple[dict[str, Any] | None, str]:
    """Return how a checkpoint says its weights are coded, and the file that says so."""
    for key in _KEYS:
        value = (checkpoint.config or {}).get(key)
        if value is not None:
            if not isinstance(value, dict):
                raise CheckpointError(
                    f"{place(checkpoint.path / CONFIG)} has {key} {shown(value)}, not an object; "
                    "download it again"
                )
            default = {} if key == "quantization_config" else {"quant_method": "compressed-tensors"}
            return default | value, CONFIG
    for name in _SIDE_FILES:
        if (checkpoint.path / name).is_file():
            return read_json_object(checkpoint.path / name, strict=False), name
    return None, CONFIG


def _check_plain(checkpoint: Checkpoint) -> None:
    """Refuse codes that nothing describes."""
    for name, info in checkpoint.tensors.items():
        if isinstance(info, TensorInfo) and name.endswith(_SIGNS):
            raise CheckpointError(
                f"{place(info.file)}: tensor {shown(name)} is part of a coded weight, but config.json has no "
                "quantization_config; download config.json again"
            )


def _replaced(checkpoint: Checkpoint, found: list[Found], method: str) -> Checkpoint:
    """Return the checkpoint with coded tensors where their codes are, and without what is beside them."""
    coded = {f.info.parts["codes"].name: f.info for f in found}
    parts = {part.name for f in found for part in f.info.stored}
    for f in found:
        dense = checkpoint.tensors.get(f.info.name)
        if dense is not None and f.info.name not in parts:
            raise CheckpointError(
                f"{place(dense.file)}: tensor {shown(f.info.name)} is there both as it is and in codes; "
                "remove one of them"
            )
    dropped = _beside(found, parts, method)
    tensors: dict[str, TensorInfo | CodedInfo] = {}
    for name, info in checkpoint.tensors.items():
        if name in coded:
            info = coded[name]
        elif name in parts or name in dropped:
            continue
        elif name.rpartition(".")[2] in _RUNTIME:
            dropped[name] = _RUNTIME[name.rpartition(".")[2]]
            continue
        elif isinstance(info, TensorInfo) and name.endswith(".weight") and info.dtype in _CODES:
            raise CheckpointError(
                f"{place(info.file)}: tensor {shown(name)} holds codes, {info.dtype.safetensors}, but no "
                f"scale that {method} needs lies beside it; download the checkpoint again"
            )
        tensors[info.name] = info
    config = checkpoint.config
    if config is not None:
        config = {key: value for key, value in config.items() if key not in _KEYS}
    return replace(checkpoint, tensors=tensors, config=config, dropped=dropped)


def _beside(found: list[Found], parts: set[str], method: str) -> dict[str, str]:
    """Return what lies directly beside coded weights and is neither a part nor a bias -> why it is left."""
    dropped = {}
    for f in found:
        for word, info in f.module.tensors.items():
            if info.name in parts or word == "bias" or ("." in word and word not in f.read):
                continue
            default = f"unknown to {method}"
            reason = "read with its weight" if word in f.read else _RUNTIME.get(word, default)
            dropped[info.name] = reason
    return dropped
