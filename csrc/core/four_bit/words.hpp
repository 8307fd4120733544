// GPTQ and AWQ: codes 0..15 with an integer zero, in 32-bit words that run over the outputs; [cols, rows].
#pragma once
#include "core/four_bit/integers.hpp"
#include "core/four_bit/search.hpp"

namespace fastmerge {
namespace FM_ISA {

FM_HD inline uint32_t load_word(const uint8_t* words, int64_t i) {
    uint32_t word;
    memcpy(&word, words + i * 4, sizeof word);
    return word;
}

FM_HD inline void store_word(uint8_t* words, int64_t i, uint32_t word) {
    memcpy(words + i * 4, &word, sizeof word);
}

/// Where output t of 8 lies in a word of AWQ: nibble t / 2 for even t, 4 + t / 2 for odd.
FM_HD inline int awq_nibble(int64_t t) {
    return int(t % 2 * 4 + t % 8 / 2);
}

/// Scale and zero of a group; `stored` is the scale's float16.
struct WordScale {
    float scale, stored, zero;
};

/// How much less than the zero is stored.
FM_HD inline int shift_of_zeros(const Coded& c) {
    return c.v1 && c.format == Format::Gptq ? 1 : 0;
}

/// For values, and 0, in [low, high]. GPTQ's zero is at least 1: stored less one it would be 15, which
/// readers that add to whole words carry into the next.
FM_HD inline WordScale word_scale(const Coded& c, float low, float high) {
    const float peak = -low > high ? -low : high, span = c.symmetric ? 2.f * peak : high - low;
    const float scale = (span > 1e-5f ? span : 1e-5f) / 15.f;
    const float least = c.format == Format::Gptq ? 1.f : 0.f;
    const float zero = c.symmetric ? 8.f : float(nearest_int(clamped(-low / scale, least, 15.f)));
    return {scale, rounded_to<DType::F16>(scale), zero};
}

FM_HD inline int word_code(float x, WordScale s) {
    return nearest_int(clamped((x + s.zero * s.scale) / s.stored, 0.f, 15.f));
}

FM_HD inline WordScale word_scale_of(const Coded& c, const float* x, int64_t n) {
    const Range r = range_of(x, n);
    const float low = r.low < 0 ? r.low : 0.f, high = r.high > 0 ? r.high : 0.f;
    if (!c.search) return word_scale(c, low, high);
    const float clip = best_integer_clip([&](float factor) {
        const WordScale s = word_scale(c, low * factor, high * factor);
        return squared_error(
            n, [&](int64_t j) { return (float(word_code(x[j], s)) - s.zero) * s.stored - x[j]; });
    });
    return word_scale(c, low * clip, high * clip);
}

/// Scales and zeros of group g of 8 rows, and their codes of n columns: [8, PIECE] at a time.
FM_HD inline void encode_words(const Coded& c, int64_t row, int rows, int64_t col, int64_t n, const float* x,
                               int64_t stride) {
    const bool awq = c.format == Format::Awq;
    const int64_t g = col / group_size(c);
    WordScale scale[8] = {};
    uint32_t zeros = 0;
    for (int r = 0; r < rows; ++r) {
        scale[r] = word_scale_of(c, x + r * stride, n);
        store_half_word(c.scales + (g * c.rows + row + r) * 2, float_to_half(scale[r].scale));
        const int stored = (int(scale[r].zero) - shift_of_zeros(c)) & 15;
        zeros |= uint32_t(stored) << 4 * (awq ? awq_nibble(r) : r);
    }
    store_word(c.zeros, g * (c.rows / 8) + row / 8, zeros);
    for (int64_t j = 0; j < n; j += PIECE) {
        uint8_t code[8][PIECE] = {};
        const int m = int(n - j < PIECE ? n - j : PIECE);
        for (int r = 0; r < rows; ++r)
            for (int i = 0; i < m; ++i) code[r][i] = uint8_t(word_code(x[r * stride + j + i], scale[r]));
        if (awq) {
            for (int i = 0; i < m; ++i) {
                uint32_t word = 0;
                for (int r = 0; r < 8; ++r) word |= uint32_t(code[r][i]) << 4 * awq_nibble(r);
                store_word(c.codes, (col + j + i) * (c.rows / 8) + row / 8, word);
            }
        } else {
            for (int i = 0; i < m; i += 8)
                for (int r = 0; r < rows; ++r) {
                    uint32_t word = 0;
                    for (int b = 0; b < 8; ++b) word |= uint32_t(code[r][i + b]) << 4 * b;
                    store_word(c.codes, (col + j + i) / 8 * c.rows + row + r, word);
                }
        }
    }
}

FM_HD inline void encode_word_rows(const Coded& c, int64_t row, int rows, int64_t col, int64_t cols,
                                   const float* x, int64_t stride) {
    const int64_t group = group_size(c);
    for (int r = 0; r < rows; r += 8)
        for (int64_t j = 0; j < cols; j += group)
            encode_words(c, row + r, rows - r < 8 ? rows - r : 8, col + j,
                         cols - j < group ? cols - j : group, x + r * stride + j, stride);
}

/// Columns [col, col + m) of a row.
FM_HD inline void decode_words(const Coded& c, int64_t row, int64_t col, int m, float* out) {
    const bool awq = c.format == Format::Awq;
    const int64_t words = c.rows / 8, group = group_size(c);
    const int shift = 4 * (awq ? awq_nibble(row) : int(row % 8));
    int64_t known = -1;
    float scale = 0, zero = 0;
    for (int j = 0; j < m; ++j) {
        const int64_t k = col + j, g = c.group_of ? c.group_of[k] : k / group;
        if (g != known) {
            const uint32_t stored = load_word(c.zeros, g * words + row / 8) >> shift;
            zero = float((stored + shift_of_zeros(c)) & 15);
            scale = half_to_float(load_half_word(c.scales + (g * c.rows + row) * 2));
            known = g;
        }
        const uint32_t word = awq ? load_word(c.codes, k * words + row / 8) >> shift
                                  : load_word(c.codes, k / 8 * c.rows + row) >> 4 * (k % 8);
        out[j] = (float(word & 15) - zero) * scale;
    }
}

}  // namespace FM_ISA
}  // namespace fastmerge
