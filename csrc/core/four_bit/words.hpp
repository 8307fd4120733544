// GPTQ and AWQ: codes 0..15 with an integer zero, in 32-bit words that run over the outputs; [cols, rows].
#pragma once
#include "core/four_bit/integers.hpp"
#include "core/four_bit/search.hpp"

namespace fastmerge {
namespace FM_ISA {

/// Where output t of 8 lies in a word of AWQ: nibble t / 2 for even t, 4 + t / 2 for odd.
FM_EACH int awq_nibble(int64_t t) {
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

FM_EACH int word_code(float x, WordScale s) {
    return nearest_int(clamped((x + s.zero * s.scale) / s.stored, 0.f, 15.f));
}

FM_HD inline WordScale word_scale_of(const Coded& c, const float* x, int64_t n) {
    const Range r = range_of(x, n);
    const float low = r.low < 0 ? r.low : 0.f, high = r.high > 0 ? r.high : 0.f;
    if (!c.search) return word_scale(c, low, high);
    const float clip = best_integer_clip([&](float factor) {
        const WordScale s = word_scale(c, low * factor, high * factor);
        return squared_error(
            n, [&](int64_t j) FM_EACH_LAMBDA { return (float(word_code(x[j], s)) - s.zero) * s.stored - x[j]; });
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

/// Scale and zero of a row's group.
FM_HD inline Affine word_affine(const Coded& c, int64_t row, int64_t g) {
    const int nibble = c.format == Format::Awq ? awq_nibble(row) : int(row % 8);
    const uint32_t stored = load_word(c.zeros, g * (c.rows / 8) + row / 8) >> 4 * nibble;
    const float scale = half_to_float(load_half_word(c.scales + (g * c.rows + row) * 2));
    return {scale, float((stored + uint32_t(shift_of_zeros(c))) & 15)};
}

/// Code of a row and a column.
FM_EACH int word_code_at(const Coded& c, int64_t row, int64_t col) {
    if (c.format == Format::Awq)
        return load_word(c.codes, col * (c.rows / 8) + row / 8) >> 4 * awq_nibble(row) & 15;
    return load_word(c.codes, col / 8 * c.rows + row) >> 4 * (col % 8) & 15;
}

/// Columns [col, col + m) of a row.
FM_HD inline void decode_words(const Coded& c, int64_t row, int64_t col, int m, float* out) {
    if (c.group_of) {
        for (int j = 0; j < m; ++j) {
            const Affine a = word_affine(c, row, c.group_of[col + j]);
            out[j] = (float(word_code_at(c, row, col + j)) - a.zero) * a.scale;
        }
        return;
    }
    visit_pieces(group_size(c), col, m, out, [&](auto, int64_t g, int64_t at, int n, float* to) {
        const Affine a = word_affine(c, row, g);
        for (int j = 0; j < n; ++j) to[j] = (float(word_code_at(c, row, at + j)) - a.zero) * a.scale;
    });
}

}  // namespace FM_ISA
}  // namespace fastmerge
