"""What codes of a few bits are made of: small floats, code books, roundings, and where rows lie.

docs/formats.md is the definition; csrc/core/four_bit the same in C++. Everything that decides a bit is
integer arithmetic or one correctly rounded operation: casts to small types round as the hardware has it.
Formats and types of scales are the codes of fastmerge.coding. Launch with `enable_fp_fusion=False`.
"""

import triton
import triton.language as tl

from .element import ABS32, F16, INF32, divide, round_bf16, round_f16, widen

DENSE = tl.constexpr(0)
BNB_NF4 = tl.constexpr(1)
BNB_FP4 = tl.constexpr(2)
INT4 = tl.constexpr(3)
NVFP4 = tl.constexpr(4)
MXFP4 = tl.constexpr(5)
GPTQ = tl.constexpr(6)
AWQ = tl.constexpr(7)
Q4_0 = tl.constexpr(8)
Q4_1 = tl.constexpr(9)
Q8_0 = tl.constexpr(10)
Q4_K = tl.constexpr(11)
GGUF_MXFP4 = tl.constexpr(12)
GGUF_NVFP4 = tl.constexpr(13)
FP8 = tl.constexpr(14)
INT8 = tl.constexpr(15)
Q6_K = tl.constexpr(16)

SCALE_F32 = tl.constexpr(0)
SCALE_F16 = tl.constexpr(1)
SCALE_BF16 = tl.constexpr(2)
SCALE_E4M3 = tl.constexpr(3)
SCALE_E8M0 = tl.constexpr(4)

BF16 = tl.constexpr(3)

#: bitsandbytes' books. NF4 by code; FP4's magnitudes by the low three bits of a code: not E2M1.
NF4_VALUES = tl.constexpr(
    (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0)
)  # fmt: skip
FP4_MAGNITUDES = tl.constexpr(
    (0.0, 0.0052083335, 0.6666667, 1.0, 0.33333334, 0.5, 0.16666667, 0.25)
)

#: Midpoints between a book's values in ascending order, each the float32 next to the mean of two float32.
NF4_MIDPOINTS = tl.constexpr(
    (-0.8480964, -0.6106329, -0.45999527, -0.33967942, -0.2346074, -0.13791174, -0.045525018,
     0.03979015, 0.12025525, 0.20352125, 0.29201376, 0.38931254, 0.50166345, 0.6427869, 0.86147845)
)  # fmt: skip
FP4_MIDPOINTS = tl.constexpr(
    (-0.8333334, -0.5833334, -0.4166667, -0.2916667, -0.20833334, -0.0859375, -0.0026041667, 0.0,
     0.0026041667, 0.0859375, 0.20833334, 0.2916667, 0.4166667, 0.5833334, 0.8333334)
)  # fmt: skip

#: The CUDA kernel's thresholds on the magnitude of FP4, as it rounds them.
FP4_THRESHOLDS = tl.constexpr(
    (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)
)


# ---- memory --------------------------------------------------------------------------------------


@triton.jit
def load_byte(address, at, live):
    """Load bytes as int32; 0 where not live. address: int64, of uint8."""
    return tl.load(address.to(tl.pointer_type(tl.uint8)) + at, mask=live, other=0).to(tl.int32)


@triton.jit
def store_byte(address, at, byte, live):
    """Store int32 as bytes. address: int64, of uint8."""
    tl.store(address.to(tl.pointer_type(tl.uint8)) + at, byte.to(tl.uint8), mask=live)


@triton.jit
def load_f16(address, at, live):
    """Load float16 as float32. at: of its first byte, wherever that lies."""
    word = load_byte(address, at, live) | (load_byte(address, at + 1, live) << 8)
    return widen(word.to(tl.uint16), F16, False)


@triton.jit
def load_scale(address, at, live, SCALE: tl.constexpr):
    """Load scales as float32. at: their index."""
    if SCALE == SCALE_F32:
        scale = tl.load(address.to(tl.pointer_type(tl.float32)) + at, mask=live, other=0.0)
    elif SCALE == SCALE_F16 or SCALE == SCALE_BF16:
        raw = tl.load(address.to(tl.pointer_type(tl.uint16)) + at, mask=live, other=0)
        scale = widen(raw, F16 if SCALE == SCALE_F16 else BF16, False)
    else:
        scale = value_of_scale(load_byte(address, at, live), SCALE)
    return scale


@triton.jit
def store_scale(address, at, scale, live, SCALE: tl.constexpr):
    """Store scales rounded to their type (E8M0: up); return what was stored."""
    if SCALE == SCALE_F32:
        tl.store(address.to(tl.pointer_type(tl.float32)) + at, scale, mask=live)
        stored = scale
    elif SCALE == SCALE_F16 or SCALE == SCALE_BF16:
        raw = round_f16(scale) if SCALE == SCALE_F16 else round_bf16(scale)
        tl.store(address.to(tl.pointer_type(tl.uint16)) + at, raw, mask=live)
        stored = widen(raw, F16 if SCALE == SCALE_F16 else BF16, False)
    else:
        code = code_of_scale(scale, SCALE)
        store_byte(address, at, code, live)
        stored = value_of_scale(code, SCALE)
    return stored


@triton.jit
def stored_row(row, origin_row, ROTARY: tl.constexpr):
    """Return where row `row` of the tensor lies, counted from row `origin_row`.

    The rows [2, ROTARY / 2] of a rotary head are stored [ROTARY / 2, 2].
    """
    if ROTARY:
        inside = row % ROTARY
        half = ROTARY // 2
        row = row - inside + inside % half * 2 + inside // half
    return row - origin_row


# ---- roundings -----------------------------------------------------------------------------------


@triton.jit
def rounded_to(x, TYPE: tl.constexpr):
    """Return float32 x rounded to a 16-bit type, as float32."""
    if TYPE == F16:
        x = widen(round_f16(x), F16, False)
    elif TYPE == BF16:
        x = widen(round_bf16(x), BF16, False)
    return x


@triton.jit
def nearest_int(x):
    """Return int32, halves to even. |x| < 2**22: the sum has no bits below one."""
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def clamped(x, low, high):
    """Return x within [low, high]; NaN becomes `low`."""
    above = tl.where(x > low, x, low)
    return tl.where(above < high, above, high)


@triton.jit
def ordered(bits):
    """Return an int32 with the order of the float whose bits are given, -0 below 0. Its own inverse."""
    return bits ^ ((bits >> 31) & ABS32)


@triton.jit
def with_sign(magnitude, sign):
    """Return a float32 of a magnitude and a sign. sign: int32, only bit 31 may be set."""
    return (magnitude.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


# ---- small floats --------------------------------------------------------------------------------


@triton.jit
def e4m3_value(code):
    """Return float32 of E4M3: bias 7, no infinities, 0x7f is NaN."""
    magnitude = ((code & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120
    nan = tl.where((code & 0x7F) == 0x7F, 0x7FC00000, 0)
    return with_sign(magnitude, nan | ((code & 0x80) << 24))


@triton.jit
def e4m3_code(x):
    """Return int32 codes, nearest even; beyond 448 they saturate."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & ABS32
    nan = tl.where(magnitude > INF32, 0x7F, 0)
    magnitude = tl.minimum(magnitude, 0x43E00000)  # 448
    normal = (magnitude - 0x3C000000 + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
    # Below 2**-6 the steps are 2**-9: adding 2**14 rounds to them.
    aligned = magnitude.to(tl.float32, bitcast=True) + 16384.0
    subnormal = aligned.to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, subnormal, normal)
    return ((bits >> 24) & 0x80) | nan | code


@triton.jit
def e8m0_value(code):
    """Return float32 2**(code - 127); 255 is NaN."""
    bits = tl.where(code == 0, 0x00400000, tl.where(code == 255, 0x7FC00000, code << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def code_of_scale(scale, SCALE: tl.constexpr):
    """Return int32 codes of one byte: E4M3 nearest, E8M0 the next power of two that is not below."""
    if SCALE == SCALE_E4M3:
        code = e4m3_code(scale)
    elif SCALE == SCALE_E8M0:
        bits = scale.to(tl.int32, bitcast=True)
        exponent = (bits >> 23) & 0xFF
        # Code 0 is 2**-127, a subnormal float.
        above = (bits & 0x7FFFFF) > tl.where(exponent == 0, 0x400000, 0)
        code = tl.minimum(exponent + above.to(tl.int32), 254)
    else:
        code = scale.to(tl.int32)
    return code


@triton.jit
def value_of_scale(code, SCALE: tl.constexpr):
    """Return float32 of a scale that is one byte."""
    if SCALE == SCALE_E4M3:
        value = e4m3_value(code)
    elif SCALE == SCALE_E8M0:
        value = e8m0_value(code)
    else:
        value = code.to(tl.float32)
    return value


@triton.jit
def e2m1_value(code):
    """Return float32 of FP4: magnitudes 0, 1/2, 1, 3/2, 2, 3, 4, 6; bit 3 is the sign."""
    magnitude = ((code & 7) << 22).to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2**126
    return with_sign(magnitude, (code & 8) << 28)


@triton.jit
def e2m1_code(x, GGUF: tl.constexpr):
    """Return int32 codes; ties to the even mantissa, and a negative that rounds to zero keeps its sign.

    GGUF: ties to the lower magnitude, and zero has no sign.
    """
    a = tl.abs(x)
    rank = (a > 0.25).to(tl.int32) + (a > 1.25).to(tl.int32) + (a > 2.5).to(tl.int32)
    rank += (a > 5.0).to(tl.int32)
    if GGUF:
        rank += (a > 0.75).to(tl.int32) + (a > 1.75).to(tl.int32) + (a > 3.5).to(tl.int32)
        negative = (x < 0) & (rank > 0)
    else:
        rank += (a >= 0.75).to(tl.int32) + (a >= 1.75).to(tl.int32) + (a >= 3.5).to(tl.int32)
        negative = x < 0
    return rank | tl.where(negative, 8, 0)


# ---- bitsandbytes' books -------------------------------------------------------------------------


@triton.jit
def book_value(code, FP4: tl.constexpr):
    """Return float32 of a code."""
    value = tl.zeros(code.shape, tl.float32)
    if FP4:
        for k in tl.static_range(1, 8):
            value = tl.where((code & 7) == k, FP4_MAGNITUDES[k], value)
        value = with_sign(value, (code & 8) << 28)
    else:
        for k in tl.static_range(16):
            value = tl.where(code == k, NF4_VALUES[k], value)
    return value


@triton.jit
def book_code(s, FP4: tl.constexpr, BY_MAGNITUDE: tl.constexpr):
    """Return int32 codes of values scaled to [-1, 1]: midpoints strictly below are counted.

    BY_MAGNITUDE: FP4 as the CUDA kernel codes it: ties towards zero, and a negative zero keeps its sign.
    """
    rank = tl.zeros(s.shape, tl.int32)
    if FP4 and BY_MAGNITUDE:
        for k in tl.static_range(7):
            rank += (tl.abs(s) > FP4_THRESHOLDS[k]).to(tl.int32)
        code = tl.where(s < 0, 8, 0) | (rank ^ ((rank & 2) << 1))
    elif FP4:
        for k in tl.static_range(15):
            rank += (s > FP4_MIDPOINTS[k]).to(tl.int32)
        # Ranks 7 and 8 are the two zeros, of which 0 sorts before -0 (code 8).
        magnitude = tl.where(rank < 8, 7 - rank, rank - 8)
        code = tl.where((rank < 7) | (rank == 8), 8, 0) | (magnitude ^ ((magnitude & 2) << 1))
    else:
        for k in tl.static_range(15):
            rank += (s > NF4_MIDPOINTS[k]).to(tl.int32)
        code = rank
    return code


# ---- scales of groups ----------------------------------------------------------------------------


@triton.jit
def nvfp4_scale(code, divisor):
    """Return float32 of NVFP4's scale. divisor: float32, of the tensor."""
    return divide(e4m3_value(code), divisor, False)


@triton.jit
def mx_exponent(peak, OCP: tl.constexpr):
    """Return int32: E8M0 of a block's scale, by its largest magnitude.

    That comes to lie in [4, 8), by the OCP's rule; or, as compressed-tensors has it, in [3.5, 7).
    """
    bits = peak.to(tl.int32, bitcast=True)
    if not OCP:
        bits += 1 << 21
    return tl.maximum((bits >> 23) - 2, 0)


@triton.jit
def mx_reciprocal(exponent):
    """Return float32 2**(127 - exponent), exponent <= 254."""
    bits = tl.where(exponent == 254, 0x00400000, (254 - exponent) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def reciprocal_or_zero(x):
    """Return 1 / x; 0 of 0."""
    one = tl.full(x.shape, 1.0, tl.float32)
    return tl.where(x != 0, divide(one, x, False), 0.0)
