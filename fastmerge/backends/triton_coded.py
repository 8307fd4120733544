"""Coded tensors of the Triton backend: operands to float32, merged values to codes, on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastmerge.backends import Buffer, Chunk, Coded
from fastmerge.backends.memory import tensor_of
from fastmerge.coding import READ_ONLY, Coding, Format
from fastmerge.dtypes import DType

if TYPE_CHECKING:
    from torch import Tensor

    from fastmerge.backends.triton import TritonKernels

BNB = (Format.BNB_NF4, Format.BNB_FP4)
WORDS = (Format.GPTQ, Format.AWQ)
BLOCKS = (Format.Q4_0, Format.Q4_1, Format.Q8_0, Format.GGUF_MXFP4)
BYTES = (Format.FP8, Format.Q8_0)
CPU_OR_CUDA = "backend 'cpu' or 'cuda' can"

#: Where output t of eight lies in a word, by t.
NIBBLES = {Format.INT4: range(8), Format.GPTQ: range(8), Format.AWQ: (0, 4, 1, 5, 2, 6, 3, 7)}

#: Elements of a group that a program looks at together.
PIECE = 1024


def why_not_written(coding: Coding) -> str | None:
    """Return why results of this coding cannot be made here, or None."""
    name = coding.format.name.lower()
    if coding.format in READ_ONLY:
        return f"{name} is only read"
    if coding.format is Format.Q4_K:
        return f"{name} is not written by it; {CPU_OR_CUDA}"
    if coding.search:
        return f"scales of {name} are not searched for by it; {CPU_OR_CUDA}"
    if coding.format is Format.NVFP4 and coding.other_rule:
        return f"{name} with a factor as the scale of the tensor is only read"
    return None


# ---- operands ------------------------------------------------------------------------------------


def decode(kernels: TritonKernels, coded: Coded) -> Buffer:
    """Return the elements of a coded tensor as float32, in memory of their own."""
    from fastmerge.triton_kernels.quant4_decode import decode_kernel

    out = kernels.empty(coded.n, dtype="float32")
    if coded.n:
        c, slots, block = coded.coding, coded.slots, kernels.tiles.block
        low = slots.get("low_a")
        nested = "nested" in slots
        addresses = [
            slots[name].address if name in slots else 0
            for name in ("codes", "scales", "zeros", "nested")
        ]
        kernels.launch(
            decode_kernel, (-(-coded.n // block),), out.data_ptr(), *addresses,
            kernels.dynamic_map.data_ptr() if nested else 0,
            *(slots[name].address if name in slots else 0 for name in ("group_of", "low_a", "low_b")),
            coded.start, coded.origin, coded.n, coded.rows, coded.cols,
            low.n // coded.cols if low else 0,
            float(coded.nested_offset), float(coded.tensor_scale), float(coded.low_scale),
            FORMAT=int(c.format), TYPE=c.dtype.code if c.format is Format.DENSE else 1,
            SCALE=int(c.scale), GROUP=c.group, GROUP_ROWS=c.group_rows, SYMMETRIC=c.symmetric,
            OTHER_RULE=c.other_rule, V1=c.v1, ROTARY=c.rotary, NESTED=nested, ACT_ORDER="group_of" in slots,
            HAS_LOW_RANK=low is not None, LOW_TYPE=low.dtype.code if low else 1,
            BLOCK=block, LONG=coded.cols >= block,
        )  # fmt: skip
    return Buffer(out.data_ptr(), DType.F32, coded.n, out, kernels.device)


def is_coded(chunk: Chunk) -> bool:
    """Return whether an operand is."""
    return any(isinstance(x, Coded) for x in (chunk.base, *chunk.experts))


# ---- results -------------------------------------------------------------------------------------


def encode(kernels: TritonKernels, out: Coded, values: Buffer, flag: int) -> None:
    """Code a result's elements: whole units, given as `out.coding.dtype`.

    flag: address of an int32 that becomes 1 if one is not finite; what is coded then is undefined.
    """
    if out.n == 0:
        return
    if out.coding.format is Format.DENSE:
        _store_rows(kernels, out, values, flag)
        return
    job = _Encoding(kernels, out, values)
    job.choose_scales()
    job.store_codes(flag)


def _store_rows(kernels: TritonKernels, out: Coded, values: Buffer, flag: int) -> None:
    from fastmerge.triton_kernels.quant4_encode import store_rows_kernel

    block = kernels.tiles.block
    kernels.launch(
        store_rows_kernel, (-(-out.n // block),), values.address, out.slots["codes"].address, flag,
        out.start // out.cols, out.origin // out.cols, out.n, out.cols,
        TYPE=out.coding.dtype.code, ROTARY=out.coding.rotary, BLOCK=block, LONG=out.cols >= block,
    )  # fmt: skip


class _Encoding:
    """Elements [start, start + n) of a result, as rows; bitsandbytes' are one row."""

    def __init__(self, kernels: TritonKernels, out: Coded, values: Buffer) -> None:
        self._kernels, self._out, self._values = kernels, out, values
        c = out.coding
        flat = c.format in BNB
        self._cols = out.n if flat else out.cols
        self._rows = 1 if flat else out.n // out.cols
        self._first = 0 if flat else out.start // out.cols
        self._origin = 0 if flat else out.origin // out.cols
        self._group = 32 if c.format in BLOCKS else c.group
        self._group_rows = 1 if flat else c.group_rows
        self._groups = -(-self._cols // self._group) if self._group else 1
        self._codes, self._scales = (
            out.slots[name].address if name in out.slots else 0 for name in ("codes", "scales")
        )
        if flat:
            ahead = out.start - out.origin
            self._codes += ahead // 2
            self._scales += ahead // c.group * 4
        lines = -(-self._rows // self._group_rows) if self._group_rows else 0
        self._n_groups = lines * self._groups
        self._factors = kernels.empty(2, self._n_groups, dtype="float32")

    def choose_scales(self) -> None:
        c = self._out.coding
        if c.format in BLOCKS:
            self._scale_blocks()
        elif self._group_rows:
            zeros = self._kernels.empty(self._n_groups, dtype="uint8")
            self._scale_groups(zeros)
            if "zeros" in self._out.slots:
                self._pack_zeros(zeros.view(self._rows, self._groups))

    def _scale_groups(self, zeros: Tensor) -> None:
        from fastmerge.triton_kernels.quant4_encode import scale_groups_kernel

        c, block = self._out.coding, self._kernels.tiles.block
        piece = min(PIECE, 1 << max(0, (self._group or self._cols) - 1).bit_length())
        together = max(1, block // piece)
        self._kernels.launch(
            scale_groups_kernel, (-(-self._n_groups // together),), self._values.address,
            self._scales, self._factors.data_ptr(), zeros.data_ptr(),
            self._first, self._origin, self._out.rows, self._n_groups, self._rows, self._cols,
            float(self._out.tensor_scale),
            FORMAT=int(c.format), TYPE=c.dtype.code, SCALE=int(c.scale), GROUP=self._group,
            GROUP_ROWS=self._group_rows, SYMMETRIC=c.symmetric, OTHER_RULE=c.other_rule, V1=c.v1,
            ROTARY=c.rotary, GROUPS=together, PIECE=piece,
        )  # fmt: skip

    def _scale_blocks(self) -> None:
        from fastmerge.triton_kernels.quant4_encode import scale_blocks_kernel

        c, together = self._out.coding, max(1, self._kernels.tiles.block // 32)
        self._kernels.launch(
            scale_blocks_kernel, (-(-self._n_groups // together),), self._values.address,
            self._codes, self._factors.data_ptr(), self._first, self._origin, self._n_groups,
            self._cols, FORMAT=int(c.format), TYPE=c.dtype.code, ROTARY=c.rotary, GROUPS=together,
        )  # fmt: skip

    def _pack_zeros(self, zeros: Tensor) -> None:
        """Store zero points, eight rows of a group in a word. zeros: [rows, groups] uint8."""
        import torch

        c, slot = self._out.coding, tensor_of(self._out.slots["zeros"])
        words = -(-self._rows // 8)
        padded = torch.nn.functional.pad(zeros, (0, 0, 0, 8 * words - self._rows))
        eight = padded.view(words, 8, self._groups)
        place = NIBBLES[c.format]
        at = torch.tensor([place.index(j) for j in range(8)], device=zeros.device)
        ordered = eight.index_select(1, at)
        packed = (ordered[:, 0::2] | (ordered[:, 1::2] << 4)).transpose(
            1, 2
        )  # words, groups, bytes
        first = (self._first - self._origin) // 8
        packed = packed.reshape(-1).view(torch.int32).view(words, self._groups)
        if c.format is Format.INT4:
            slot.view(-1, self._groups)[first : first + words] = packed
        else:
            slot.view(self._groups, -1)[:, first : first + words] = packed.T

    def store_codes(self, flag: int) -> None:
        from fastmerge.triton_kernels.quant4_encode import store_codes_kernel

        c, cols, block = self._out.coding, self._cols, self._kernels.tiles.block
        lines, width = self._rows, -(-cols // 2)
        if c.format is Format.INT4:
            width = -(-cols // 8) * 4
        elif c.format is Format.AWQ:
            lines, width = self._rows // 2, cols
        elif c.format in BYTES:
            width = cols
        self._kernels.launch(
            store_codes_kernel, (-(-lines * width // block),), self._values.address, self._codes,
            self._scales, self._factors.data_ptr(), flag, self._first, self._origin,
            self._out.rows, self._n_groups, lines * width, width, cols,
            FORMAT=int(c.format), TYPE=c.dtype.code, SCALE=int(c.scale), GROUP=self._group,
            GROUP_ROWS=self._group_rows, OTHER_RULE=c.other_rule,
            SHORT=c.format in BNB and not c.other_rule and cols % c.group != 0,
            ROTARY=c.rotary, BLOCK=block, LONG=width >= block,
        )  # fmt: skip


def residual_of(kernels: TritonKernels, out: Coded, values: Buffer) -> Tensor:
    """Return [2] float64 on the device: sums of squared errors of what was coded, and of squares."""
    import torch

    wanted, decoded = tensor_of(values).float(), decode(kernels, out)
    errors = tensor_of(decoded) - wanted
    norms = [torch.linalg.vector_norm(x, dtype=torch.float64) for x in (errors, wanted)]
    return torch.stack(norms).square()
