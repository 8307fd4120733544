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
    const float span = c.symmetric ? 2.f * larger(-low, high) : high - low;
    const float scale = larger(span, 1e-5f) / 15.f;
    const float least = c.format == Format::Gptq ? 1.f : 0.f;
    const float zero = c.symmetric ? 8.f : float(nearest_int(clamped(-low / scale, least, 15.f)));
    return {scale, rounded_to<DType::F16>(scale), zero};
}

template <class V>
FM_EACH auto word_code(V x, WordScale s) {
    return nearest_int(clamped((x + s.zero * s.scale) / s.stored, 0.f, 15.f));
}

FM_TEAM inline WordScale word_scale_of(const Coded& c, const float* x, int64_t n) {
    const Range r = range_with_zero(x, n);
    if (!c.search) return word_scale(c, r.low, r.high);
    const float clip = best_integer_clip([&](float factor) {
        const WordScale s = word_scale(c, r.low * factor, r.high * factor);
        return squared_error(
            x, n, [&](auto v) FM_EACH_LAMBDA { return (to_float(word_code(v, s)) - s.zero) * s.stored - v; });
    });
    return word_scale(c, r.low * clip, r.high * clip);
}

#if defined(FM_GPU)
/// Code n columns, a multiple of 8, of as many rows: each lane has words of its own.
FM_TEAM inline void encode_codes(const Coded& c, const WordScale* scale, int64_t row, int rows, int64_t col,
                                 int64_t n, const float* x, int64_t stride) {
    if (c.format == Format::Awq) {
        for (int64_t i = team_lane(); i < n; i += TEAM) {
            uint32_t word = 0;
            FM_UNROLL
            for (int r = 0; r < 8; ++r)
                word |= uint32_t(word_code(x[r * stride + i], scale[r])) << 4 * awq_nibble(r);
            store_word(c.codes, (col + i) * (c.rows / 8) + row / 8, word);
        }
        return;
    }
    FM_UNROLL
    for (int r = 0; r < 8; ++r)
        for (int64_t i = 8 * team_lane(); i < n && r < rows; i += 8 * TEAM) {
            uint32_t word = 0;
            for (int b = 0; b < 8; ++b) word |= uint32_t(word_code(x[r * stride + i + b], scale[r])) << 4 * b;
            store_word(c.codes, (col + i) / 8 * c.rows + row + r, word);
        }
}
#else
/// Codes [8, n] of as many rows, n a multiple of 8, to their words.
inline void store_code_words(const Coded& c, const uint8_t* code, int64_t row, int rows, int64_t col, int n) {
    if (c.format == Format::Awq) {
        for (int i = 0; i < n; ++i) {
            uint32_t word = 0;
            for (int r = 0; r < 8; ++r) word |= uint32_t(code[r * n + i]) << 4 * awq_nibble(r);
            store_word(c.codes, (col + i) * (c.rows / 8) + row / 8, word);
        }
        return;
    }
    for (int i = 0; i < n; i += 8)
        for (int r = 0; r < rows; ++r) {
            uint32_t word = 0;
            for (int b = 0; b < 8; ++b) word |= uint32_t(code[r * n + i + b]) << 4 * b;
            store_word(c.codes, (col + i) / 8 * c.rows + row + r, word);
        }
}

/// Code n columns, a multiple of 8, of as many rows.
inline void encode_codes(const Coded& c, const WordScale* scale, int64_t row, int rows, int64_t col,
                         int64_t n, const float* x, int64_t stride) {
    constexpr int most = 64;
    for (int64_t j = 0; j < n; j += most) {
        uint8_t code[8 * most] = {};
        const int m = int(n - j < most ? n - j : most);
        for (int r = 0; r < rows; ++r)
            encode_bytes(
                x + r * stride + j, m, [&](auto v) FM_EACH_LAMBDA { return word_code(v, scale[r]); },
                code + r * m);
        store_code_words(c, code, row, rows, col + j, m);
    }
}
#endif

/// Code n columns, which are one group, of up to 8 rows.
FM_APART inline void encode_words(const Coded& c, int64_t row, int rows, int64_t col, int64_t n,
                                  const float* x, int64_t stride) {
    const bool awq = c.format == Format::Awq;
    const int64_t g = quotient(col, group_size(c));
    WordScale scale[8] = {};
    uint32_t zeros = 0;
    for (int r = 0; r < rows; ++r) {
        scale[r] = word_scale_of(c, x + r * stride, n);
        store_half_word(c.scales + (g * c.rows + row + r) * 2, float_to_half(scale[r].scale));
        const int stored = (int(scale[r].zero) - shift_of_zeros(c)) & 15;
        zeros |= uint32_t(stored) << 4 * (awq ? awq_nibble(r) : r);
    }
    store_word(c.zeros, g * (c.rows / 8) + row / 8, zeros);
    encode_codes(c, scale, row, rows, col, n, x, stride);
}

FM_TEAM inline void encode_word_rows(const Coded& c, int64_t row, int rows, int64_t col, int64_t cols,
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

/// Columns [col, col + n) of one group of a row.
FM_HD inline void decode_group(const Coded& c, int64_t row, Affine a, int64_t col, int n, float* out) {
    if (c.format == Format::Awq) {
        const int shift = 4 * awq_nibble(row);
        for (int j = 0; j < n; ++j) {
            const uint32_t word = load_word(c.codes, (col + j) * (c.rows / 8) + row / 8);
            out[j] = (float(int(word >> shift & 15)) - a.zero) * a.scale;
        }
        return;
    }
    const Values v = values_of([&](int k) FM_EACH_LAMBDA { return (float(k) - a.zero) * a.scale; });
    constexpr int most = 16;  // words at a time, side by side as other formats have them
    for (int done = 0; done < n;) {
        const int skip = int((col + done) % 8), m = 8 * most - skip < n - done ? 8 * most - skip : n - done;
        uint8_t bytes[4 * most];
        for (int w = 0; 8 * w < skip + m; ++w)
            store_word(bytes, w, load_word(c.codes, ((col + done) / 8 + w) * c.rows + row));
        decode_pairs<false>(v, bytes, skip, m, out + done);
        done += m;
    }
}

/// Columns [col, col + m) of a row; only GPTQ has groups out of order.
FM_HD inline void decode_words(const Coded& c, int64_t row, int64_t col, int m, float* out) {
    if (!c.group_of) {
        visit_groups(group_size(c), col, m, out, [&](int64_t g, int64_t at, int n, float* to) {
            decode_group(c, row, word_affine(c, row, g), at, n, to);
        });
        return;
    }
    for (int j = 0; j < m; ++j) {
        const int64_t k = col + j;
        const Affine a = word_affine(c, row, c.group_of[k]);
        const uint32_t word = load_word(c.codes, k / 8 * c.rows + row);
        out[j] = (float(int(word >> 4 * (k % 8) & 15)) - a.zero) * a.scale;
    }
}

}  // namespace FM_ISA
}  // namespace fastmerge
