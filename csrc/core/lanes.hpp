// Vectors as wide as the instruction set's registers, through the compiler's vector extension (gcc, clang).
//
// Only for loops that keep several running values in registers, which automatic vectorisation gives up on.
// Every operation is lane by lane, so width never shows in a result. Intrinsics stay in this file.
#pragma once
#include "core/types.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastmerge {
namespace FM_ISA {

#if defined(__AVX512F__)
constexpr int WIDE = 64;
#elif defined(__AVX2__)
constexpr int WIDE = 32;
#else
constexpr int WIDE = 16;
#endif
constexpr int LANES = WIDE / 4;

typedef float Floats __attribute__((vector_size(WIDE)));
typedef int32_t Ints __attribute__((vector_size(WIDE)));
typedef uint32_t Words __attribute__((vector_size(WIDE)));
typedef uint64_t Longs __attribute__((vector_size(WIDE)));
typedef uint16_t Halves __attribute__((vector_size(WIDE / 2)));

template <class V>
inline V read(const void* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}

inline Words widen(Halves h) {
#if defined(__AVX512F__)
    return Words(_mm512_maskz_cvtepu16_epi32(0xffff, __m256i(h)));  // gcc 12 makes two halves of it otherwise
#else
    return __builtin_convertvector(h, Words);
#endif
}

/// Elements [i, i + LANES) of an operand of type T, widened.
template <DType T>
inline Floats load_lanes(const void* p, int64_t i) {
    if constexpr (T == DType::F32) {
        return read<Floats>(static_cast<const float*>(p) + i);
    } else {
        const Words u = widen(read<Halves>(static_cast<const uint16_t*>(p) + i));
        if constexpr (T == DType::BF16) return Floats(u << 16);
        // As half_to_float.
        const Floats scaled = Floats((u & 0x7fffu) << 13) * 5.192296858534828e33f;
        const Words special = Words((u & 0x7c00u) == 0x7c00u) & 0x7f800000u;
        return Floats(Words(scaled) | special | ((u & 0x8000u) << 16));
    }
}

/// Products of the low 32 bits of each lane. (The unmasked 512-bit form warns in gcc 12.)
inline Longs multiply_low(Longs a, Longs b) {
#if defined(__AVX512F__)
    return Longs(_mm512_maskz_mul_epu32(0xff, __m512i(a), __m512i(b)));
#elif defined(__AVX2__)
    return Longs(_mm256_mul_epu32(__m256i(a), __m256i(b)));
#elif defined(__SSE2__)
    return Longs(_mm_mul_epu32(__m128i(a), __m128i(b)));
#else
    return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

/// Bit j is set iff keys[j] > bound, of 64 keys; keys and bound are below 2^31.
inline uint64_t greater_mask(const uint32_t* keys, uint32_t bound) {
    uint64_t mask = 0;
#if defined(__AVX512F__)
    const __m512i b = _mm512_set1_epi32(int(bound));
    for (int j = 0; j < 64; j += 16)
        mask |= uint64_t(_mm512_cmpgt_epi32_mask(_mm512_loadu_si512(keys + j), b)) << j;
#elif defined(__AVX2__)
    const __m256i b = _mm256_set1_epi32(int(bound));
    for (int j = 0; j < 64; j += 8) {
        const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + j));
        const int bits = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(x, b)));
        mask |= uint64_t(uint32_t(bits)) << j;
    }
#else
    for (int j = 0; j < 64; ++j) mask |= uint64_t(keys[j] > bound) << j;
#endif
    return mask;
}
inline uint64_t greater_mask(const uint64_t* keys, uint64_t bound) {
    uint64_t mask = 0;
    for (int j = 0; j < 64; ++j) mask |= uint64_t(keys[j] > bound) << j;
    return mask;
}

inline Words least(Words a, Words b) {
#if defined(__AVX512F__)
    return Words(_mm512_maskz_min_epu32(0xffff, __m512i(a), __m512i(b)));
#else
    return a < b ? a : b;
#endif
}

/// As greater_mask, of 64 keys in registers.
inline uint64_t lanes_above(const Words* keys, uint32_t bound) {
    uint64_t mask = 0;
    for (int v = 0; v < 64 / LANES; ++v) {
#if defined(__AVX512F__)
        const uint32_t bits = _mm512_cmpgt_epi32_mask(__m512i(keys[v]), _mm512_set1_epi32(int(bound)));
#elif defined(__AVX2__)
        const __m256i above = _mm256_cmpgt_epi32(__m256i(keys[v]), _mm256_set1_epi32(int(bound)));
        const uint32_t bits = uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(above)));
#elif defined(__SSE2__)
        const __m128i above = _mm_cmpgt_epi32(__m128i(keys[v]), _mm_set1_epi32(int(bound)));
        const uint32_t bits = uint32_t(_mm_movemask_ps(_mm_castsi128_ps(above)));
#else
        uint32_t bits = 0;
        for (int j = 0; j < LANES; ++j) bits |= uint32_t(keys[v][j] > bound) << j;
#endif
        mask |= uint64_t(bits) << (v * LANES);
    }
    return mask;
}

}  // namespace FM_ISA
}  // namespace fastmerge
