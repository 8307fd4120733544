"""The arithmetic of one element: widening, keys, cuts, draws and the one rounding at the store.

docs/numerics.md is the definition, csrc/core/types.hpp the same in C++. WIDE says whether the compute type
Real is float64 (else float32). Nothing here may be contracted: launch with `enable_fp_fusion=False`.

Element types are the codes of fastmerge.dtypes: 0 float64, 1 float32, 2 float16, 3 bfloat16.
"""

import triton
import triton.language as tl

F64 = tl.constexpr(0)
F32 = tl.constexpr(1)
F16 = tl.constexpr(2)

ABS32 = tl.constexpr(0x7FFFFFFF)
ABS64 = tl.constexpr(0x7FFFFFFFFFFFFFFF)
INF32 = tl.constexpr(0x7F800000)
INF64 = tl.constexpr(0x7FF0000000000000)

#: The bits of an alarm, one for each half of a word.
ALARM = tl.constexpr(0x80008000)

#: The least upper bound of all NaNs: keys are cut to it, so that payloads decide nothing.
NAN32 = tl.constexpr(0x7F800001)
NAN64 = tl.constexpr(0x7FF0000000000001)


# ---- loads and stores ----------------------------------------------------------------------------


@triton.jit
def pointer_of(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Cast an address to a pointer to TYPE; 16-bit types are read as integers."""
    if TYPE == F64:
        pointer = address.to(tl.pointer_type(tl.float64))
    elif TYPE == F32:
        pointer = address.to(tl.pointer_type(tl.float32))
    else:
        pointer = address.to(tl.pointer_type(tl.uint16))
    # Without it the compiler must assume the worst and loads 16 bits at a time.
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def widen(raw, TYPE: tl.constexpr, WIDE: tl.constexpr):
    """Return Real of a stored element, exactly."""
    if TYPE <= F32:
        value = raw
    elif TYPE == F16:
        value = raw.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = (raw.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    if WIDE:
        value = value.to(tl.float64)
    return value


@triton.jit
def load_watched(
    address,  # int64, of [n] TYPE
    first,  # int64, element that the block starts at
    lane,  # [BLOCK] int32, 0, 1, ...
    left,  # elements from `first` to the end; only MASKED looks at it
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Load a block of one operand as Real, zero behind its end, and [BLOCK] uint32 of alarms.

    An alarm has a bit of ALARM set where the element is NaN or infinite. 16-bit types are loaded in pairs
    and watched before they are widened: that takes half the operations, and above all the registers of
    widened values need not be kept until the alarms are raised.
    """
    if ALIGNED and not MASKED and TYPE > F32:
        pairs = tl.multiple_of(address.to(tl.pointer_type(tl.uint32)), 16) + first // 2
        words = tl.load(pairs + tl.arange(0, BLOCK // 2))
        if TYPE == F16:
            low = widen((words & 0xFFFF).to(tl.uint16), TYPE, WIDE)
            high = widen((words >> 16).to(tl.uint16), TYPE, WIDE)
            alarm = (words & 0x7C007C00) + 0x04000400
        else:
            low = (words << 16).to(tl.float32, bitcast=True)
            high = (words & 0xFFFF0000).to(tl.float32, bitcast=True)
            if WIDE:
                low = low.to(tl.float64)
                high = high.to(tl.float64)
            alarm = (words & 0x7F807F80) + 0x00800080
        value = tl.reshape(tl.join(low, high), [BLOCK])
        alarm = tl.reshape(tl.join(alarm, alarm), [BLOCK])
    else:
        pointer = pointer_of(address, TYPE, ALIGNED) + first + lane
        if MASKED:
            raw = tl.load(pointer, mask=lane < left, other=0)
        else:
            raw = tl.load(pointer)
        value = widen(raw, TYPE, WIDE)
        limit = INF64 if WIDE else INF32
        alarm = (bits_of(value, WIDE) >= limit).to(tl.uint32) << 31
    return value, alarm


@triton.jit
def load_real(
    address,
    first,
    lane,
    left,
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Load a block of one operand as Real, zero behind its end."""
    value, _alarm = load_watched(address, first, lane, left, TYPE, BLOCK, WIDE, ALIGNED, MASKED)
    return value


@triton.jit
def odd_float(x):
    """Round float64 to float32 by round-to-odd: rounding that to 16 bits rounds x itself."""
    near = x.to(tl.float32)
    back = near.to(tl.float64)
    bits = near.to(tl.int32, bitcast=True)
    # Sign and magnitude: one less is one step nearer to zero, also from infinity.
    toward_zero = tl.where(tl.abs(back) > tl.abs(x), bits - 1, bits)
    odd = tl.where((back == x) | (x != x), bits, toward_zero | 1)
    return odd.to(tl.float32, bitcast=True)


@triton.jit
def round_bf16(x):
    """Return the bits of float32 x in bfloat16: nearest-even by integers, as hardware may flush."""
    u = x.to(tl.uint32, bitcast=True)
    rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
    nan = ((u >> 16) & 0x8000) | 0x7FC0
    return tl.where((u & 0x7FFFFFFF) > 0x7F800000, nan, rounded).to(tl.uint16)


@triton.jit
def round_f16(x):
    """Return the bits of float32 x in float16."""
    u = x.to(tl.uint32, bitcast=True)
    sign = (u >> 16) & 0x8000
    magnitude = u & 0x7FFFFFFF
    # Normal: rebias by subtraction, add the rounding increment of the 13 dropped bits.
    normal = (magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13
    # Subnormal: adding 0.5 aligns the mantissa so that the addition rounds to nearest-even.
    shifted = magnitude.to(tl.float32, bitcast=True) + 0.5
    subnormal = shifted.to(tl.uint32, bitcast=True) - 0x3F000000
    out = tl.where(magnitude < 0x38800000, subnormal, normal)
    out = tl.where(magnitude >= 0x477FF000, 0x7C00, out)  # 65520 and above overflow
    out = tl.where(magnitude > 0x7F800000, 0x7E00, out)
    return (sign | out).to(tl.uint16)


@triton.jit
def narrow(value, TYPE: tl.constexpr, WIDE: tl.constexpr):
    """Return Real `value` as TYPE is stored: one rounding, NaN without payload."""
    if TYPE == F64:
        bits = value.to(tl.float64).to(tl.int64, bitcast=True)
        nan = (bits & (-ABS64 - 1)) | 0x7FF8000000000000
        stored = tl.where((bits & ABS64) > INF64, nan, bits).to(tl.float64, bitcast=True)
    elif TYPE == F32:
        bits = value.to(tl.float32).to(tl.int32, bitcast=True)
        nan = (bits & (-ABS32 - 1)) | 0x7FC00000
        stored = tl.where((bits & ABS32) > INF32, nan, bits).to(tl.float32, bitcast=True)
    else:
        if WIDE:
            value = odd_float(value)
        if TYPE == F16:
            stored = round_f16(value)
        else:
            stored = round_bf16(value)
    return stored


@triton.jit
def store_real(
    value,  # [BLOCK] Real
    address,  # int64, of [n] TYPE
    first,
    lane,
    left,
    TYPE: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Store a block of Real as TYPE."""
    pointer = pointer_of(address, TYPE, ALIGNED) + first + lane
    if MASKED:
        tl.store(pointer, narrow(value, TYPE, WIDE), mask=lane < left)
    else:
        tl.store(pointer, narrow(value, TYPE, WIDE))


@triton.jit
def load_word(table, at):
    """Load one int64 of the table of scalars. table: int64, address of [words] int64."""
    return tl.load(table.to(tl.pointer_type(tl.int64)) + at)


@triton.jit
def load_scalar(table, at, WIDE: tl.constexpr):
    """Load the Real whose bits a word of the table holds: of float32 the low half, to save registers."""
    if WIDE:
        real = tl.load(table.to(tl.pointer_type(tl.float64)) + at)
    else:
        real = tl.load(table.to(tl.pointer_type(tl.float32)) + 2 * at)
    return real


@triton.jit
def load_key(table, at, WIDE: tl.constexpr):
    """Load the key that a word of the table holds."""
    if WIDE:
        key = tl.load(table.to(tl.pointer_type(tl.int64)) + at)
    else:
        key = tl.load(table.to(tl.pointer_type(tl.int32)) + 2 * at)
    return key


@triton.jit
def real_of_word(word, WIDE: tl.constexpr):
    """Return the Real whose bits a word holds."""
    if WIDE:
        real = word.to(tl.float64, bitcast=True)
    else:
        real = word.to(tl.int32).to(tl.float32, bitcast=True)
    return real


@triton.jit
def bytes_of(address, ALIGNED: tl.constexpr):
    """Cast an address to a pointer to uint8."""
    pointer = address.to(tl.pointer_type(tl.uint8))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


# ---- keys and arithmetic -------------------------------------------------------------------------


@triton.jit
def bits_of(x, WIDE: tl.constexpr):
    """Return the bits of |x| as a signed integer."""
    if WIDE:
        bits = x.to(tl.int64, bitcast=True) & ABS64
    else:
        bits = x.to(tl.int32, bitcast=True) & ABS32
    return bits


@triton.jit
def key_of(x, WIDE: tl.constexpr):
    """Return the bits of |x|, all NaNs being the same and above infinity."""
    if WIDE:
        key = tl.minimum(bits_of(x, WIDE), NAN64)
    else:
        key = tl.minimum(bits_of(x, WIDE), NAN32)
    return key


@triton.jit
def divide(x, y, WIDE: tl.constexpr):
    """Return x / y, correctly rounded: plain `/` is approximate in float32."""
    if WIDE:
        quotient = x / y
    else:
        quotient = tl.div_rn(x, y)
    return quotient


# ---- draws ---------------------------------------------------------------------------------------


@triton.jit
def philox_block(key, block):
    """Return the four words of Philox4x32-10 with counter (block low, block high, 0, 0).

    key: int64 scalar. block: int64.
    """
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    zero = low * 0
    return tl.philox(key, low, high, zero, zero)


@triton.jit
def draw16(key, first, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Return [BLOCK] uint32: the 16-bit draws of elements first, first + 1, ...

    ALIGNED: `first` is a multiple of 8. Then one Philox serves eight elements.
    """
    if ALIGNED:
        block = (first >> 3) + tl.arange(0, BLOCK // 8).to(tl.int64)
        w0, w1, w2, w3 = philox_block(key, block)
        # Element 4a + 2b + c of eight is half-word c of word 2a + b.
        even = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
        odd = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
        draw = tl.reshape(tl.join(even, odd), [BLOCK])
    else:
        index = first + tl.arange(0, BLOCK)
        w0, w1, w2, w3 = philox_block(key, index >> 3)
        word = (index >> 1) & 3
        draw = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
        draw = tl.where((index & 1) == 0, draw & 0xFFFF, draw >> 16)
    return draw


@triton.jit
def draw32(key, first, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Return [BLOCK] uint32: the 32-bit draws of elements first, first + 1, ..."""
    if ALIGNED:
        block = (first >> 2) + tl.arange(0, BLOCK // 4).to(tl.int64)
        w0, w1, w2, w3 = philox_block(key, block)
        draw = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK])
    else:
        index = first + tl.arange(0, BLOCK)
        w0, w1, w2, w3 = philox_block(key, index >> 2)
        word = index & 3
        draw = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
    return draw


# ---- units ---------------------------------------------------------------------------------------


@triton.jit
def unit_of(start, cols, lane, AXIS: tl.constexpr, BLOCK: tl.constexpr, LONG: tl.constexpr):
    """Return [BLOCK] int64: the row (AXIS 1) or column (2) of elements start, start + 1, ...

    LONG: cols >= BLOCK, so that a block touches two rows at most; else a 32-bit division does.
    """
    row = start // cols
    column = start - row * cols
    if LONG:
        beyond = (column + lane >= cols).to(tl.int64)
        if AXIS == 1:
            unit = row + beyond
        else:
            unit = column + lane - beyond * cols
    else:
        place = column.to(tl.int32) + lane
        width = cols.to(tl.int32)
        down = place // width
        if AXIS == 1:
            unit = row + down
        else:
            unit = (place - down * width).to(tl.int64)
    return unit
