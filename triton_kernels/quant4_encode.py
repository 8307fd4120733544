"""Float32 to codes: first the scales of groups, then the codes of elements, a byte a lane.

docs/formats.md is the definition; csrc/core/four_bit the same in C++. Values are already rounded to TYPE,
the coding's. Each of the two kernels reads them once (the second time from a GPU's cache: callers go through
a tensor in spans that fit there), half a byte to one per element is written, and 8 bytes per group pass
between them: the two factors that turn a value into its code.

Values are [rows, cols] of whole rows, `first_row` the first of them in the tensor; bitsandbytes sees one row.
"""

import triton
import triton.language as tl

from .element import INF32, bits_of, divide, key_of, pointer_of, round_f16, unit_of, widen
from .quant4 import (
    AWQ,
    BF16,
    BNB_FP4,
    BNB_NF4,
    FP8,
    GGUF_MXFP4,
    GPTQ,
    INT4,
    MXFP4,
    NVFP4,
    Q4_0,
    Q4_1,
    Q8_0,
    SCALE_F16,
    SCALE_F32,
    book_code,
    clamped,
    e2m1_code,
    e4m3_code,
    load_scale,
    mx_exponent,
    mx_reciprocal,
    nearest_int,
    nvfp4_scale,
    ordered,
    reciprocal_or_zero,
    rounded_to,
    store_byte,
    store_scale,
    stored_row,
)
from .quant4_decode import BLOCK_BYTES, group_of_column, groups_in

F16 = tl.constexpr(2)
F32 = tl.constexpr(1)

#: No float32 is beyond these, in the order of `ordered`.
LEAST = tl.constexpr(-0x7FFFFFFF - 1)
MOST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def load_values(x, at, live, TYPE: tl.constexpr):
    """Load values as float32, 0 where not live."""
    raw = tl.load(pointer_of(x, TYPE, False) + at, mask=live, other=0)
    return widen(raw, TYPE, False)


# ---- what a group spans --------------------------------------------------------------------------


@triton.jit
def range_of_groups(
    x, row, col, rows, cols, width,
    TYPE: tl.constexpr, GROUP_ROWS: tl.constexpr, GROUPS: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Return ([GROUPS] float32 least, largest) of groups that begin at row, column: int64.

    By integers: a zero is -0 where both are there. width: columns of a group.
    """
    least = tl.full([GROUPS, PIECE], MOST, tl.int32)
    largest = tl.full([GROUPS, PIECE], LEAST, tl.int32)
    lane = tl.arange(0, PIECE)[None, :]
    for r in range(0, GROUP_ROWS):
        for begin in range(0, width, PIECE):
            column = col[:, None] + begin + lane
            live = (row[:, None] + r < rows) & (column < cols) & (begin + lane < width)
            value = load_values(x, (row[:, None] + r) * cols + column, live, TYPE)
            key = ordered(value.to(tl.int32, bitcast=True))
            least = tl.minimum(least, tl.where(live, key, MOST))
            largest = tl.maximum(largest, tl.where(live, key, LEAST))
    low = ordered(tl.min(least, 1)).to(tl.float32, bitcast=True)
    high = ordered(tl.max(largest, 1)).to(tl.float32, bitcast=True)
    return low, high


@triton.jit
def peak_of(low, high):
    """Return float32: the largest magnitude in [low, high]."""
    return tl.maximum(bits_of(low, False), bits_of(high, False)).to(tl.float32, bitcast=True)


# ---- scales: each returns the two factors of `code_of` -------------------------------------------


@triton.jit
def int4_factors(low, high, TYPE: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Return (scale, zero), every operation rounded to TYPE; the group holds 0."""
    if SYMMETRIC:
        sevens = tl.full(low.shape, 7.5, tl.float32)
        scale = rounded_to(divide(peak_of(low, high), sevens, False), TYPE)
        zero = low * 0.0
    else:
        low = tl.where(low < 0, low, 0.0)
        high = tl.where(high > 0, high, 0.0)
        fifteen = tl.full(low.shape, 15.0, tl.float32)
        scale = rounded_to(divide(rounded_to(high - low, TYPE), fifteen, False), TYPE)
        zero = rounded_to(-8.0 - rounded_to(divide(low, scale, False), TYPE), TYPE)
        whole = nearest_int(clamped(zero, -8.0, 7.0)).to(tl.float32)
        zero = tl.where(zero == zero, whole, 0.0)  # 0 / 0: all is zero
    if TYPE == BF16:
        epsilon = 0.0078125
    elif TYPE == F16:
        epsilon = 0.0009765625
    else:
        epsilon = 1.1920929e-07
    return tl.where(scale == 0, epsilon, scale), zero


@triton.jit
def word_factors(low, high, FORMAT: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Return (scale, zero) of GPTQ and AWQ; the group holds 0.

    GPTQ's zero is at least 1: stored less one it would be 15, which readers that add to whole words carry
    into the next.
    """
    low = tl.where(low < 0, low, 0.0)
    high = tl.where(high > 0, high, 0.0)
    if SYMMETRIC:
        span = 2.0 * tl.where(-low > high, -low, high)
    else:
        span = high - low
    fifteen = tl.full(low.shape, 15.0, tl.float32)
    scale = divide(tl.where(span > 1e-5, span, 1e-5), fifteen, False)
    if SYMMETRIC:
        zero = low * 0.0 + 8.0
    else:
        LEAST_ZERO: tl.constexpr = 1.0 if FORMAT == GPTQ else 0.0
        zero = nearest_int(clamped(divide(-low, scale, False), LEAST_ZERO, 15.0)).to(tl.float32)
    return scale, zero


@triton.jit
def nvfp4_code(peak, divisor, TYPE: tl.constexpr):
    """Return int32: E4M3 of the scale that brings `peak` to 6; 0.125 in place of 0."""
    six = tl.full(peak.shape, 6.0, tl.float32)
    code = e4m3_code(divisor * rounded_to(divide(peak, six, False), TYPE))
    return tl.where(code == 0, 0x20, code)


@triton.jit(do_not_specialize=["first_row", "origin_row", "all_rows", "n_groups", "rows", "cols"])
def scale_groups_kernel(
    x,  # int64, address of [rows, cols] TYPE
    scales,  # int64, address of what begins with row `origin_row` (bitsandbytes: with these values)
    factors,  # int64, address of [2, n_groups] float32
    stored_zeros,  # int64, address of [n_groups] uint8: zero points as they are stored, 0 .. 15
    first_row: tl.int64,
    origin_row: tl.int64,
    all_rows: tl.int64,  # of the whole tensor
    n_groups: tl.int64,
    rows: tl.int64,
    cols: tl.int64,
    tensor_scale,  # float32: NVFP4's divisor
    FORMAT: tl.constexpr,
    TYPE: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    OTHER_RULE: tl.constexpr,
    V1: tl.constexpr,
    ROTARY: tl.constexpr,
    GROUPS: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Choose and store the scales of GROUPS groups."""
    index = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    live = index < n_groups
    groups = groups_in(cols, GROUP)
    row = index // groups * GROUP_ROWS
    group = index % groups
    width = GROUP if GROUP else cols
    low, high = range_of_groups(
        x, row, group * width, rows, cols, width, TYPE, GROUP_ROWS, GROUPS, PIECE
    )
    at = stored_row(first_row + row, origin_row, ROTARY) // GROUP_ROWS * groups + group
    one = tl.full([GROUPS], 1.0, tl.float32)
    first = one
    second = one
    if FORMAT == BNB_NF4 or FORMAT == BNB_FP4:
        # The CPU's rule divides in a short last block and keeps its scale from being zero.
        second = peak_of(low, high)
        stored = second
        if not OTHER_RULE:
            second = tl.where(second < 1e-38, 1e-38, second)
            stored = tl.where(cols - group * GROUP < GROUP, second, stored)
        store_scale(scales, at, stored, live, SCALE_F32)
        first = divide(one, second, False)
    elif FORMAT == INT4:
        first, second = int4_factors(low, high, TYPE, SYMMETRIC)
        store_scale(scales, at, first, live, SCALE)
        if not SYMMETRIC:
            store_byte(stored_zeros, index, (second + 8.0).to(tl.int32), live)
    elif FORMAT == GPTQ or FORMAT == AWQ:
        scale, zero = word_factors(low, high, FORMAT, SYMMETRIC)
        second = store_scale(scales, group * all_rows + first_row + row, scale, live, SCALE_F16)
        first = zero * scale
        less = zero.to(tl.int32)
        if V1 and FORMAT == GPTQ:
            less -= 1
        store_byte(stored_zeros, index, less & 15, live)
    elif FORMAT == FP8:
        peak = peak_of(low, high)
        most = tl.full([GROUPS], 448.0, tl.float32)
        scale = tl.where(peak > 0, divide(peak, most, False), 1.0)
        first = store_scale(scales, at, scale, live, SCALE)
    else:
        if FORMAT == NVFP4:
            code = nvfp4_code(peak_of(low, high), tensor_scale, TYPE)
            first = nvfp4_scale(code, tensor_scale)
        else:
            code = mx_exponent(peak_of(low, high), OTHER_RULE)
            first = mx_reciprocal(code)
        store_byte(scales, at, code, live)
    store_factors(factors, index, n_groups, first, second, live)


@triton.jit
def store_factors(factors, index, n_groups, first, second, live):
    to = factors.to(tl.pointer_type(tl.float32)) + index
    tl.store(to, first, mask=live)
    tl.store(to + n_groups, second, mask=live)


# ---- scales of GGUF's blocks, which stand before their codes --------------------------------------


@triton.jit
def first_of(bits, hit):
    """Return [GROUPS] float32: of each row of 32 the first element that is hit. bits: int32."""
    lane = tl.arange(0, 32)[None, :]
    first = tl.min(tl.where(hit, lane, 32), 1)
    found = tl.sum(tl.where(lane == first[:, None], bits, 0), 1)
    return found.to(tl.float32, bitcast=True)


@triton.jit
def store_f16(address, at, x, live):
    """Store float32 as the two bytes of its float16, wherever they lie."""
    bits = round_f16(x)
    store_byte(address, at, bits & 0xFF, live)
    store_byte(address, at + 1, bits >> 8, live)


@triton.jit(do_not_specialize=["first_row", "origin_row", "n_groups", "cols"])
def scale_blocks_kernel(
    x,  # int64, address of [rows, cols] TYPE
    codes,  # int64, address of what begins with row `origin_row`
    factors,  # int64, address of [2, n_groups] float32
    first_row: tl.int64,
    origin_row: tl.int64,
    n_groups: tl.int64,
    cols: tl.int64,
    FORMAT: tl.constexpr,
    TYPE: tl.constexpr,
    ROTARY: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Choose and store the scales of GROUPS blocks of 32."""
    BYTES: tl.constexpr = BLOCK_BYTES[FORMAT - Q4_0]
    index = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    live = index < n_groups
    blocks = cols // 32
    value = load_values(x, index[:, None] * 32 + tl.arange(0, 32)[None, :], live[:, None], TYPE)
    bits = value.to(tl.int32, bitcast=True)
    key = bits_of(value, False)
    peak_bits = tl.max(key, 1)
    peak = peak_bits.to(tl.float32, bitcast=True)
    row = stored_row(first_row + index // blocks, origin_row, ROTARY)
    at = (row * blocks + index % blocks) * BYTES
    one = tl.full([GROUPS], 1.0, tl.float32)
    second = one
    if FORMAT == Q4_0:
        step = first_of(bits, key == peak_bits[:, None]) * -0.125
        store_f16(codes, at, step, live)
        first = reciprocal_or_zero(step)
    elif FORMAT == Q4_1:
        ordered_bits = ordered(bits)
        second = ordered(tl.min(ordered_bits, 1)).to(tl.float32, bitcast=True)
        high = ordered(tl.max(ordered_bits, 1)).to(tl.float32, bitcast=True)
        # Of zeros with both signs a sequential search finds the first.
        second = tl.where(second == 0, first_of(bits, value == 0), second)
        step = divide(high - second, one * 15.0, False)
        store_f16(codes, at, step, live)
        store_f16(codes, at + 2, second, live)
        first = reciprocal_or_zero(step)
    elif FORMAT == Q8_0:
        step = divide(peak, one * 127.0, False)
        store_f16(codes, at, step, live)
        first = reciprocal_or_zero(step)
    else:
        exponent = mx_exponent(peak, True)
        store_byte(codes, at, exponent, live)
        first = mx_reciprocal(exponent)
    store_factors(factors, index, n_groups, first, second, live)


# ---- codes ---------------------------------------------------------------------------------------


@triton.jit
def half_away(x):
    """Return int32 nearest to x, halves away from zero. x less that is exact."""
    near = nearest_int(x)
    rest = x - near.to(tl.float32)
    up = ((rest == 0.5) & (x > 0)).to(tl.int32)
    return near + up - ((rest == -0.5) & (x < 0)).to(tl.int32)


@triton.jit
def code_of(
    x, first, second, by_division,
    FORMAT: tl.constexpr, TYPE: tl.constexpr, OTHER_RULE: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """Return int32 codes of values, by the factors of their groups."""
    if FORMAT == BNB_NF4 or FORMAT == BNB_FP4:
        scaled = x * first
        if SHORT:
            scaled = tl.where(by_division, divide(x, second, False), scaled)
        code = book_code(scaled, FORMAT == BNB_FP4, OTHER_RULE)
    elif FORMAT == INT4:
        CODES: tl.constexpr = F32 if OTHER_RULE and TYPE == BF16 else TYPE
        scaled = rounded_to(rounded_to(divide(x, first, False), CODES) + second, CODES)
        code = nearest_int(clamped(scaled, -8.0, 7.0)) + 8
    elif FORMAT == GPTQ or FORMAT == AWQ:
        code = nearest_int(clamped(divide(x + first, second, False), 0.0, 15.0))
    elif FORMAT == NVFP4:
        code = e2m1_code(divide(x, first, False), False)
    elif FORMAT == MXFP4 or FORMAT == GGUF_MXFP4:
        code = e2m1_code(x * first, FORMAT == GGUF_MXFP4)
    elif FORMAT == Q4_0:
        code = clamped(x * first + 8.5, 0.0, 15.0).to(tl.int32)
    elif FORMAT == Q4_1:
        code = clamped((x - second) * first + 0.5, 0.0, 15.0).to(tl.int32)
    elif FORMAT == Q8_0:
        code = half_away(clamped(x * first, -127.0, 127.0)) & 0xFF
    else:
        code = e4m3_code(divide(x, first, False))
    return code


@triton.jit
def code_elements(
    x, scales, factors, row, col, cols, n_groups, live,
    FORMAT: tl.constexpr, TYPE: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr, OTHER_RULE: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    """Return ([BLOCK] int32 codes, keys) of the elements at row, column: beyond its end of a 0."""
    value = load_values(x, row * cols + col, live & (col < cols), TYPE)
    if GROUP_ROWS:
        group = group_of_column(col, GROUP)
        groups = groups_in(cols, GROUP)
        floats = factors.to(tl.pointer_type(tl.float32)) + row // GROUP_ROWS * groups + group
        first = tl.load(floats, mask=live & (group < groups), other=1.0)
        second = tl.load(floats + n_groups, mask=live & (group < groups), other=1.0)
    else:  # of the tensor, known before
        first = load_scale(scales, row * 0, live, SCALE)
        second = first
    by_division = live
    if SHORT:
        by_division = col >= cols // GROUP * GROUP
    code = code_of(value, first, second, by_division, FORMAT, TYPE, OTHER_RULE, SHORT)
    return code, key_of(value, False)


@triton.jit(
    do_not_specialize=["first_row", "origin_row", "all_rows", "n_groups", "n", "width", "cols"]
)  # fmt: skip
def store_codes_kernel(
    x,  # int64, address of [rows, cols] TYPE
    codes,  # int64, address of what begins with row `origin_row` (bitsandbytes: with these values)
    scales,  # int64, as codes; only of a tensor's scale
    factors,  # int64, address of [2, n_groups] float32
    flag,  # int64, address of [1] int32: set if a value is not finite
    first_row: tl.int64,
    origin_row: tl.int64,
    all_rows: tl.int64,  # of the whole tensor
    n_groups: tl.int64,
    n: tl.int64,  # bytes
    width: tl.int64,  # bytes that one row fills; AWQ: that two rows do
    cols: tl.int64,
    FORMAT: tl.constexpr,
    TYPE: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    OTHER_RULE: tl.constexpr,
    SHORT: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK: tl.constexpr,
    LONG: tl.constexpr,
):
    """Code a block of bytes, of two elements each; of 8-bit codes one."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    live = lane < n - begin
    line = unit_of(begin, width, lane, 1, BLOCK, LONG)
    place = unit_of(begin, width, lane, 2, BLOCK, LONG)
    if FORMAT != BNB_NF4 and FORMAT != BNB_FP4:  # rows of any length, not all elements
        line = line.to(tl.int32)
        place = place.to(tl.int32)
    row = line
    col = place * 2
    below = 0
    beside = 1
    if FORMAT == AWQ:  # outputs 0 2 4 6 1 3 5 7 of eight
        row = line // 4 * 8 + line % 2 * 4 + line % 4 // 2
        col = place
        below = 2
        beside = 0
    elif FORMAT == Q4_0 or FORMAT == Q4_1 or FORMAT == GGUF_MXFP4:
        col = place // 16 * 32 + place % 16
        beside = 16
    elif FORMAT == FP8 or FORMAT == Q8_0:
        col = place
    code, key = code_elements(
        x, scales, factors, row, col, cols, n_groups, live,
        FORMAT, TYPE, SCALE, GROUP, GROUP_ROWS, OTHER_RULE, SHORT,
    )  # fmt: skip
    if FORMAT != FP8 and FORMAT != Q8_0:
        other, other_key = code_elements(
            x, scales, factors, row + below, col + beside, cols, n_groups, live,
            FORMAT, TYPE, SCALE, GROUP, GROUP_ROWS, OTHER_RULE, SHORT,
        )  # fmt: skip
        key = tl.maximum(key, other_key)
        if FORMAT == BNB_NF4 or FORMAT == BNB_FP4:  # what an odd count leaves is the code of 0
            code = (code << 4) | other
        elif FORMAT == INT4:  # what pads a word is 0
            code = tl.where(col < cols, code, 0) | (tl.where(col + 1 < cols, other, 0) << 4)
        else:
            code = code | (other << 4)
    at = stored_row(first_row + row, origin_row, ROTARY)
    if FORMAT == AWQ:
        to = (col * (all_rows // 8) + at // 8) * 4 + line % 4
    elif FORMAT == GPTQ:
        to = (col // 8 * all_rows + at) * 4 + col % 8 // 2
    elif FORMAT == Q4_0 or FORMAT == Q4_1 or FORMAT == GGUF_MXFP4:
        BYTES: tl.constexpr = BLOCK_BYTES[FORMAT - Q4_0]
        to = (at * (cols // 32) + place // 16) * BYTES + (BYTES - 16) + place % 16
    elif FORMAT == Q8_0:
        to = (at * (cols // 32) + place // 32) * 34 + 2 + place % 32
    else:
        to = at * width + place
    store_byte(codes, to, code, live)
    raised = tl.max((key >= INF32).to(tl.int32), 0)
    tl.atomic_or(flag.to(tl.pointer_type(tl.int32)), 1, mask=raised != 0, sem="relaxed")


@triton.jit(do_not_specialize=["first_row", "origin_row", "n", "cols"])
def store_rows_kernel(
    x,  # int64, address of [n] TYPE
    codes,  # int64, address of [.., cols] TYPE that begins with row `origin_row`
    flag,  # int64, address of [1] int32: set if a value is not finite
    first_row: tl.int64,
    origin_row: tl.int64,
    n: tl.int64,
    cols: tl.int64,
    TYPE: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK: tl.constexpr,
    LONG: tl.constexpr,
):
    """Store elements as they are, in the order of their stored rows."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    live = lane < n - begin
    row = unit_of(begin, cols, lane, 1, BLOCK, LONG)
    col = unit_of(begin, cols, lane, 2, BLOCK, LONG)
    raw = tl.load(pointer_of(x, TYPE, False) + begin + lane, mask=live, other=0)
    to = stored_row(first_row + row, origin_row, ROTARY) * cols + col
    tl.store(pointer_of(codes, TYPE, False) + to, raw, mask=live)
    key = key_of(widen(raw, TYPE, False).to(tl.float32), False)
    raised = tl.max((key >= INF32).to(tl.int32), 0)
    tl.atomic_or(flag.to(tl.pointer_type(tl.int32)), 1, mask=raised != 0, sem="relaxed")
