// Scales, words and rows in memory.
#pragma once
#include "core/four_bit/elements.hpp"

namespace fastmerge {
namespace FM_ISA {

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
            const uint32_t exponent = u >> 23 & 0xffu, mantissa = u & 0x7fffffu;
            const uint32_t up = exponent + (mantissa > (exponent == 0 ? 0x400000u : 0u));
            *p = uint8_t(up > 254 ? 254 : up);
            break;
        }
        default:
            *p = uint8_t(s);
    }
    return load_scale(scales, t, i);
}

/// a / b, both not negative: a GPU divides 64-bit numbers in a hundred instructions, 32-bit ones in twenty.
FM_EACH int64_t quotient(int64_t a, int64_t b) {
    return (uint64_t(a) | uint64_t(b)) >> 32 ? a / b : int64_t(uint32_t(a) / uint32_t(b));
}

// ---- rows ------------------------------------------------------------------------------------------------

/// Where row r lies, counted from the row of `origin`. A rotary head's rows [2, head / 2] are stored
/// [head / 2, 2].
FM_HD inline int64_t stored_row(const Coded& c, int64_t r) {
    const int64_t from = quotient(c.origin, c.cols);
    if (c.rotary == 0) return r - from;
    const int64_t half = c.rotary / 2, in_head = r % c.rotary;
    return r - in_head + in_head % half * 2 + in_head / half - from;
}

FM_HD inline int64_t group_size(const Coded& c) {
    return c.group ? c.group : c.cols;
}

FM_HD inline int64_t groups_of_row(const Coded& c) {
    return quotient(c.cols + group_size(c) - 1, group_size(c));
}

/// body(group number, at, n, out) for pieces of [at, at + m) of one group each.
template <class Body>
FM_EACH void visit_groups(int64_t group, int64_t at, int m, float* out, const Body& body) {
    int64_t number = at / group, left = group - at % group;
    for (; m > 0; ++number, left = group) {
        const int n = left < m ? int(left) : m;
        body(number, at, n, out);
        at += n, m -= n, out += n;
    }
}

}  // namespace FM_ISA
}  // namespace fastmerge
