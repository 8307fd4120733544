"""Every format of coded tensors once more, in plain numpy from its definition: slow, and sharing nothing.

`encode` returns bytes by slot as fastmerge/coding.py names them; quant_oracle_values.py decodes. Every
float32 operation of a definition is one numpy operation; what is exact is done in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastmerge.coding import Coding, Format, ScaleType
from fastmerge.dtypes import DType

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Slots = dict[str, Bytes]
f32 = np.float32

NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0], f32)  # fmt: skip
FP4_HALF = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], f32) / f32(12)
FP4 = np.concatenate([FP4_HALF, -FP4_HALF])
E2M1_HALF = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], f32)
E2M1 = np.concatenate([E2M1_HALF, -E2M1_HALF])
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def in_type(x: Any, dtype: DType) -> Any:
    """Round float32 to nearest even of `dtype`."""
    if dtype is DType.F32:
        return np.asarray(x, f32)
    if dtype is DType.F16:
        return np.asarray(x, f32).astype(np.float16).astype(f32)
    u = np.asarray(x, f32).view(np.uint32).astype(np.uint64)
    kept = (u >> 16) & 1
    return ((u + 0x7FFF + kept) & 0xFFFF0000).astype(np.uint32).view(f32)


def as_bytes(a: Any) -> Bytes:
    return np.frombuffer(np.ascontiguousarray(a).tobytes(), np.uint8).copy()


def e4m3_of(x: Any) -> Bytes:
    """Codes, saturating at 448."""
    inside = np.clip(np.asarray(x, f32), f32(-448), f32(448))
    codes = torch.from_numpy(np.atleast_1d(inside)).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes.numpy().reshape(inside.shape)


def e4m3_value(codes: Any) -> Floats:
    a = np.atleast_1d(np.asarray(codes, np.uint8))
    return torch.from_numpy(a.copy()).view(torch.float8_e4m3fn).float().numpy()


def nibbles(codes: Any, high_first: bool) -> Bytes:
    a = np.asarray(codes, np.uint8).reshape(-1, 2)
    first, second = (a[:, 0], a[:, 1]) if not high_first else (a[:, 1], a[:, 0])
    return (first | second << 4).astype(np.uint8)


def error_of(difference: Floats) -> np.float32:
    """Sum of squares in 16 running sums, folded as a tree."""
    sums = np.zeros(16, f32)
    for j, d in enumerate(difference.reshape(-1)):
        sums[j % 16] += f32(d) * f32(d)
    for width in (8, 4, 2, 1):
        sums[:width] += sums[width : 2 * width]
    return sums[0]


def best_of(candidates: list[Any], decoded: Callable[[Any], Floats], x: Floats) -> Any:
    """The first of the candidates with the least error."""
    best, least = candidates[0], error_of(decoded(candidates[0]) - x)
    for candidate in candidates[1:]:
        e = error_of(decoded(candidate) - x)
        if e < least:
            best, least = candidate, e
    return best


def clips(parts: range, of: int, search: bool) -> list[np.float32]:
    return [f32(1), *(f32(k) / f32(of) for k in parts)] if search else [f32(1)]


INTEGER_CLIPS = functools.partial(clips, range(28, 41), 40)


# ---- bitsandbytes --------------------------------------------------------------------------------


def bnb_codes(c: Coding, s: Floats) -> Any:
    book = NF4 if c.format is Format.BNB_NF4 else FP4
    if c.other_rule and book is FP4:
        cuts = np.array([0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333,
                         0.8333333], f32)  # fmt: skip
        by_rank = np.array([0, 1, 6, 7, 4, 5, 2, 3])
        rank = (np.abs(s)[..., None] > cuts).sum(-1)
        return by_rank[rank] | np.where(s < 0, 8, 0)
    order = np.argsort(book, kind="stable")
    middle = (book[order][:-1] + book[order][1:]) / f32(2)
    return order[(s[..., None] > middle).sum(-1)]


def bnb_block(c: Coding, x: Floats) -> tuple[Any, np.float32]:
    """Codes and what is stored as the largest magnitude of one block."""
    book = NF4 if c.format is Format.BNB_NF4 else FP4
    short = len(x) < c.group and not c.other_rule

    def coded(peak: np.float32) -> Any:
        floor = peak if c.other_rule else max(peak, f32(1e-38))
        return bnb_codes(c, x / floor if short else x * (f32(1) / floor))

    peak = np.abs(x).max()
    clip = best_of(
        clips(range(30, 56), 50, c.search), lambda k: book[coded(peak * k)] * (peak * k), x
    )
    stored = peak * clip
    return coded(stored), max(stored, f32(1e-38)) if short else stored


def bnb(c: Coding, x: Floats) -> Slots:
    flat = x.reshape(-1)
    codes, scales = [], []
    for first in range(0, len(flat), c.group):
        q, peak = bnb_block(c, flat[first : first + c.group])
        codes += list(q)
        scales.append(peak)
        if len(codes) % 2:
            zero = f32(0) * (f32(1) / peak) if c.other_rule else f32(0)
            codes.append(bnb_codes(c, np.array([zero], f32))[0])
    return {"codes": nibbles(codes, True), "scales": as_bytes(np.array(scales, f32))}


def dynamic_map() -> Floats:
    """As bitsandbytes makes it, in torch's float32."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        means = (edges[:-1] + edges[1:]) / 2
        positive = ((10 ** (-6 + i)) * means).tolist()
        values += positive + [-v for v in positive]
    return np.sort(np.array(values, f32))


def nested_codes(absmax: Floats, offset: np.float32, table_rule: bool) -> tuple[Bytes, Floats]:
    book = dynamic_map()
    middle = (book[:-1] + book[1:]) / f32(2)
    codes, peaks = [], []
    for first in range(0, len(absmax), 256):
        d = absmax[first : first + 256] - offset
        peak = np.abs(d).max()
        peaks.append(peak)
        s = np.clip(d * (f32(1) / peak), -1, 1) if peak > 0 else np.zeros_like(d)
        if table_rule:
            bins = np.trunc((s + f32(1)) * f32(0.5) * f32(65535) + f32(0.5)).astype(f32)
            s = f32(-1) + f32(2) * bins / f32(65535)
        q = (s[:, None] > middle).sum(1)
        codes += list(q if peak > 0 or not table_rule else q * 0)
    return np.array(codes, np.uint8), np.array(peaks, f32)


# ---- compressed-tensors int4 ---------------------------------------------------------------------

EPSILON = {DType.F32: 1.1920929e-07, DType.BF16: 0.0078125, DType.F16: 0.0009765625}


def groups(x: Floats, group: int) -> Iterator[tuple[int, int, slice]]:
    rows, cols = x.shape
    for r in range(rows):
        for g, first in enumerate(range(0, cols, group or cols)):
            yield r, g, slice(first, min(cols, first + (group or cols)))


def int4(c: Coding, x: Floats) -> Slots:
    t = functools.partial(in_type, dtype=c.dtype)
    rows, cols = x.shape
    n_groups = -(-cols // (c.group or cols))
    codes = np.zeros((rows, -(-cols // 8) * 8), np.uint8)
    scales, zeros = np.zeros((rows, n_groups), f32), np.zeros((-(-rows // 8) * 8, n_groups), int)
    for r, g, at in groups(x, c.group):
        w = x[r, at]
        low, high = min(w.min(), f32(0)), max(w.max(), f32(0))

        def parameters(
            clip: np.float32, low: Any = low, high: Any = high
        ) -> tuple[np.float32, np.float32]:
            mn, mx = t(low * clip), t(high * clip)
            z = f32(0)
            if c.symmetric:
                s = t(max(-mn, mx) / f32(7.5))
            else:
                s = t(t(mx - mn) / f32(15))
                z = t(f32(-8) - t(mn / s))
                z = f32(0) if np.isnan(z) else np.rint(np.clip(z, f32(-8), f32(7)))
            return (f32(EPSILON[c.dtype]) if s == 0 else s), z

        def code(p: tuple[np.float32, np.float32], w: Floats = w) -> Floats:
            wide = c.other_rule and c.dtype is DType.BF16
            step = (lambda v: np.asarray(v, f32)) if wide else t
            v = step(step(w / p[0]) + p[1])
            return np.rint(np.clip(v, f32(-8), f32(7)))

        options = [parameters(k) for k in INTEGER_CLIPS(c.search)]
        s, z = best_of(options, lambda p: t((code(p) - p[1]) * p[0]), w)
        codes[r, at] = code((s, z)) + 8
        scales[r, g], zeros[r, g] = s, z + 8
    packed = np.zeros((rows, codes.shape[1] // 8), np.uint32)
    packed_zeros = np.zeros((len(zeros) // 8, n_groups), np.uint32)
    for i in range(8):
        packed |= codes[:, i::8].astype(np.uint32) << np.uint32(4 * i)
        packed_zeros |= zeros[i::8].astype(np.uint32) << np.uint32(4 * i)
    slots = {"codes": as_bytes(packed), "scales": scale_bytes(c.scale, scales)}
    return slots if c.symmetric else {**slots, "zeros": as_bytes(packed_zeros)}


def scale_bytes(kind: ScaleType, scales: Floats) -> Bytes:
    if kind is ScaleType.F16:
        return as_bytes(scales.astype(np.float16))
    if kind is ScaleType.BF16:
        return as_bytes((in_type(scales, DType.BF16).view(np.uint32) >> 16).astype(np.uint16))
    return as_bytes(scales.astype(f32))


# ---- GPTQ and AWQ --------------------------------------------------------------------------------


def words(c: Coding, x: Floats) -> Slots:
    rows, cols = x.shape
    n_groups = -(-cols // (c.group or cols))
    codes = np.zeros((rows, cols), np.uint32)
    scales, zeros = np.zeros((n_groups, rows), np.float16), np.zeros((n_groups, rows), np.uint32)
    for r, g, at in groups(x, c.group):
        w = x[r, at]
        low, high = min(w.min(), f32(0)), max(w.max(), f32(0))

        def parameters(clip: np.float32, low: Any = low, high: Any = high) -> tuple[Any, Any, Any]:
            mn, mx = low * clip, high * clip
            span = f32(2) * max(-mn, mx) if c.symmetric else mx - mn
            s = max(span, f32(1e-5)) / f32(15)
            least = f32(1 if c.format is Format.GPTQ else 0)
            z = f32(8) if c.symmetric else np.rint(np.clip(-mn / s, least, f32(15)))
            return s, s.astype(np.float16).astype(f32), z

        def code(p: tuple[Any, Any, Any], w: Floats = w) -> Floats:
            s, s16, z = p
            return np.rint(np.clip((w + z * s) / s16, f32(0), f32(15)))

        options = [parameters(k) for k in INTEGER_CLIPS(c.search)]
        best = best_of(options, lambda p: (code(p) - p[2]) * p[1], w)
        codes[r, at] = code(best).astype(np.uint32)
        scales[g, r], zeros[g, r] = best[0], int(best[2]) - (1 if c.v1 else 0)
    awq = c.format is Format.AWQ
    order = AWQ_ORDER if awq else range(8)
    qzeros = np.zeros((n_groups, rows // 8), np.uint32)
    qweight = np.zeros((cols, rows // 8) if awq else (cols // 8, rows), np.uint32)
    for j, of in enumerate(order):
        qzeros |= zeros[:, of::8] << np.uint32(4 * j)
        qweight |= (codes.T[:, of::8] if awq else codes.T[of::8]) << np.uint32(4 * j)
    return {"codes": as_bytes(qweight), "scales": as_bytes(scales), "zeros": as_bytes(qzeros)}


# ---- microscaling --------------------------------------------------------------------------------


def e2m1_codes(v: Floats, gguf: bool) -> Any:
    """Nearest magnitude; ties to the even code, of GGUF to the lower."""
    distance = np.abs(np.abs(v.astype(np.float64))[..., None] - E2M1_HALF.astype(np.float64))
    distance = np.where(np.isnan(distance), np.inf, distance)
    least = distance == distance.min(-1, keepdims=True)
    k = np.arange(8)
    rank = np.where(least, k if gguf else (k % 2) * 8 + k, 99)
    code = rank.argmin(-1)
    return code | np.where((v < 0) & ((code > 0) | (not gguf)), 8, 0)


def power_of_two(e: int) -> np.float32:
    return f32(np.ldexp(1.0, e))


def mx_exponent(peak: np.float32, ocp: bool) -> int:
    """floor(log2 peak) - 2 + 127, the mantissa cut; else 1.75 and more counts as the next power."""
    if peak < np.finfo(f32).tiny:
        return 0
    mantissa, exponent = np.frexp(np.float64(peak))  # in [0.5, 1)
    up = not ocp and mantissa >= 0.875
    return max(0, int(exponent) - 1 + int(up) - 2 + 127)


def mx_block(x: Floats, ocp: bool, search: bool, gguf: bool) -> tuple[int, Any]:
    e = mx_exponent(np.abs(x).max(), ocp or search)

    def code(e: int) -> Any:
        return e2m1_codes((x.astype(np.float64) / np.ldexp(1.0, e - 127)).astype(f32), gguf)

    options = [e, e + 1] if search else [e]
    best = best_of(options, lambda k: E2M1[code(k)] * power_of_two(k - 127), x)
    return best, code(best)


def mxfp4(c: Coding, x: Floats) -> Slots:
    codes, scales = np.zeros(x.shape, np.uint8), []
    for r, _, at in groups(x, c.group):
        e, codes[r, at] = mx_block(x[r, at], c.other_rule, c.search, False)
        scales.append(e)
    return {"codes": nibbles(codes, False), "scales": np.array(scales, np.uint8)}


def nvfp4_divisor(dtype: DType, peak: np.float32) -> np.float32:
    g = in_type(in_type(f32(1) / peak, dtype) * f32(2688), dtype)
    return f32(1) if not np.isfinite(g) else f32(g)


def nvfp4(c: Coding, x: Floats) -> Slots:
    g = nvfp4_divisor(c.dtype, np.abs(x).max())
    codes, scales = np.zeros(x.shape, np.uint8), []
    for r, _, at in groups(x, c.group):
        w = x[r, at]
        peak = np.abs(w).max()

        def stored(target: int, peak: np.float32 = peak) -> int:
            code = int(e4m3_of(g * in_type(peak / f32(target), c.dtype)))
            return code or 0x20

        def step(code: int) -> np.float32:
            return f32(e4m3_value(code)[0] / g)

        def code(s: int, w: Floats = w) -> Any:
            return e2m1_codes(np.clip(w / step(s), f32(-6), f32(6)), False)

        options = [stored(6), stored(4)] if c.search else [stored(6)]
        best = best_of(options, lambda s: E2M1[code(s)] * step(s), w)
        codes[r, at] = code(best)
        scales.append(best)
    return {"codes": nibbles(codes, False), "scales": np.array(scales, np.uint8)}


# ---- GGUF ----------------------------------------------------------------------------------------


def halves(codes: Any) -> Bytes:
    q = np.asarray(codes, np.uint8)
    return (q[:16] | q[16:] << 4).astype(np.uint8)


def inverse(d: np.float32) -> np.float32:
    return f32(1) / d if d != 0 else f32(0)


def truncated(v: Floats) -> Floats:
    return np.where(np.isnan(v), 0, np.trunc(np.clip(v, 0, 15)))


def q4_0(c: Coding, x: Floats) -> Bytes:
    peak = f32(0)
    for v in x:
        if abs(v) > abs(peak):
            peak = v

    def code(d: np.float32) -> Floats:
        return truncated(x * inverse(d) + f32(8.5))

    options = [peak * k / f32(-8) for k in INTEGER_CLIPS(c.search)]
    d = best_of(options, lambda d: (code(d) - 8).astype(f32) * in_type(d, DType.F16), x)
    return np.concatenate([as_bytes(d.astype(np.float16)), halves(code(d))])


def q4_1(c: Coding, x: Floats) -> Bytes:
    low, high = x[0], x[0]
    for v in x:
        low, high = (v if v < low else low), (v if v > high else high)
    whole = (high - low) / f32(15)

    def parameters(clip: np.float32) -> tuple[np.float32, np.float32]:
        m = low + whole * (f32(1) - clip) * f32(7.5) if clip < 1 else low
        return whole * clip, m

    def code(p: tuple[np.float32, np.float32]) -> Floats:
        return truncated((x - p[1]) * inverse(p[0]) + f32(0.5))

    def decoded(p: tuple[np.float32, np.float32]) -> Floats:
        return code(p).astype(f32) * in_type(p[0], DType.F16) + in_type(p[1], DType.F16)

    d, m = best_of([parameters(k) for k in INTEGER_CLIPS(c.search)], decoded, x)
    stored = np.array([d, m], f32).astype(np.float16)
    return np.concatenate([as_bytes(stored), halves(code((d, m)))])


def q8_0(c: Coding, x: Floats) -> Bytes:
    d = np.abs(x).max() / f32(127)
    v = np.clip(x * inverse(d), f32(-127), f32(127)).astype(np.float64)
    v = np.where(np.isnan(v), -127, v)
    q = np.trunc(v + np.copysign(0.5, v)).astype(np.int8)
    return np.concatenate([as_bytes(d.astype(np.float16)), q.view(np.uint8)])


def gguf_mxfp4(c: Coding, x: Floats) -> Bytes:
    e, codes = mx_block(x, True, c.search, True)
    return np.concatenate([np.array([e], np.uint8), halves(codes)])


def q4_k(c: Coding, x: Floats) -> Bytes:
    scale, low, codes = zip(*(q4_k_sub(s) for s in x.reshape(8, 32)), strict=True)
    most, deepest = max(f32(0), *scale), max(f32(0), *(-m for m in low))
    by_scale = f32(63) / most if most > 0 else f32(0)
    by_low = f32(63) / deepest if deepest > 0 else f32(0)
    ls, lm = [six_bits(by_scale * s) for s in scale], [six_bits(by_low * -m) for m in low]
    d, dmin = np.float16(most / f32(63)), np.float16(deepest / f32(63))
    final = []
    for s, sub in enumerate(x.reshape(8, 32)):
        step, base = f32(d) * f32(ls[s]), f32(dmin) * f32(lm[s])
        anew = np.clip(np.rint((sub + base) / step), 0, 15)
        final.append(anew if step != 0 else codes[s])
    packed = [ls[j] | (ls[j + 4] >> 4) << 6 for j in range(4)]
    packed += [lm[j] | (lm[j + 4] >> 4) << 6 for j in range(4)]
    packed += [(ls[j + 4] & 15) | (lm[j + 4] & 15) << 4 for j in range(4)]
    q = np.array(final).astype(np.uint8).reshape(4, 2, 32)
    return np.concatenate(
        [
            as_bytes(np.array([d, dmin])),
            np.array(packed, np.uint8),
            (q[:, 0] | q[:, 1] << 4).ravel(),
        ]
    )


def six_bits(v: np.float32) -> int:
    return min(63, int(np.rint(v)) % 256) if np.isfinite(v) else 0


def total(terms: Floats) -> np.float32:
    """One after the other."""
    return f32(np.add.accumulate(terms.astype(f32), dtype=f32)[-1])


def q4_k_sub(x: Floats) -> tuple[np.float32, np.float32, Floats]:
    """Scale, least value and codes of a sub-block."""
    weight = np.sqrt(total(x * x) / f32(32)) + np.abs(x)
    low, high = min(x.min(), f32(0)), x.max()
    if low == high or (low == 0 and high <= 0):
        return f32(0), low, np.zeros(32, f32)
    sum_w, sum_x = total(weight), total(weight * x)

    def grid(step: np.float32, low: np.float32) -> Floats:
        v = step * (x - low)
        return np.where(np.isnan(v), 0, np.clip(np.rint(v), 0, 15)).astype(f32)

    def error(scale: np.float32, low: np.float32, q: Floats) -> np.float32:
        d = scale * q + low - x
        return total(weight * (d * d))

    step = f32(15) / (high - low)
    scale, codes = f32(1) / step, grid(step, low)
    best = error(scale, low, codes)
    for k in range(21):
        q = grid((f32(-1) + f32(0.1) * f32(k) + f32(15)) / (high - low), low)
        l1, l2, xl = total(weight * q), total(weight * q * q), total(weight * q * x)
        determinant = sum_w * l2 - l1 * l1
        if not determinant > 0:
            continue
        this_scale = (sum_w * xl - sum_x * l1) / determinant
        this_low = (l2 * sum_x - l1 * xl) / determinant
        if this_low > 0:
            this_low, this_scale = f32(0), xl / l2
        e = error(this_scale, this_low, q)
        if e < best:
            best, scale, low, codes = e, this_scale, this_low, q
    return scale, low, codes


GGUF: dict[Format, tuple[int, Callable[[Coding, Floats], Bytes]]] = {
    Format.Q4_0: (32, q4_0),
    Format.Q4_1: (32, q4_1),
    Format.Q8_0: (32, q8_0),
    Format.Q4_K: (256, q4_k),
    Format.GGUF_MXFP4: (32, gguf_mxfp4),
}


def gguf(c: Coding, x: Floats) -> Slots:
    size, block = GGUF[c.format]
    order = np.arange(len(x))
    if c.rotary:
        heads = order.reshape(-1, 2, c.rotary // 2)
        order = heads.swapaxes(1, 2).reshape(-1)
    return {"codes": np.concatenate([block(c, b) for b in x[order].reshape(-1, size)])}


# ---- FP8 -----------------------------------------------------------------------------------------


def fp8_scale(kind: ScaleType, peak: np.float32) -> tuple[np.float32, Bytes]:
    """The scale as it is stored, and its bytes."""
    s = peak / f32(448) if peak > 0 else f32(1)
    if kind is ScaleType.E8M0:
        exponent = int(np.ceil(np.log2(np.float64(s)))) if s else -127  # the quotient underflowed
        e = min(254, max(0, exponent + 127))
        return power_of_two(e - 127), np.array([e], np.uint8)
    stored = {ScaleType.F16: DType.F16, ScaleType.BF16: DType.BF16}.get(kind, DType.F32)
    return f32(in_type(s, stored)), scale_bytes(kind, np.array([s], f32))


def fp8(c: Coding, x: Floats) -> Slots:
    rows, cols = x.shape
    tall, wide = c.group_rows or rows, c.group or cols
    codes, scales = np.zeros(x.shape, np.uint8), []
    for r in range(0, rows, tall):
        for k in range(0, cols, wide):
            block = x[r : r + tall, k : k + wide]
            s, stored = fp8_scale(c.scale, np.abs(block).max())
            codes[r : r + tall, k : k + wide] = e4m3_of(block / s)
            scales.append(stored)
    return {"codes": codes.reshape(-1), "scales": np.concatenate(scales)}


def dense(c: Coding, x: Floats) -> Slots:
    order = np.arange(len(x))
    if c.rotary:
        order = order.reshape(-1, 2, c.rotary // 2).swapaxes(1, 2).reshape(-1)
    stored = x[order]
    if c.dtype is DType.F32:
        return {"codes": as_bytes(stored)}
    kind = ScaleType.F16 if c.dtype is DType.F16 else ScaleType.BF16
    return {"codes": scale_bytes(kind, stored)}


def encode(c: Coding, x: Floats) -> Slots:
    """Bytes of x [rows, cols], which is of the coding's type; double quantisation apart."""
    f = c.format
    with np.errstate(all="ignore"):
        if f in (Format.BNB_NF4, Format.BNB_FP4):
            return bnb(c, x)
        if f in (Format.GPTQ, Format.AWQ):
            return words(c, x)
        by_format = {
            Format.INT4: int4,
            Format.NVFP4: nvfp4,
            Format.MXFP4: mxfp4,
            Format.FP8: fp8,
            Format.DENSE: dense,
        }
        return by_format.get(f, gguf)(c, x)
