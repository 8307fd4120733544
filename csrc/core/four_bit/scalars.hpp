// What every format is made of: roundings, reductions over a group, scales in memory and nibbles in bytes.
//
// Branch-free where a loop runs over elements. A template parameter N is a trip count known when compiled;
// 0 where it is not. Every operation is rounded once: no result depends on the instruction set.
#pragma once
#include "core/four_bit/format.hpp"

namespace fastmerge {
namespace FM_ISA {

// A function of one element: loops over it vectorise only where it is inlined.
#if defined(__CUDACC__)
#define FM_EACH FM_HD __forceinline__
#define FM_EACH_LAMBDA
#else
#define FM_EACH __attribute__((always_inline)) inline
#define FM_EACH_LAMBDA __attribute__((always_inline))
#endif

/// Elements that loops over a group take at a time: with a constant trip count they vectorise.
constexpr int PIECE = 64;

template <int N>
FM_EACH int trips(int n) {
    return N ? N : n;
}

template <DType T>
FM_EACH float rounded_to(float x) {
    if constexpr (T == DType::F16) return half_to_float(float_to_half(x));
    if constexpr (T == DType::BF16) return bf16_to_float(float_to_bf16(x));
    return x;
}

FM_EACH float rounded_to(DType t, float x) {
    return t == DType::F16 ? rounded_to<DType::F16>(x) : t == DType::BF16 ? rounded_to<DType::BF16>(x) : x;
}

/// NaN becomes `low`.
FM_EACH float clamped(float x, float low, float high) {
    const float y = x > low ? x : low;
    return y < high ? y : high;
}

/// The nearest integer, halves to even. |x| < 2^22: the sum has no bits below one.
FM_EACH int32_t nearest_int(float x) {
    return bit_cast<int32_t>(x + 12582912.f) - 0x4b400000;
}

// ---- reductions: in integers, which vectorise and whose order never shows --------------------------------

FM_EACH int32_t magnitude_bits(float x) {
    return bit_cast<int32_t>(x) & 0x7fffffff;
}

/// Largest magnitude of n elements.
FM_HD inline float peak_of(const float* x, int64_t n) {
    int32_t peak = 0;
    for (; n >= PIECE; n -= PIECE, x += PIECE)
        for (int j = 0; j < PIECE; ++j) peak = magnitude_bits(x[j]) > peak ? magnitude_bits(x[j]) : peak;
    for (int j = 0; j < n; ++j) peak = magnitude_bits(x[j]) > peak ? magnitude_bits(x[j]) : peak;
    return bit_cast<float>(peak);
}

/// An integer with the order of x; -0 is below 0. Its own inverse.
FM_EACH int32_t ordered(int32_t bits) {
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

struct Range {
    float low, high;
};

FM_HD inline Range range_of(const float* x, int64_t n) {
    int32_t low = 0x7fffffff, high = -0x7fffffff - 1;
    const auto visit = [&](float v) {
        const int32_t key = ordered(bit_cast<int32_t>(v));
        low = key < low ? key : low, high = key > high ? key : high;
    };
    for (; n >= PIECE; n -= PIECE, x += PIECE)
        for (int j = 0; j < PIECE; ++j) visit(x[j]);
    for (int j = 0; j < n; ++j) visit(x[j]);
    return {bit_cast<float>(ordered(low)), bit_cast<float>(ordered(high))};
}

// ---- scales in memory ------------------------------------------------------------------------------------

FM_HD inline uint16_t load_half_word(const uint8_t* p) {
    uint16_t h;
    memcpy(&h, p, sizeof h);
    return h;
}

FM_HD inline void store_half_word(uint8_t* p, uint16_t h) {
    memcpy(p, &h, sizeof h);
}

FM_HD inline uint32_t load_word(const uint8_t* words, int64_t i) {
    uint32_t word;
    memcpy(&word, words + i * 4, sizeof word);
    return word;
}

FM_HD inline void store_word(uint8_t* words, int64_t i, uint32_t word) {
    memcpy(words + i * 4, &word, sizeof word);
}

/// E4M3: 4 exponent bits of bias 7, no infinities; 0x7f is NaN.
FM_EACH float e4m3_to_float(uint32_t code) {
    const float magnitude = bit_cast<float>((code & 0x7fu) << 20) * 1.329227995784916e36f;  // 2^120
    const uint32_t nan = (code & 0x7fu) == 0x7fu ? 0x7fc00000u : 0u;
    return bit_cast<float>(bit_cast<uint32_t>(magnitude) | nan | (code & 0x80u) << 24);
}

/// Nearest even; beyond 448 it saturates.
FM_EACH uint32_t float_to_e4m3(float x) {
    const uint32_t u = bit_cast<uint32_t>(x), sign = u >> 24 & 0x80u;
    uint32_t magnitude = u & 0x7fffffffu;
    const uint32_t nan = magnitude > 0x7f800000u ? 0x7fu : 0u;
    magnitude = magnitude > 0x43e00000u ? 0x43e00000u : magnitude;  // 448
    const uint32_t normal = (magnitude - 0x3c000000u + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20;
    // Below 2^-6 the steps are 2^-9: adding 2^14 rounds to them.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 16384.f) - 0x46800000u;
    return sign | nan | (magnitude < 0x3c800000u ? subnormal : normal);
}

/// E8M0: 2^(code - 127); 255 is NaN.
FM_EACH float e8m0_to_float(uint32_t code) {
    const uint32_t bits = code == 0 ? 0x00400000u : code == 255 ? 0x7fc00000u : code << 23;
    return bit_cast<float>(bits);
}

FM_HD inline int scale_size(ScaleType t) {
    return t == ScaleType::F32 ? 4 : t == ScaleType::F16 || t == ScaleType::BF16 ? 2 : 1;
}

FM_HD inline float load_scale(const uint8_t* scales, ScaleType t, int64_t i) {
    const uint8_t* p = scales + i * scale_size(t);
    float s;
    switch (t) {
        case ScaleType::F32:
            memcpy(&s, p, sizeof s);
            return s;
        case ScaleType::F16:
            return half_to_float(load_half_word(p));
        case ScaleType::BF16:
            return bf16_to_float(load_half_word(p));
        case ScaleType::E4M3:
            return e4m3_to_float(*p);
        case ScaleType::E8M0:
            return e8m0_to_float(*p);
        default:
            return float(*p);
    }
}

/// Store s rounded to the type (E8M0: up to a power of two) and return what was stored.
FM_HD inline float store_scale(uint8_t* scales, ScaleType t, int64_t i, float s) {
    uint8_t* p = scales + i * scale_size(t);
    const uint32_t u = bit_cast<uint32_t>(s);
    switch (t) {
        case ScaleType::F32:
            memcpy(p, &s, sizeof s);
            break;
        case ScaleType::F16:
            store_half_word(p, float_to_half(s));
            break;
        case ScaleType::BF16:
            store_half_word(p, float_to_bf16(s));
            break;
        case ScaleType::E4M3:
            *p = uint8_t(float_to_e4m3(s));
            break;
        case ScaleType::E8M0: {
            const uint32_t up = (u >> 23 & 0xffu) + ((u & 0x7fffffu) != 0);
            *p = uint8_t(up > 254 ? 254 : up);
            break;
        }
        default:
            *p = uint8_t(s);
    }
    return load_scale(scales, t, i);
}

// ---- nibbles ---------------------------------------------------------------------------------------------

/// Bytes of n codes; of an odd count the last nibble is `rest`.
template <bool HIGH_FIRST, int N>
FM_HD inline void pack_nibbles(const uint8_t* code, int n, uint8_t rest, uint8_t* bytes) {
    const int pairs = trips<N>(n) / 2;
    for (int j = 0; j < pairs; ++j) {
        const int a = code[2 * j], b = code[2 * j + 1];
        bytes[j] = uint8_t(HIGH_FIRST ? a << 4 | b : a | b << 4);
    }
    if (N == 0 && n % 2) {
        const int a = code[n - 1];
        bytes[pairs] = uint8_t(HIGH_FIRST ? a << 4 | rest : a | rest << 4);
    }
}

// ---- rows ------------------------------------------------------------------------------------------------

/// Where row r lies, counted from the row of `origin`. A rotary head's rows [2, head / 2] are stored
/// [head / 2, 2].
FM_HD inline int64_t stored_row(const Coded& c, int64_t r) {
    const int64_t from = c.origin / c.cols;
    if (c.rotary == 0) return r - from;
    const int64_t half = c.rotary / 2, in_head = r % c.rotary;
    return r - in_head + in_head % half * 2 + in_head / half - from;
}

FM_HD inline int64_t group_size(const Coded& c) {
    return c.group ? c.group : c.cols;
}

FM_HD inline int64_t groups_of_row(const Coded& c) {
    return (c.cols + group_size(c) - 1) / group_size(c);
}

template <int N>
struct Count {
    static constexpr int value = N;
};

/// body(Count) of n: constant where it is 64, 32 or 16.
template <class Body>
FM_EACH void with_count(int n, Body body) {
    if (n == 64) return body(Count<64>());
    if (n == 32) return body(Count<32>());
    if (n == 16) return body(Count<16>());
    body(Count<0>());
}

/// body(Count, group number, at, n, out) for pieces of [at, at + m) within one group each. The count is constant
/// where a piece of 64, 32 or 16 begins on a byte of nibbles.
template <class Body>
FM_EACH void visit_pieces(int64_t group, int64_t at, int m, float* out, Body body) {
    int64_t number = at / group, left = group - at % group;
    while (m > 0) {
        const int most = int(left < PIECE ? left : PIECE), n = most < m ? most : m;
        with_count(at % 2 == 0 ? n : 0, [&](auto count) { body(count, number, at, n, out); });
        at += n, m -= n, out += n, left -= n;
        number += left == 0, left = left == 0 ? group : left;
    }
}

}  // namespace FM_ISA
}  // namespace fastmerge
