// Vectors as wide as the instruction set's registers, through the compiler's vector extension (gcc, clang).
//
// Only for loops that keep several running values in registers, which automatic vectorisation gives up on.
// Every operation is lane by lane, so width never shows in a result. Intrinsics stay in this file and in
// core/four_bit/lanes.hpp.
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

struct TwoLongs {
    Longs first, second;
};

/// a0 b0 a1 b1 ...
inline TwoLongs interleave(Longs a, Longs b) {
#if defined(__AVX512F__)
    const Longs first = {0, 8, 1, 9, 2, 10, 3, 11}, second = {4, 12, 5, 13, 6, 14, 7, 15};
    return {Longs(_mm512_permutex2var_epi64(__m512i(a), __m512i(first), __m512i(b))),
            Longs(_mm512_permutex2var_epi64(__m512i(a), __m512i(second), __m512i(b)))};
#elif defined(__AVX2__)
    const __m256i even = _mm256_unpacklo_epi64(__m256i(a), __m256i(b)),
                  odd = _mm256_unpackhi_epi64(__m256i(a), __m256i(b));
    return {Longs(_mm256_permute2x128_si256(even, odd, 0x20)),
            Longs(_mm256_permute2x128_si256(even, odd, 0x31))};
#else
    return {Longs{a[0], b[0]}, Longs{a[1], b[1]}};
#endif
}

inline uint32_t sum_lanes(Words w) {
    uint32_t total = 0;
    for (int j = 0; j < LANES; ++j) total += w[j];
    return total;
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

inline Words most(Words a, Words b) {
#if defined(__AVX512F__)
    return Words(_mm512_maskz_max_epu32(0xffff, __m512i(a), __m512i(b)));
#else
    return a > b ? a : b;
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

// ---- picks: one truth per lane -------------------------------------------------------------------------

// Masks have registers of their own in AVX-512, which the compiler's vector extension does not know of: it
// would make vectors of them and back.
#if defined(__AVX512F__)
typedef __mmask16 Picks;
inline Picks above(Ints a, Ints b) {
    return _mm512_cmpgt_epi32_mask(__m512i(a), __m512i(b));
}
inline Picks not_above(Ints a, Ints b) {
    return _mm512_cmple_epi32_mask(__m512i(a), __m512i(b));
}
inline Picks positive(Floats x) {
    return _mm512_cmp_ps_mask(__m512(x), _mm512_setzero_ps(), _CMP_GT_OQ);
}
inline Picks zero_lanes(Floats x) {
    return _mm512_cmp_ps_mask(__m512(x), _mm512_setzero_ps(), _CMP_EQ_OQ);
}
inline Picks below(Floats a, Floats b) {
    return _mm512_cmp_ps_mask(__m512(a), __m512(b), _CMP_LT_OQ);
}
/// Neither zero nor positive: negative, or NaN.
inline Picks negative(Floats x) {
    return _mm512_cmp_ps_mask(__m512(x), _mm512_setzero_ps(), _CMP_NGE_UQ);
}
/// Lanes of vector v of a block whose 64 truths are `bits`.
inline Picks picks_of(uint64_t bits, int v) {
    return Picks(bits >> (v * LANES));
}
inline uint64_t bits_of(Picks p, int v) {
    return uint64_t(p) << (v * LANES);
}
inline Floats where(Picks p, Floats a, Floats b) {
    return Floats(_mm512_mask_blend_ps(p, __m512(b), __m512(a)));
}
/// x where picked, else +0.
inline Floats only(Picks p, Floats x) {
    return Floats(_mm512_maskz_mov_ps(p, __m512(x)));
}
/// sum + x where picked, else sum: the same as adding +0, as no sum is ever -0.
inline Floats add_where(Floats sum, Picks p, Floats x) {
    return Floats(_mm512_mask_add_ps(__m512(sum), p, __m512(sum), __m512(x)));
}
inline Words count_where(Words count, Picks p) {
    return Words(_mm512_mask_add_epi32(__m512i(count), p, __m512i(count), _mm512_set1_epi32(1)));
}
inline Picks both(Picks a, Picks b) {
    return Picks(a & b);
}
#else
typedef Ints Picks;
inline Picks above(Ints a, Ints b) {
    return a > b;
}
inline Picks not_above(Ints a, Ints b) {
    return a <= b;
}
inline Picks positive(Floats x) {
    return x > Floats{};
}
inline Picks zero_lanes(Floats x) {
    return x == Floats{};
}
inline Picks below(Floats a, Floats b) {
    return a < b;
}
inline Picks negative(Floats x) {
    return ~(x >= Floats{});
}
inline Picks picks_of(uint64_t bits, int v) {
    Ints lane;
    for (int j = 0; j < LANES; ++j) lane[j] = 1 << j;
    return ((Ints{} + int32_t(bits >> (v * LANES) & ((1u << LANES) - 1))) & lane) != Ints{};
}
inline uint64_t bits_of(Picks p, int v) {
    uint64_t bits = 0;
#if defined(__AVX2__)
    bits = uint32_t(_mm256_movemask_ps(__m256(p)));
#elif defined(__SSE2__)
    bits = uint32_t(_mm_movemask_ps(__m128(p)));
#else
    for (int j = 0; j < LANES; ++j) bits |= uint64_t(p[j] & 1) << j;
#endif
    return bits << (v * LANES);
}
inline Floats where(Picks p, Floats a, Floats b) {
    return p ? a : b;
}
inline Floats only(Picks p, Floats x) {
    return Floats(Ints(x) & p);
}
inline Floats add_where(Floats sum, Picks p, Floats x) {
    return sum + only(p, x);
}
inline Words count_where(Words count, Picks p) {
    return count - Words(p);
}
inline Picks both(Picks a, Picks b) {
    return a & b;
}
#endif

/// Words at table[index[0]], table[index[1]], ...
inline Words gather(const uint32_t* table, const uint32_t* index) {
#if defined(__AVX512F__)
    const __m512i at = _mm512_loadu_si512(index);
    return Words(_mm512_mask_i32gather_epi32(_mm512_setzero_si512(), 0xffff, at, table, 4));
#else
    Words words;
    for (int j = 0; j < LANES; ++j) words[j] = table[index[j]];
    return words;
#endif
}

/// Bit j is set iff half-word j is below the threshold, 0 < threshold <= 65535.
inline uint64_t halves_below(TwoLongs x, uint32_t threshold) {
#if defined(__AVX512BW__)
    const __m512i t = _mm512_set1_epi16(short(threshold));
    return uint64_t(_mm512_cmplt_epu16_mask(__m512i(x.first), t)) |
           uint64_t(_mm512_cmplt_epu16_mask(__m512i(x.second), t)) << 32;
#elif defined(__AVX2__)
    const __m256i a = __m256i(x.first), b = __m256i(x.second), top = _mm256_set1_epi16(short(threshold - 1));
    const __m256i below_a = _mm256_cmpeq_epi16(_mm256_min_epu16(a, top), a),
                  below_b = _mm256_cmpeq_epi16(_mm256_min_epu16(b, top), b);
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(below_a, below_b), 0xd8);
    return uint32_t(_mm256_movemask_epi8(bytes));
#else
    uint16_t half[sizeof x / 2];
    memcpy(half, &x, sizeof x);
    uint64_t bits = 0;
    for (size_t j = 0; j < sizeof x / 2; ++j) bits |= uint64_t(half[j] < threshold) << j;
    return bits;
#endif
}

// ---- doubles: a vector of floats makes two -------------------------------------------------------------

typedef double Doubles __attribute__((vector_size(WIDE)));

struct TwoDoubles {
    Doubles low, high;
};

inline TwoDoubles to_doubles(Floats x) {
#if defined(__AVX512F__)
    const __m256 low = _mm512_maskz_extractf32x8_ps(0xff, __m512(x), 0),
                 high = _mm512_maskz_extractf32x8_ps(0xff, __m512(x), 1);
    return {Doubles(_mm512_maskz_cvtps_pd(0xff, low)), Doubles(_mm512_maskz_cvtps_pd(0xff, high))};
#else
    typedef float Part __attribute__((vector_size(WIDE / 2)));
    Part part[2];
    memcpy(part, &x, sizeof x);
    return {__builtin_convertvector(part[0], Doubles), __builtin_convertvector(part[1], Doubles)};
#endif
}

/// sum + x where picked, else sum: the same as adding +0, as no sum is ever -0.
inline void add_where(Doubles* sum, Picks p, TwoDoubles x) {
#if defined(__AVX512F__)
    sum[0] = Doubles(_mm512_mask_add_pd(__m512d(sum[0]), __mmask8(p), __m512d(sum[0]), __m512d(x.low)));
    sum[1] = Doubles(_mm512_mask_add_pd(__m512d(sum[1]), __mmask8(p >> 8), __m512d(sum[1]), __m512d(x.high)));
#else
    typedef int32_t Part __attribute__((vector_size(WIDE / 2)));
    typedef int64_t Mask __attribute__((vector_size(WIDE)));
    Part part[2];
    memcpy(part, &p, sizeof p);
    sum[0] += Doubles(Mask(x.low) & __builtin_convertvector(part[0], Mask));
    sum[1] += Doubles(Mask(x.high) & __builtin_convertvector(part[1], Mask));
#endif
}

// ---- stores --------------------------------------------------------------------------------------------

/// As float_to_bf16.
inline Halves to_bf16(Floats x) {
    const Words u = Words(x);
    const Words rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const Words nan = ((u >> 16) & 0x8000u) | 0x7fc0u;
    const Words out = Ints(u & 0x7fffffffu) > 0x7f800000 ? nan : rounded;
#if defined(__AVX512F__)
    return Halves(_mm512_maskz_cvtepi32_epi16(0xffff, __m512i(out)));
#else
    return __builtin_convertvector(out, Halves);
#endif
}

}  // namespace FM_ISA
}  // namespace fastmerge
