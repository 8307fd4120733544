"""Codes to float32: elements of a coded tensor wherever they begin, an element a lane.

docs/formats.md is the definition; csrc/core/four_bit the same in C++. Moves 4 bytes per element and its codes
(half a byte to one); a group's scale and the byte that neighbours share come from the first cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .element import divide, pointer_of, unit_of, widen
from .quant4 import (
    AWQ,
    BNB_FP4,
    BNB_NF4,
    DENSE,
    FP8,
    GGUF_NVFP4,
    GPTQ,
    INT4,
    INT8,
    MXFP4,
    NVFP4,
    Q4_0,
    Q4_1,
    Q4_K,
    Q6_K,
    Q8_0,
    SCALE_BF16,
    SCALE_F16,
    SCALE_F32,
    book_value,
    e2m1_value,
    e4m3_value,
    e8m0_value,
    load_byte,
    load_f16,
    load_scale,
    nvfp4_scale,
    rounded_to,
    stored_row,
)

BF16 = tl.constexpr(3)
F16 = tl.constexpr(2)

#: Elements and bytes of a GGUF block, by format less Q4_0.
BLOCK_ELEMENTS = tl.constexpr((32, 32, 32, 256, 32, 64, 0, 0, 256))
BLOCK_BYTES = tl.constexpr((18, 20, 34, 144, 17, 36, 0, 0, 210))


def dynamic_map() -> Tensor:
    """Return [256] float32 on the host: bitsandbytes' values of 8-bit codes, ascending.

    Decade i of 7 holds the 2^i means between 2^i + 1 even steps from 0.1 to 1, times 10^(i - 6), with both
    signs; 0 and 1 are added.
    """
    values = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        ends = torch.linspace(0.1, 1, 2**i + 1)
        means = (ends[:-1] + ends[1:]) / 2 * 10.0 ** (i - 6)
        values += [means, -means]
    return torch.cat(values).sort().values


@triton.jit
def group_of_column(col, GROUP: tl.constexpr):
    """Return which group of its row a column is in. GROUP: 0: a row is one."""
    if GROUP:
        group = col // GROUP
    else:
        group = col * 0
    return group


@triton.jit
def groups_in(cols, GROUP: tl.constexpr):
    """Return how many groups a row has."""
    groups = 1
    if GROUP:
        groups = (cols + GROUP - 1) // GROUP
    return groups


@triton.jit
def signed_byte(byte):
    return (byte ^ 0x80) - 0x80


# ---- families: each returns [BLOCK] float32 ------------------------------------------------------


@triton.jit
def decode_bnb(
    codes, scales, nested, book, offset, flat, origin, live,
    FP4: tl.constexpr, GROUP: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """Flat elements; high nibble first. NESTED: scales are codes of `book`, of 256 values."""
    place = flat - origin
    byte = load_byte(codes, place // 2, live)
    code = tl.where(place % 2 == 0, byte >> 4, byte & 15)
    block = flat // GROUP
    at = block - origin // GROUP
    if NESTED:
        floats = tl.pointer_type(tl.float32)
        known = tl.load(book.to(floats) + load_byte(scales, at, live))
        largest = tl.load(nested.to(floats) + block // 256, mask=live, other=0.0)
        scale = known * largest + offset
    else:
        scale = load_scale(scales, at, live, SCALE_F32)
    return book_value(code, FP4) * scale


@triton.jit
def decode_int4(
    codes, scales, zeros, row, col, cols, live,
    SCALE: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """Low nibble first; the product is rounded to the type of the scale."""
    groups = groups_in(cols, GROUP)
    at = row * groups + group_of_column(col, GROUP)
    byte = load_byte(codes, row * ((cols + 7) // 8 * 4) + col // 2, live)
    code = (byte >> (col % 2 * 4)) & 15
    if SYMMETRIC:
        zero = code * 0 + 8
    else:
        word = row // 8 * groups + group_of_column(col, GROUP)
        zero = load_byte(zeros, word * 4 + row % 8 // 2, live)
        zero = (zero >> (row % 2 * 4).to(tl.int32)) & 15
    value = (code - zero).to(tl.float32) * load_scale(scales, at, live, SCALE)
    if SCALE == SCALE_F16:
        value = rounded_to(value, F16)
    elif SCALE == SCALE_BF16:
        value = rounded_to(value, BF16)
    return value


@triton.jit
def decode_micro(
    codes, scales, row, col, cols, tensor_scale, live,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, OTHER_RULE: tl.constexpr,
):  # fmt: skip
    """E2M1, low nibble first, with a byte of scale. OTHER_RULE: NVFP4's scale of the tensor is a factor."""
    byte = load_byte(codes, row * (cols // 2) + col // 2, live)
    value = e2m1_value((byte >> (col % 2 * 4)) & 15)
    code = load_byte(scales, row * groups_in(cols, GROUP) + group_of_column(col, GROUP), live)
    if FORMAT == NVFP4 and OTHER_RULE:
        scale = e4m3_value(code) * tensor_scale
    elif FORMAT == NVFP4:
        scale = nvfp4_scale(code, tensor_scale)
    else:
        scale = e8m0_value(code)
    return value * scale


@triton.jit
def decode_words(
    codes, scales, zeros, group_of, row, col, rows, live,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, V1: tl.constexpr, ACT_ORDER: tl.constexpr,
):  # fmt: skip
    """GPTQ, whose words run over columns, and AWQ, over rows; row and column as int64."""
    group = group_of_column(col, GROUP)
    if ACT_ORDER:
        order = group_of.to(tl.pointer_type(tl.int32))
        group = tl.load(order + col, mask=live, other=0).to(tl.int64)
    if FORMAT == AWQ:
        nibble = row % 2 * 4 + row % 8 // 2
        byte = load_byte(codes, col * (rows // 2) + row // 8 * 4 + nibble // 2, live)
        code = (byte >> (nibble % 2 * 4).to(tl.int32)) & 15
    else:
        nibble = row % 8
        byte = load_byte(codes, (col // 8 * rows + row) * 4 + col % 8 // 2, live)
        code = (byte >> (col % 2 * 4).to(tl.int32)) & 15
    zero = load_byte(zeros, group * (rows // 2) + row // 8 * 4 + nibble // 2, live)
    zero = zero >> (nibble % 2 * 4).to(tl.int32)
    if V1 and FORMAT == GPTQ:
        zero += 1
    scale = load_scale(scales, group * rows + row, live, SCALE_F16)
    return (code - (zero & 15)).to(tl.float32) * scale


@triton.jit
def decode_q4_k(codes, block, place, live):
    """Eight sub-blocks of 32, each with 6 bits of scale and of minimum."""
    sub = place // 32
    later = sub >= 4
    nearer = load_byte(codes, block + 4 + tl.where(later, sub - 4, sub), live)
    middle = load_byte(codes, block + 4 + tl.where(later, sub, sub + 4), live)
    farther = load_byte(codes, block + 4 + tl.where(later, sub + 4, sub), live)
    scale = tl.where(later, (farther & 15) | ((nearer >> 6) << 4), nearer & 63)
    low = tl.where(later, (farther >> 4) | ((middle >> 6) << 4), middle & 63)
    byte = load_byte(codes, block + 16 + sub // 2 * 32 + place % 32, live)
    code = (byte >> (sub % 2 * 4)) & 15
    step = load_f16(codes, block, live) * scale.to(tl.float32)
    return step * code.to(tl.float32) - load_f16(codes, block + 2, live) * low.to(tl.float32)


@triton.jit
def decode_q6_k(codes, block, place, live):
    """Sixteen groups of 16 with 8 bits of scale; low nibbles, then high pairs of bits."""
    half = place // 128
    part = place // 32 % 4
    lane = place % 32
    low = load_byte(codes, block + 64 * half + 32 * (part % 2) + lane, live)
    high = load_byte(codes, block + 128 + 32 * half + lane, live)
    code = ((low >> (part // 2 * 4)) & 15) | (((high >> (2 * part)) & 3) << 4)
    scale = signed_byte(load_byte(codes, block + 192 + place // 16, live))
    step = load_f16(codes, block + 208, live) * scale.to(tl.float32)
    return step * (code - 32).to(tl.float32)


@triton.jit
def decode_gguf(codes, row, col, cols, factor, live, FORMAT: tl.constexpr):
    """A row is a run of blocks, each with its scales before its codes (Q6_K: behind)."""
    SIZE: tl.constexpr = BLOCK_ELEMENTS[FORMAT - Q4_0]
    BYTES: tl.constexpr = BLOCK_BYTES[FORMAT - Q4_0]
    block = (row * (cols // SIZE) + col // SIZE) * BYTES
    place = col % SIZE
    if FORMAT == Q4_K:
        value = decode_q4_k(codes, block, place, live)
    elif FORMAT == Q6_K:
        value = decode_q6_k(codes, block, place, live)
    elif FORMAT == Q8_0:
        code = signed_byte(load_byte(codes, block + 2 + place, live))
        value = load_f16(codes, block, live) * code.to(tl.float32)
    elif FORMAT == GGUF_NVFP4:
        byte = load_byte(codes, block + 4 + place // 16 * 8 + place % 8, live)
        scale = load_byte(codes, block + place // 16, live) & 0x7F
        scale = tl.where(scale == 0x7F, 0, scale)
        value = e2m1_value((byte >> (place % 16 // 8 * 4)) & 15) * e4m3_value(scale) * factor
    else:
        HEADER: tl.constexpr = BYTES - 16
        byte = load_byte(codes, block + HEADER + place % 16, live)
        code = (byte >> (place // 16 * 4)) & 15
        if FORMAT == Q4_0:
            value = load_f16(codes, block, live) * (code - 8).to(tl.float32)
        elif FORMAT == Q4_1:
            value = load_f16(codes, block, live) * code.to(tl.float32)
            value = value + load_f16(codes, block + 2, live)
        else:
            value = e2m1_value(code) * e8m0_value(load_byte(codes, block, live))
    return value


@triton.jit
def decode_bytes(
    codes, scales, row, col, cols, live,
    FORMAT: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr,
):  # fmt: skip
    """E4M3 with scales of the tensor, of rows or of blocks; int8 over 127."""
    byte = load_byte(codes, row * cols + col, live)
    if FORMAT == INT8:
        value = signed_byte(byte).to(tl.float32) * load_scale(scales, row, live, SCALE_F32)
        value = divide(value, tl.full(value.shape, 127.0, tl.float32), False)
    else:
        at = row * 0
        if GROUP_ROWS:
            at = row // GROUP_ROWS * groups_in(cols, GROUP) + group_of_column(col, GROUP)
        value = e4m3_value(byte) * load_scale(scales, at, live, SCALE)
    return value


@triton.jit
def low_rank_product(
    low_a, low_b, row, col, cols, rank, live, TYPE: tl.constexpr, BLOCK: tl.constexpr
):
    """Return [BLOCK] float32: B A, summed over the rank in order."""
    total = tl.zeros([BLOCK], tl.float32)
    a = pointer_of(low_a, TYPE, False) + col
    b = pointer_of(low_b, TYPE, False) + row * rank
    for r in range(0, rank):
        left = widen(tl.load(b + r, mask=live, other=0), TYPE, False).to(tl.float32)
        right = widen(tl.load(a + r * cols, mask=live, other=0), TYPE, False).to(tl.float32)
        total = total + left * right
    return total


# ---- the kernel ----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["first", "origin", "n", "rows", "cols", "rank"])
def decode_kernel(
    out,  # int64, address of [n] float32
    codes,  # int64, address of what begins with flat index `origin`, as the slots below
    scales,  # int64
    zeros,  # int64; not read without zeros
    nested,  # int64, address of float32 scales of 256 scales, whole; only if NESTED
    book,  # int64, address of [256] float32, the dynamic map; only if NESTED
    group_of,  # int64, address of [cols] int32; only if ACT_ORDER
    low_a,  # int64, address of [rank, cols] LOW_TYPE; only if HAS_LOW_RANK
    low_b,  # int64, address of [rows, rank] LOW_TYPE
    first: tl.int64,  # flat index in the tensor of the first element
    origin: tl.int64,
    n: tl.int64,
    rows: tl.int64,  # of the whole tensor
    cols: tl.int64,
    rank: tl.int64,
    offset,  # float32: what nested scales are above
    tensor_scale,  # float32: NVFP4's divisor (OTHER_RULE: factor), GGUF NVFP4's factor
    low_scale,  # float32
    FORMAT: tl.constexpr,
    TYPE: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    OTHER_RULE: tl.constexpr,
    V1: tl.constexpr,
    ROTARY: tl.constexpr,
    NESTED: tl.constexpr,
    ACT_ORDER: tl.constexpr,
    HAS_LOW_RANK: tl.constexpr,
    LOW_TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    LONG: tl.constexpr,
):
    """Decode a block of elements."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    live = lane < n - begin
    row = unit_of(first + begin, cols, lane, 1, BLOCK, LONG)
    col = unit_of(first + begin, cols, lane, 2, BLOCK, LONG)
    at = stored_row(row, origin // cols, ROTARY)
    narrow = col.to(tl.int32)
    if FORMAT == BNB_NF4 or FORMAT == BNB_FP4:
        value = decode_bnb(
            codes, scales, nested, book, offset, first + begin + lane, origin, live,
            FORMAT == BNB_FP4, GROUP, NESTED,
        )  # fmt: skip
    elif FORMAT == INT4:
        value = decode_int4(
            codes, scales, zeros, at, narrow, cols, live, SCALE, GROUP, SYMMETRIC
        )  # fmt: skip
    elif FORMAT == NVFP4 or FORMAT == MXFP4:
        value = decode_micro(
            codes, scales, at, narrow, cols, tensor_scale, live, FORMAT, GROUP, OTHER_RULE
        )  # fmt: skip
    elif FORMAT == GPTQ or FORMAT == AWQ:
        value = decode_words(
            codes, scales, zeros, group_of, at, col, rows, live, FORMAT, GROUP, V1, ACT_ORDER
        )
    elif FORMAT == FP8 or FORMAT == INT8:
        value = decode_bytes(
            codes, scales, at, narrow, cols, live, FORMAT, SCALE, GROUP, GROUP_ROWS
        )
    elif FORMAT == DENSE:
        raw = tl.load(pointer_of(codes, TYPE, False) + at * cols + col, mask=live, other=0)
        value = widen(raw, TYPE, False).to(tl.float32)
    else:
        value = decode_gguf(codes, at, narrow, cols, tensor_scale, live, FORMAT)
    if HAS_LOW_RANK:
        value = value + low_scale * low_rank_product(
            low_a, low_b, row, col, cols, rank, live, LOW_TYPE, BLOCK
        )
    tl.store(out.to(tl.pointer_type(tl.float32)) + begin + lane, value, mask=live)
