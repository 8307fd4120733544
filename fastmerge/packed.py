"""Coded tensors between files and kernels: operands, results, and what is known late."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import numpy as np

from fastmerge.backends import CHUNK_ELEMENTS, Buffer, Coded
from fastmerge.backends.memory import copy_bytes
from fastmerge.backends.scales import code_scales, tensor_scale
from fastmerge.checkpoint import TensorInfo
from fastmerge.checkpoint.files import opened, read_at
from fastmerge.dtypes import DType
from fastmerge.evaluate import first_nonfinite
from fastmerge.jobs import Operand, Piece, TensorJob, matrix_of
from fastmerge.quant.format import Scales
from fastmerge.streaming.device import Memory


def operand_of(
    operand: Operand, piece: Piece, memory: Memory, addresses: Iterator[int]
) -> Buffer | Coded:
    """Return a piece of an operand whose spans (see `Operand.spans`) are in memory at the next addresses."""
    info = operand.info
    if isinstance(info, TensorInfo):
        return memory.buffer(next(addresses), info.dtype, piece.n)
    slots = {}
    names = [spec.slot for spec in operand.specs]
    names += [slot for slot in info.parts if slot not in names]
    names += ["low_a", "low_b"] if info.low_rank else []
    for slot, span in zip(names, operand.spans(piece.start, piece.start + piece.n), strict=True):
        dtype = span.info.dtype
        slots[slot] = memory.buffer(next(addresses), dtype, span.n // dtype.itemsize)
    rows, cols = matrix_of(info.shape)
    return Coded(
        info.coding,
        rows,
        cols,
        piece.start,
        piece.start,
        piece.n,
        slots,
        info.nested_offset,
        info.tensor_scale,
        info.low_rank.scale if info.low_rank else 0.0,
    )


def result_of(
    job: TensorJob, piece: Piece, memory: Memory, addresses: Sequence[int], peak: float
) -> Coded:
    """Return the memory of a piece's result; addresses are those of `Piece.places`.

    peak: largest magnitude of the whole result (of all that share its scale), where that decides.
    """
    assert job.stored is not None
    coding = job.stored.coding
    at = iter(addresses)
    slots = {}
    for part, spec in job.parts:
        written = job.is_atomic or spec.per_element is not None
        address = next(at) if written else 0
        if not written:  # a scale of the tensor
            slots[spec.slot] = _filled(memory, _tensor_scale(job, peak), spec.dtype)
        elif coding.nested and spec.slot == "scales":  # coded themselves when all are known: `late`
            slots[spec.slot] = _empty(memory, spec.shape[0])
        elif spec.slot != "nested":
            first, end = (0, spec.n_bytes)
            if not job.is_atomic:
                first, end = spec.span(piece.start, piece.start + piece.n)
            size = part.dtype.itemsize
            slots[spec.slot] = memory.buffer(address, part.dtype, (end - first) // size)
    rows, cols = matrix_of(job.shape)
    origin = 0 if job.is_atomic else piece.start
    scale = _tensor_scale(job, peak) if job.needs_peak else 1.0
    return Coded(coding, rows, cols, origin, piece.start, piece.n, slots, tensor_scale=scale)


def _tensor_scale(job: TensorJob, peak: float) -> float:
    assert job.stored is not None
    return tensor_scale(job.stored.coding, peak)


def _empty(memory: Memory, n: int) -> Buffer:
    """Return n float32 of memory beside the rings, where the kernels run."""
    if memory.device == "cpu":
        array = np.empty(n, np.float32)
        return Buffer(array.ctypes.data, DType.F32, n, array)
    import torch

    held = torch.empty(n, dtype=torch.float32, device=memory.device)
    return Buffer(held.data_ptr(), DType.F32, n, held, memory.device)


def _filled(memory: Memory, value: float, dtype: DType) -> Buffer:
    """Return one number in memory, of a type that holds it exactly."""
    held = _empty(memory, 1)
    content = np.frombuffer(_bytes_of(value, dtype), np.uint8).copy()
    copy_bytes(
        Buffer(held.address, DType.U8, content.size, held.owner, held.device), _host(content)
    )
    return Buffer(held.address, dtype, 1, held.owner, held.device)


def _bytes_of(value: float, dtype: DType) -> bytes:
    """Return a number's bytes, rounded to a type, nearest even."""
    if dtype is DType.BF16:
        bits = int(np.float32(value).view(np.uint32))
        return np.uint16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).tobytes()
    return (np.float16 if dtype is DType.F16 else np.float32)(value).tobytes()


def _host(array: np.ndarray[tuple[int], np.dtype[np.generic]]) -> Buffer:
    return Buffer(array.ctypes.data, DType.U8, array.nbytes, array)


def late(
    job: TensorJob, result: Coded, memory: Memory, addresses: Sequence[int]
) -> dict[str, bytes]:
    """Finish a result that is coded, and return the stored tensors (name -> bytes) that follow from it.

    memory, addresses: see `result_of`. Double quantisation: codes the scales, now that all are known.
    """
    assert job.stored is not None
    scales = Scales(tensor_scale=result.tensor_scale)
    if job.stored.coding.nested:
        scales = Scales(nested_offset=_code_scales(result, memory, addresses))
    found = {}
    if result.origin == 0:
        for part, spec in job.parts:
            if not job.is_atomic and spec.per_element is None:
                found[part.name] = _bytes_of(scales.tensor_scale, spec.dtype)
        for constant in job.stored.constants:
            if constant.content is None:
                assert job.stored.format is not None
                found[constant.name] = job.stored.format.late(
                    constant.name, job.shape, job.stored.coding, scales
                )
    return found


def _code_scales(result: Coded, memory: Memory, addresses: Sequence[int]) -> float:
    """Code the scales of a tensor where they are stored; returns the mean that was taken from them first."""
    offset, codes, nested = code_scales(result.coding, result.slots["scales"])
    _, coded_scales, nested_scales = addresses
    copy_bytes(memory.buffer(coded_scales, DType.U8, codes.nbytes), _host(codes))
    copy_bytes(memory.buffer(nested_scales, DType.U8, nested.nbytes), _host(nested))
    return offset


def first_nonfinite_of(operand: Operand, piece: Piece) -> int | None:
    """Return the flat index of a piece's first NaN or infinity, read from the files again."""
    held: list[ctypes.Array[ctypes.c_char]] = []
    if isinstance(operand.info, TensorInfo):
        for start in range(piece.start, piece.start + piece.n, CHUNK_ELEMENTS):
            n = min(CHUNK_ELEMENTS, piece.start + piece.n - start)
            (address,) = _read(operand, Piece(piece.job, start, n), held)
            index = first_nonfinite(Buffer(address, operand.info.dtype, n))
            if index is not None:
                return start + index
            held.clear()
        return None
    addresses = _read(operand, piece, held)
    coded = operand_of(operand, piece, Memory(0, 0), iter(addresses))
    assert isinstance(coded, Coded)
    index = first_nonfinite(coded)
    return None if index is None else piece.start + index


def _read(operand: Operand, piece: Piece, held: list[ctypes.Array[ctypes.c_char]]) -> list[int]:
    """Read a piece's spans into memory that `held` keeps; returns their addresses."""
    for span in operand.spans(piece.start, piece.start + piece.n):
        with opened(span.info.file) as (fd, _):
            data = read_at(fd, span.info.file, span.info.offset + span.first, span.n)
        held.append(ctypes.create_string_buffer(data, max(1, len(data))))
    return [
        ctypes.addressof(h) for h in held[-len(operand.spans(piece.start, piece.start + piece.n)) :]
    ]


__all__ = ["first_nonfinite_of", "late", "operand_of", "result_of"]
