"""Tensors in memory as codes of a few bits: coding, decoding, and what merges see of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from fastmerge import ops
from fastmerge.backends import Buffer, Coded, Kernels
from fastmerge.backends.scales import code_scales, tensor_scale
from fastmerge.coding import (
    GGUF_BLOCKS,
    READ_ONLY,
    Coding,
    Format,
    PartSpec,
    needs_peak,
    parts_of,
)
from fastmerge.dtypes import DType, parse_dtype
from fastmerge.errors import ConflictError, NonFiniteError, RecipeError
from fastmerge.evaluate import Operands, first_nonfinite, peak, run_walk
from fastmerge.jobs import matrix_of
from fastmerge.quant.formats import FORMATS
from fastmerge.quant.gguf_formats import GGUF_FORMATS
from fastmerge.quant.quantize import Quantize
from fastmerge.stages import Copy, Walk

if TYPE_CHECKING:
    import torch

#: What holds the bits of types that numpy lacks.
_IN_NUMPY = {DType.BF16: "uint16", DType.F8_E4M3: "uint8"}


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """A tensor that is held as codes, in torch tensors of one device or in numpy arrays.

    coding: its format and options. shape: of what it decodes to; all but the last dimension are rows.
    parts: slot -> tensor, as `coding.parts_of` lists them (numpy: bfloat16 and float8 as unsigned integers
    of their bits); GPTQ with act-order has `group_of`, int32 [cols], too.
    tensor_scale: NVFP4's, of the whole tensor. nested_offset: what double quantisation took from the scales.

    Raises:
        ConflictError: a part is missing, unknown, strided, of another type or size, or on another device.
    """

    coding: Coding
    shape: tuple[int, ...]
    parts: Mapping[str, ops.Tensor]
    tensor_scale: float = 1.0
    nested_offset: float = 0.0

    def __post_init__(self) -> None:
        specs = {spec.slot: spec for spec in self._specs}
        missing = [slot for slot in specs if slot not in self.parts]
        if missing:
            raise ConflictError(f"{self._title} lacks its part {missing[0]!r}")
        for slot, part in self.parts.items():
            if slot not in specs:
                raise ConflictError(
                    f"{self._title} has no part {slot!r}; its parts are {', '.join(specs)}"
                )
            _check_part(part, specs[slot], f"part {slot!r} of {self._title}")
        buffers = list(self._slots.values())
        ops.one_device(buffers, [f"part {slot!r}" for slot in self._slots])

    @property
    def _title(self) -> str:
        return f"{self.coding.format.name.lower()} {list(self.shape)}"

    @property
    def _specs(self) -> tuple[PartSpec, ...]:
        rows, cols = matrix_of(self.shape)
        specs = parts_of(self.coding, rows, cols)
        if self.coding.format is Format.GPTQ and "group_of" in self.parts:
            specs += (PartSpec("group_of", DType.I32, (cols,), None),)
        return specs

    @property
    def _slots(self) -> dict[str, Buffer]:
        return {s.slot: _buffer(self.parts[s.slot], s.dtype) for s in self._specs}

    @property
    def n(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> DType:
        """The type of a dense copy: what values were rounded to before they were coded; in numpy, which has
        no bfloat16, float32 for that."""
        narrow = self.is_numpy and self.coding.dtype is DType.BF16
        return DType.F32 if narrow else self.coding.dtype

    @property
    def is_numpy(self) -> bool:
        return isinstance(self.parts["codes"], np.ndarray)

    @property
    def device(self) -> str:
        """torch's name of where the parts are."""
        return "cpu" if self.is_numpy else str(self.parts["codes"].device)

    @property
    def nbytes(self) -> int:
        return sum(spec.n_bytes for spec in self._specs)

    @property
    def bits_per_weight(self) -> float:
        """Bits that an element takes, with its share of scales; 0 of an empty tensor."""
        return 8 * self.nbytes / self.n if self.n else 0.0

    def operand(self) -> Coded:
        """Return what kernels read."""
        rows, cols = matrix_of(self.shape)
        return Coded(
            self.coding,
            rows,
            cols,
            0,
            0,
            self.n,
            self._slots,
            self.nested_offset,
            self.tensor_scale,
        )


def _check_part(part: ops.Tensor, spec: PartSpec, what: str) -> None:
    name = str(getattr(part, "dtype", type(part).__name__)).removeprefix("torch.")
    wanted = (
        (spec.dtype.torch, _IN_NUMPY.get(spec.dtype)) if _is_numpy(part) else (spec.dtype.torch,)
    )
    n = math.prod(getattr(part, "shape", ()))
    if name not in wanted or n != math.prod(spec.shape):
        found = f"{name} {list(getattr(part, 'shape', ()))}"
        raise ConflictError(f"{what} must be {wanted[-1]} {list(spec.shape)}, got {found}")
    contiguous = part.flags.c_contiguous if _is_numpy(part) else part.is_contiguous()
    if not contiguous:
        raise ConflictError(f"{what} is strided; pass a contiguous one")


def _is_numpy(tensor: object) -> bool:
    return isinstance(tensor, np.ndarray)


def _buffer(part: ops.Tensor, dtype: DType) -> Buffer:
    """Describe a part's memory; the caller has checked its type."""
    if _is_numpy(part):
        return Buffer(part.ctypes.data, dtype, part.size, part)
    return Buffer(part.data_ptr(), dtype, part.numel(), part, str(part.device))


@dataclass(frozen=True, eq=False)
class LoraTensor:
    """weight + scale * (B A): what a LoRA adapter makes of a weight, without computing it.

    weight: [..., cols] float16, bfloat16 or float32; b: [rows, r], a: [r, cols], of one such type; on one
    device, contiguous. In a merge the sum is made in float32 where it is read; methods that decompose deltas
    use the factors where the weight is the base's.

    Raises:
        ConflictError: shapes, types or devices that do not go together.
    """

    weight: ops.Tensor
    b: ops.Tensor
    a: ops.Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        rows, cols = matrix_of(self.shape)
        rank = self.a.shape[0] if len(self.a.shape) == 2 else 0
        if tuple(self.a.shape) != (rank, cols) or tuple(self.b.shape) != (rows, rank):
            raise ConflictError(
                f"LoRA factors of a weight {list(self.shape)} must be b [{rows}, r] and a [r, {cols}], got "
                f"{list(self.b.shape)} and {list(self.a.shape)}"
            )
        slots = self._slots
        wide = [s for s, buffer in slots.items() if buffer.dtype is DType.F64]
        if wide or slots["low_a"].dtype is not slots["low_b"].dtype:
            raise ConflictError(
                "weight and factors of a LoRA must be float16, bfloat16 or float32, both factors alike; "
                f"got {', '.join(b.dtype.torch for b in slots.values())}"
            )
        ops.one_device(list(slots.values()), ["weight", "b", "a"])

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @property
    def _slots(self) -> dict[str, Buffer]:
        parts = {"codes": self.weight, "low_b": self.b, "low_a": self.a}
        return {slot: ops.buffer_of(part, slot) for slot, part in parts.items()}

    def operand(self) -> Coded:
        """Return what kernels read."""
        slots = self._slots
        coding = Coding(Format.DENSE, slots["codes"].dtype)
        n = slots["codes"].n
        return Coded(coding, *matrix_of(self.shape), 0, 0, n, slots, low_scale=self.scale)


# ---- what merges see ----------------------------------------------------------------------------

#: What may be merged in memory.
AnyTensor = ops.Tensor | QuantTensor | LoraTensor


def operand_of(tensor: AnyTensor, what: str) -> Buffer | Coded:
    """Describe a tensor's memory; see `ops.buffer_of`."""
    coded = isinstance(tensor, QuantTensor | LoraTensor)
    return tensor.operand() if coded else ops.buffer_of(tensor, what)


def dense_type(tensor: AnyTensor, operand: Buffer | Coded) -> DType:
    """Return the type of a dense copy."""
    if isinstance(tensor, QuantTensor):
        return tensor.dtype
    return operand.coding.dtype if isinstance(operand, Coded) else operand.dtype


def empty_dense(like: AnyTensor, dtype: DType) -> ops.Tensor:
    """Return uninitialised memory of `like`'s kind, device and shape."""
    return _empty(like, tuple(like.shape), dtype)


def _empty(like: AnyTensor, shape: tuple[int, ...], dtype: DType) -> ops.Tensor:
    """Return uninitialised memory of `like`'s kind and device."""
    if isinstance(like, LoraTensor):
        like = like.weight
    like = like.parts["codes"] if isinstance(like, QuantTensor) else like
    if _is_numpy(like):
        return np.empty(shape, _IN_NUMPY.get(dtype, dtype.torch))
    import torch

    return torch.empty(shape, dtype=getattr(torch, dtype.torch), device=like.device)


def coding_of(format: str, shape: tuple[int, ...], dtype: DType, rounding: str) -> Coding:
    """Return how a tensor of this shape and type is coded.

    Raises:
        RecipeError: no such format or rounding. ConflictError: the format cannot hold the shape.
    """
    dtype = DType.F32 if dtype is DType.F64 else dtype  # float64 has no codes of its own
    rows, cols = matrix_of(shape)
    reason = None
    if format in FORMATS:
        reason = FORMATS[format].refuses((rows, cols))
        coding = None if reason else FORMATS[format].coding(dtype, (rows, cols))
    else:
        kind = GGUF_FORMATS.get(format)
        if not isinstance(kind, Format):
            known = [*FORMATS, *(name for name, k in GGUF_FORMATS.items() if isinstance(k, Format))]
            raise RecipeError(f"no format is called {format!r}; known are {', '.join(known)}")
        block = GGUF_BLOCKS[kind][0]
        if cols % block:
            reason = f"{cols} columns are no multiple of {block}"
        coding = Coding(kind, dtype)
    if reason or coding is None:
        raise ConflictError(f"{format} cannot hold {list(shape)}: {reason}")
    return Quantize(format, rounding=rounding).adapted(coding)


def code(
    kernels: Kernels,
    walk: Walk | Copy,
    operands: Operands,
    coding: Coding,
    like: ops.Tensor | QuantTensor,
    limit: int | None = None,
) -> QuantTensor | None:
    """Merge operands and code the result in one pass; one more where the largest magnitude decides.

    like: whose shape, kind and device the result has. None: something that is coded is not finite.

    Raises:
        ConflictError: the format is only read.
    """
    if coding.format in READ_ONLY:
        raise ConflictError(f"{coding.format.name.lower()} is only read; choose another format")
    shape, limit = tuple(like.shape), limit or kernels.chunk_elements
    rows, cols = matrix_of(shape)
    scale = 1.0
    if needs_peak(coding):
        bad, high = peak(kernels, walk, operands, coding.dtype, limit)
        if bad or not math.isfinite(high):
            return None
        scale = tensor_scale(coding, high)
    parts = {s.slot: _empty(like, s.shape, s.dtype) for s in parts_of(coding, rows, cols)}
    done = QuantTensor(coding, shape, parts, scale if coding.format is Format.NVFP4 else 1.0)
    out = done.operand()
    if coding.format is Format.FP8 and needs_peak(coding):
        parts["scales"][0] = scale
    if coding.nested:  # coded themselves when all are known
        absmax = _empty(like, (out.slots["scales"].n,), DType.F32)
        out = replace(
            out, slots={"codes": out.slots["codes"], "scales": _buffer(absmax, DType.F32)}
        )
    if run_walk(kernels, walk, operands, out, limit):
        return None
    if not coding.nested:
        return done
    offset, codes, nested = code_scales(coding, out.slots["scales"])
    for slot, content in (("scales", codes), ("nested", nested)):
        if _is_numpy(parts[slot]):
            parts[slot][...] = content
        else:
            parts[slot].copy_(_torch(content))
    return replace(done, nested_offset=offset)


def _torch(array: Any) -> torch.Tensor:
    import torch

    return torch.from_numpy(array)


def refuse_nonfinite(
    operands: Operands, labels: Sequence[str], remedy: str, dtype: DType
) -> NoReturn:
    """Raise NonFiniteError for the first operand with NaN or infinity, else for the result, coded as `dtype`.

    labels: of `operands.operands`.
    """
    for label, operand in zip(labels, operands.operands, strict=True):
        index = first_nonfinite(operand)
        if index is not None:
            raise NonFiniteError(f"{label} holds NaN or infinity at flat index {index}; {remedy}")
    raise NonFiniteError(
        f"what is to be coded is beyond what {dtype.torch} holds; give dtype='float32'"
    )


# ---- for users ----------------------------------------------------------------------------------


def quantize_4bit(
    tensor: ops.Tensor,
    format: str = "nf4",
    *,
    dtype: str | torch.dtype | None = None,
    rounding: str = "nearest",
    backend: str | None = None,
) -> QuantTensor:
    """Code a tensor in a few bits, byte for byte as the format's own library does.

    Args:
        tensor: [..., cols] float16, bfloat16, float32 or float64, torch or numpy, on any device; strided
            ones are copied. Codes are along the last dimension; bitsandbytes' over the flattened tensor.
        format: nf4, fp4, nf4-dq, int4, nvfp4, mxfp4, gptq, awq, fp8, q4_0, q4_k, ...: as `--quantize` takes
            them, GGUF's dense ones but.
        dtype: what values are rounded to first, nearest even; default: the tensor's own type.
        rounding: `nearest`: scales as the format's library chooses them; `mse`: by least squared error.
    Returns:
        A `QuantTensor` of the tensor's kind, where the tensor is.
    Raises:
        RecipeError: an unknown format, rounding or dtype. ConflictError: the format cannot hold the shape.
        NonFiniteError: NaN or infinity; names the first flat index.
    Source: the layouts of bitsandbytes, compressed-tensors, AutoGPTQ, AutoAWQ and ggml.
    """
    held = ops.buffer_of(tensor, "tensor")
    shape = tuple(tensor.shape)
    coding = coding_of(format, shape, parsed(dtype) or held.dtype, rounding)
    wide = DType.F64 if held.dtype is DType.F64 else DType.F32
    operands = Operands(None, [held], matrix_of(shape)[1], wide)
    coded = code(ops.choose(held.device, backend), Copy(0), operands, coding, tensor)
    if coded is None:
        refuse_nonfinite(operands, ["tensor"], "mend it before it is coded", coding.dtype)
    return coded


def dequantize_4bit(
    q: QuantTensor, dtype: str | torch.dtype | None = None, *, backend: str | None = None
) -> ops.Tensor:
    """Decode a tensor: what a merge reads of it, in float32, rounded once to `dtype`.

    Args:
        q: on any device.
        dtype: of the result; default: `q.dtype`.
    Returns:
        [..., cols] of q's shape, kind and device.
    Raises:
        RecipeError: a type that is not float16, bfloat16, float32 or float64; numpy has no bfloat16.
    """
    wanted = parsed(dtype) or q.dtype
    if q.is_numpy and wanted is DType.BF16:
        raise RecipeError(
            "dtype bfloat16 does not exist in numpy; ask for float32 or hold torch tensors"
        )
    out = empty_dense(q, wanted)
    operand = q.operand()
    operands = Operands(None, [operand], operand.cols, DType.F32)
    kernels = ops.choose(q.device, backend)
    run_walk(kernels, Copy(0), operands, ops.buffer_of(out, "out"), kernels.chunk_elements)
    return out


def parsed(dtype: str | torch.dtype | None) -> DType | None:
    """Return the type of that name. Raises RecipeError if nothing merges in it."""
    return None if dtype is None else parse_dtype(str(dtype), "dtype")


__all__ = ["QuantTensor", "dequantize_4bit", "quantize_4bit"]
