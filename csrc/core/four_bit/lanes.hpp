// Registers of elements and of 4-bit codes: what core/four_bit/elements.hpp has for one element, and the ways
// between codes, their bytes and their values. Width never shows in a result.
#pragma once
#include "core/lanes.hpp"

namespace fastmerge {
namespace FM_ISA {

inline Floats absolute(Floats x) {
    return Floats(Words(x) & 0x7fffffffu);
}

/// The larger, `b` if either is NaN.
inline Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
    return Floats(_mm512_maskz_max_ps(0xffff, __m512(a), __m512(b)));
#elif defined(__AVX2__)
    return Floats(_mm256_max_ps(__m256(a), __m256(b)));
#elif defined(__SSE2__)
    return Floats(_mm_max_ps(__m128(a), __m128(b)));
#else
    return a > b ? a : b;
#endif
}
inline Floats smaller(Floats a, Floats b) {
#if defined(__AVX512F__)
    return Floats(_mm512_maskz_min_ps(0xffff, __m512(a), __m512(b)));
#elif defined(__AVX2__)
    return Floats(_mm256_min_ps(__m256(a), __m256(b)));
#elif defined(__SSE2__)
    return Floats(_mm_min_ps(__m128(a), __m128(b)));
#else
    return a < b ? a : b;
#endif
}
inline Ints larger(Ints a, Ints b) {
#if defined(__AVX512F__)
    return Ints(_mm512_maskz_max_epi32(0xffff, __m512i(a), __m512i(b)));
#else
    return a > b ? a : b;
#endif
}

#if defined(__AVX512F__)
inline Ints where(Picks p, Ints a, Ints b) {
    return Ints(_mm512_mask_blend_epi32(p, __m512i(b), __m512i(a)));
}
inline Ints plus_where(Ints n, Picks p, int32_t k) {
    return Ints(_mm512_mask_add_epi32(__m512i(n), p, __m512i(n), _mm512_set1_epi32(k)));
}
#else
inline Ints where(Picks p, Ints a, Ints b) {
    return p ? a : b;
}
inline Ints plus_where(Ints n, Picks p, int32_t k) {
    return k == 1 ? n - p : n + (p & k);
}
#endif

inline int32_t largest_lane(Ints x) {
#if defined(__SSE4_1__)
#if defined(__AVX512F__)
    const __m256i low = _mm512_maskz_extracti64x4_epi64(0xf, __m512i(x), 0);
    const __m256i high = _mm512_maskz_extracti64x4_epi64(0xf, __m512i(x), 1);
    const __m256i eight = _mm256_max_epi32(low, high);
#elif defined(__AVX2__)
    const __m256i eight = __m256i(x);
#endif
#if defined(__AVX2__)
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
#else
    __m128i m = __m128i(x);
#endif
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
    return _mm_cvtsi128_si32(m);
#else
    int32_t most = x[0];
    for (int j = 1; j < LANES; ++j) most = x[j] > most ? x[j] : most;
    return most;
#endif
}

// ---- elements to ranks among 15 bounds -----------------------------------------------------------------

#if defined(__AVX2__)
#define FM_RANKS 1

/// Fifteen ascending bounds; `rank` tells how many lie below each lane, by halves: four comparisons.
class Bounds {
  public:
    explicit Bounds(const float* bounds) {
        float shifted[3][16] = {};  // by what is added to a rank to reach the bound in the middle of its half
        for (int j = 0; j < 15; ++j) shifted[0][j] = bounds[j];
        for (int j = 0; j < 14; ++j) shifted[1][j] = bounds[j + 1];
        for (int j = 0; j < 12; ++j) shifted[2][j] = bounds[j + 3];
        middle_ = bounds[7];
#if defined(__AVX512F__)
        for (int k = 0; k < 3; ++k) table_[k] = _mm512_loadu_ps(shifted[k]);
#else
        for (int k = 0; k < 3; ++k)
            for (int half = 0; half < 2; ++half) table_[k][half] = _mm256_loadu_ps(shifted[k] + 8 * half);
#endif
    }
    __attribute__((always_inline)) Ints rank(Floats x) const {
#if defined(__AVX512F__)
        const __m512 v = __m512(x);
        __m512i n = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(v, _mm512_set1_ps(middle_), _CMP_GT_OQ), 8);
        for (int k = 2; k >= 0; --k) {
            const __m512 bound = _mm512_maskz_permutexvar_ps(0xffff, n, table_[k]);
            n = _mm512_mask_add_epi32(n, _mm512_cmp_ps_mask(v, bound, _CMP_GT_OQ), n,
                                      _mm512_set1_epi32(1 << k));
        }
        return Ints(n);
#else
        const __m256 v = __m256(x), upper = _mm256_cmp_ps(v, _mm256_set1_ps(middle_), _CMP_GT_OQ);
        __m256i n = _mm256_setzero_si256();  // within its half
        for (int k = 2; k >= 0; --k) {
            const __m256 low = _mm256_permutevar8x32_ps(table_[k][0], n),
                         high = _mm256_permutevar8x32_ps(table_[k][1], n),
                         above = _mm256_cmp_ps(v, _mm256_blendv_ps(low, high, upper), _CMP_GT_OQ);
            n = _mm256_add_epi32(n, _mm256_and_si256(_mm256_castps_si256(above), _mm256_set1_epi32(1 << k)));
        }
        return Ints(_mm256_add_epi32(n, _mm256_and_si256(_mm256_castps_si256(upper), _mm256_set1_epi32(8))));
#endif
    }

  private:
    float middle_;
#if defined(__AVX512F__)
    __m512 table_[3];
#else
    __m256 table_[3][2];
#endif
};
#endif

// ---- codes of 16 elements to bytes
// -------------------------------------------------------------------------

/// Each 0..15.
struct Codes {
    Ints part[16 / LANES];
};

#if defined(__SSSE3__)
inline __m128i narrow(const Codes& c) {
#if defined(__AVX512F__)
    return _mm512_maskz_cvtepi32_epi8(0xffff, __m512i(c.part[0]));
#elif defined(__AVX2__)
    const __m256i both = _mm256_packs_epi32(__m256i(c.part[0]), __m256i(c.part[1]));
    const __m256i halves = _mm256_permute4x64_epi64(both, 0xd8);
    return _mm_packus_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
#else
    return _mm_packus_epi16(_mm_packs_epi32(__m128i(c.part[0]), __m128i(c.part[1])),
                            _mm_packs_epi32(__m128i(c.part[2]), __m128i(c.part[3])));
#endif
}
#endif

/// A byte each.
inline void store_codes(const Codes& c, uint8_t* bytes) {
#if defined(__SSSE3__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), narrow(c));
#else
    for (int j = 0; j < 16; ++j) bytes[j] = uint8_t(c.part[j / LANES][j % LANES]);
#endif
}

/// Two neighbours a byte.
template <bool HIGH_FIRST>
inline void store_pairs(const Codes& c, uint8_t* bytes) {
#if defined(__SSSE3__)
    const __m128i sums = _mm_maddubs_epi16(narrow(c), _mm_set1_epi16(HIGH_FIRST ? 0x0110 : 0x1001));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(bytes), _mm_packus_epi16(sums, sums));
#else
    uint8_t code[16];
    store_codes(c, code);
    for (int j = 0; j < 8; ++j) {
        const int a = code[2 * j], b = code[2 * j + 1];
        bytes[j] = uint8_t(HIGH_FIRST ? a << 4 | b : a | b << 4);
    }
#endif
}

/// One of `low` and one of `high` a byte.
inline void store_halves(const Codes& low, const Codes& high, uint8_t* bytes) {
#if defined(__SSSE3__)
    const __m128i both = _mm_or_si128(narrow(low), _mm_slli_epi16(narrow(high), 4));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), both);
#else
    uint8_t code[2][16];
    store_codes(low, code[0]), store_codes(high, code[1]);
    for (int j = 0; j < 16; ++j) bytes[j] = uint8_t(code[0][j] | code[1][j] << 4);
#endif
}

// ---- codes to values: indices into 16 floats
// ---------------------------------------------------------------

#if defined(__SSSE3__)
#define FM_LOOK_UP 1

inline __m128i low_nibbles(__m128i bytes) {
    return _mm_and_si128(bytes, _mm_set1_epi8(15));
}
inline __m128i high_nibbles(__m128i bytes) {
    return low_nibbles(_mm_srli_epi16(bytes, 4));
}

/// Sixteen floats, in whatever registers look one up.
class Table {
  public:
    explicit Table(const float* values) {
#if defined(__AVX512F__)
        all_ = _mm512_loadu_ps(values);
#elif defined(__AVX2__)
        low_ = _mm256_loadu_ps(values), high_ = _mm256_loadu_ps(values + 8);
#else
        // Byte b of each float, a table of bytes: four by four within each register, then across.
        const __m128i gather = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        __m128i v[4];
        for (int k = 0; k < 4; ++k) v[k] = _mm_shuffle_epi8(__m128i(_mm_loadu_ps(values + 4 * k)), gather);
        const __m128i a = _mm_unpacklo_epi32(v[0], v[1]), b = _mm_unpacklo_epi32(v[2], v[3]),
                      c = _mm_unpackhi_epi32(v[0], v[1]), d = _mm_unpackhi_epi32(v[2], v[3]);
        byte_[0] = _mm_unpacklo_epi64(a, b), byte_[1] = _mm_unpackhi_epi64(a, b);
        byte_[2] = _mm_unpacklo_epi64(c, d), byte_[3] = _mm_unpackhi_epi64(c, d);
#endif
    }
    /// The floats of 16 codes, a byte each.
    void look_up(__m128i codes, float* out) const {
#if defined(__AVX512F__)
        const __m512i at = _mm512_maskz_cvtepu8_epi32(0xffff, codes);
        _mm512_storeu_ps(out, _mm512_maskz_permutexvar_ps(0xffff, at, all_));
#elif defined(__AVX2__)
        look_up_half(_mm256_cvtepu8_epi32(codes), out);
        look_up_half(_mm256_cvtepu8_epi32(_mm_srli_si128(codes, 8)), out + 8);
#else
        __m128i b[4];
        for (int k = 0; k < 4; ++k) b[k] = _mm_shuffle_epi8(byte_[k], codes);
        const __m128i low01 = _mm_unpacklo_epi8(b[0], b[1]), low23 = _mm_unpacklo_epi8(b[2], b[3]),
                      high01 = _mm_unpackhi_epi8(b[0], b[1]), high23 = _mm_unpackhi_epi8(b[2], b[3]);
        __m128i* to = reinterpret_cast<__m128i*>(out);
        _mm_storeu_si128(to, _mm_unpacklo_epi16(low01, low23));
        _mm_storeu_si128(to + 1, _mm_unpackhi_epi16(low01, low23));
        _mm_storeu_si128(to + 2, _mm_unpacklo_epi16(high01, high23));
        _mm_storeu_si128(to + 3, _mm_unpackhi_epi16(high01, high23));
#endif
    }

    /// The floats of the 16 nibbles of 8 bytes.
    template <bool HIGH_FIRST>
    void look_up_pairs(const uint8_t* bytes, float* out) const {
#if defined(__AVX512F__)
        // Each lane gets the word that its nibble is in; the lookup sees the lowest four bits alone. (Masked:
        // gcc 12 warns of the other forms.)
        const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
        const __m512i first = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
        const __m512i words =
            _mm512_maskz_permutexvar_epi32(0xffff, first, _mm512_maskz_broadcast_i32x2(0xffff, x));
        const __m512i shifts = _mm512_maskz_broadcast_i64x4(0xff, nibble_shifts<HIGH_FIRST>());
        const __m512i at = _mm512_maskz_srlv_epi32(0xffff, words, shifts);
        _mm512_storeu_ps(out, _mm512_maskz_permutexvar_ps(0xffff, at, all_));
#elif defined(__AVX2__)
        int32_t words[2];
        memcpy(words, bytes, sizeof words);
        for (int w = 0; w < 2; ++w)
            look_up_half(_mm256_srlv_epi32(_mm256_set1_epi32(words[w]), nibble_shifts<HIGH_FIRST>()),
                         out + 8 * w);
#else
        const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
        const __m128i low = low_nibbles(x), high = high_nibbles(x);
        look_up(HIGH_FIRST ? _mm_unpacklo_epi8(high, low) : _mm_unpacklo_epi8(low, high), out);
#endif
    }

  private:
#if defined(__AVX2__)
    /// Where the nibbles of a word begin.
    template <bool HIGH_FIRST>
    static __m256i nibble_shifts() {
        return HIGH_FIRST ? _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24)
                          : _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    }
#endif
#if defined(__AVX512F__)
    __m512 all_;
#elif defined(__AVX2__)
    void look_up_half(__m256i at, float* out) const {
        const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(at, 28));  // as the sign
        const __m256 a = _mm256_permutevar8x32_ps(low_, at), b = _mm256_permutevar8x32_ps(high_, at);
        _mm256_storeu_ps(out, _mm256_blendv_ps(a, b, bit3));
    }
    __m256 low_, high_;
#else
    __m128i byte_[4];
#endif
};

/// 16 floats times a scale. (Left to itself, gcc 12 multiplies one by one and puts them together.)
inline void scale_table(const float* values, float scale, float* out) {
    for (int k = 0; k < 16; k += LANES) {
        const Floats scaled = read<Floats>(values + k) * scale;
        memcpy(out + k, &scaled, sizeof scaled);
    }
}

/// Floats of n neighbouring nibbles, n a multiple of 16.
template <bool HIGH_FIRST>
inline void look_up_pairs(const float* values, const uint8_t* bytes, int n, float* out) {
    const Table table(values);
#pragma GCC unroll 4
    for (int j = 0; j < n; j += 16) table.look_up_pairs<HIGH_FIRST>(bytes + j / 2, out + j);
}

/// Floats of N low nibbles, then of the N high ones; N is a multiple of 16, or 8 with one table.
template <int N>
inline void look_up_halves(const float* low, const float* high, const uint8_t* bytes, float* out) {
    const Table first(low), second(high);
    if constexpr (N == 8) {
        const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
        first.look_up(_mm_unpacklo_epi64(low_nibbles(x), high_nibbles(x)), out);
    }
    for (int j = 0; j + 16 <= N; j += 16) {
        const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + j));
        first.look_up(low_nibbles(x), out + j);
        second.look_up(high_nibbles(x), out + N + j);
    }
}
#endif

}  // namespace FM_ISA
}  // namespace fastmerge
