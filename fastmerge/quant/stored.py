"""The stored tensors of a quantised checkpoint, by module: checked against what a format asks for."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from fastmerge.checkpoint.coded import CodedInfo
from fastmerge.checkpoint.files import opened, read_at
from fastmerge.checkpoint.folder import Checkpoint
from fastmerge.checkpoint.header import TensorInfo
from fastmerge.checkpoint.wording import place, shown
from fastmerge.coding import Coding, ScaleType, parts_of
from fastmerge.dtypes import BY_TORCH, DType
from fastmerge.errors import CheckpointError

#: The types of scales that are plain numbers.
SCALE_TYPES = {DType.F32: ScaleType.F32, DType.F16: ScaleType.F16, DType.BF16: ScaleType.BF16}

_AGAIN = "download the checkpoint again"
_NUMPY = {
    DType.F32: "<f4",
    DType.F16: "<f2",
    DType.I64: "<i8",
    DType.I32: "<i4",
    DType.U8: "u1",
}


class Stored(AbstractContextManager["Stored"]):
    """The plain tensors of a checkpoint, whose files stay open while small ones are read."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.path = checkpoint.path
        self.tensors = {n: t for n, t in checkpoint.tensors.items() if isinstance(t, TensorInfo)}
        self.dtype = _model_dtype(checkpoint.config or {}, self.tensors.values())
        self._files: dict[Path, int] = {}
        self._stack = ExitStack()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def modules(self, words: Collection[str]) -> list[Module]:
        """Return, in order, the modules that have a tensor called `<module>.<word>`, with all below them."""
        found: dict[str, dict[str, TensorInfo]] = {}
        ends = tuple(f".{word}" for word in words)
        for name in self.tensors:
            if name.endswith(ends):
                end = max((e for e in ends if name.endswith(e)), key=len)
                found.setdefault(name.removesuffix(end), {})
        for name, info in self.tensors.items():
            module = name
            while module:
                if module in found:
                    found[module][name[len(module) + 1 :]] = info
                module = module.rpartition(".")[0]
        return [Module(name, tensors, self) for name, tensors in found.items()]

    def read(self, info: TensorInfo) -> bytes:
        """Return a tensor's bytes."""
        if info.file not in self._files:
            self._files[info.file] = self._stack.enter_context(opened(info.file))[0]
        return read_at(self._files[info.file], info.file, info.offset, info.n_bytes)


@dataclass(frozen=True)
class Module:
    """Tensors of one module. tensors: last words of the name -> tensor; "": the one called as the module."""

    name: str
    tensors: Mapping[str, TensorInfo]
    stored: Stored

    def full(self, word: str) -> str:
        return f"{self.name}.{word}" if word else self.name

    def fail(self, word: str, what: str, remedy: str = _AGAIN) -> NoReturn:
        """Raise CheckpointError about a tensor of the module; what: begins with a verb."""
        info = self.tensors.get(word) or next(iter(self.tensors.values()))
        raise CheckpointError(
            f"{place(info.file)}: tensor {shown(self.full(word))} {what}; {remedy}"
        )

    def need(
        self, word: str, dtypes: Collection[DType], *shapes: tuple[int, ...], of: str
    ) -> TensorInfo:
        """Return a tensor that must be there, of one of these types and shapes.

        Raises:
            CheckpointError: it is missing or differs; names it, and `of`, the format that needs it.
        """
        info = self.tensors.get(word)
        if info is None:
            raise CheckpointError(
                f"{place(self.stored.path)}: tensor {shown(self.full(word))} is missing, which {of} "
                f"needs beside {shown(next(iter(self.tensors.values())).name)}; {_AGAIN}"
            )
        if info.dtype not in dtypes:
            wanted = " or ".join(d.safetensors for d in dtypes)
            self.fail(word, f"has dtype {info.dtype.safetensors}, but {of} needs {wanted}")
        if shapes and info.shape not in shapes:
            wanted = " or ".join(str(list(s)) for s in shapes)
            self.fail(word, f"has shape {shown(list(info.shape))}, but {of} needs {wanted}")
        return info

    def matrix(self, word: str, dtypes: Collection[DType], *, of: str) -> TensorInfo:
        """Return a tensor that must be there and be a matrix that is not empty; as `need`."""
        info = self.need(word, dtypes, of=of)
        if len(info.shape) != 2:
            self.fail(
                word,
                f"has shape {shown(list(info.shape))}, but {of} is read of matrices alone",
                "load the model with transformers and save it in bfloat16 first",
            )
        if not info.n:
            self.fail(word, f"has shape {shown(list(info.shape))}, which holds nothing")
        return info

    def numbers(self, info: TensorInfo) -> npt.NDArray[Any]:
        """Return the elements of a small tensor, flat."""
        return np.frombuffer(self.stored.read(info), _NUMPY[info.dtype])

    def positive(self, word: str, *, of: str) -> float:
        """Return the one number of a float32 tensor, which must be finite and above zero."""
        value = float(self.numbers(self.need(word, (DType.F32,), (), (1,), of=of))[0])
        if not (math.isfinite(value) and value > 0):
            self.fail(word, f"is {value}, but {of} needs a finite number above 0")
        return value


@dataclass(frozen=True)
class Found:
    """A coded tensor of a module. read: last words of tensors whose content is known now."""

    info: CodedInfo
    module: Module
    read: Collection[str] = field(default=())


def coded(
    name: str,
    dtype: DType,
    shape: tuple[int, int],
    coding: Coding,
    parts: Mapping[str, TensorInfo],
    *,
    nested_offset: float = 0.0,
    tensor_scale: float = 1.0,
) -> CodedInfo:
    """Return a coded tensor whose parts are described as `parts_of` does; shapes are checked already."""
    described = {}
    for spec in parts_of(coding, *shape):
        info = parts[spec.slot]
        assert info.n_bytes == spec.n_bytes, (name, spec, info)
        described[spec.slot] = replace(info, dtype=spec.dtype, shape=spec.shape)
    if "group_of" in parts:
        described["group_of"] = parts["group_of"]
    return CodedInfo(name, dtype, shape, coding, described, nested_offset, tensor_scale)


def scale_type(info: TensorInfo) -> ScaleType:
    """Return the type of scales as kernels know it; exponents are stored as such or as bytes."""
    return SCALE_TYPES.get(info.dtype, ScaleType.E8M0)


def _model_dtype(config: Mapping[str, Any], tensors: Iterable[TensorInfo]) -> DType:
    """Return what the model computes with: config.json's dtype, else that of its first dense tensor."""
    nested = [c for c in config.values() if isinstance(c, dict)]
    for part in (config, *nested):
        for key in ("dtype", "torch_dtype"):
            name = part.get(key)
            dtype = BY_TORCH.get(name.removeprefix("torch.")) if isinstance(name, str) else None
            if dtype in SCALE_TYPES:
                return dtype
    dense = (t.dtype for t in tensors if t.dtype in SCALE_TYPES and t.name.endswith("weight"))
    return next(dense, DType.F16)
