// Integer codes with a scale per group and, asymmetric, a zero point: compressed-tensors pack-quantized.
#pragma once
#include "core/four_bit/search.hpp"

namespace fastmerge {
namespace FM_ISA {

struct Affine {
    float scale, zero;  // value = (code - zero) * scale
};

template <DType T>
FM_HD inline float epsilon_of() {
    return T == DType::BF16 ? 0.0078125f : T == DType::F16 ? 0.0009765625f : 1.1920929e-07f;
}

/// Scale and zero of a group whose values, and 0, lie in [low, high]; every operation is rounded to T.
template <DType T>
FM_HD inline Affine int4_affine(float low, float high, bool symmetric) {
    float scale, zero = 0;
    if (symmetric) {
        const float peak = -low > high ? -low : high;
        scale = rounded_to<T>(peak / 7.5f);
    } else {
        scale = rounded_to<T>(rounded_to<T>(high - low) / 15.f);
        zero = rounded_to<T>(-8.f - rounded_to<T>(low / scale));
        zero = zero == zero ? float(nearest_int(clamped(zero, -8.f, 7.f))) : 0.f;  // 0 / 0: all is zero
    }
    return {scale == 0 ? epsilon_of<T>() : scale, zero};
}

/// Code -8..7 of a value. A zero of 0 changes nothing that was rounded before.
template <DType T>
FM_HD inline int int4_code(float x, Affine a) {
    const float v = rounded_to<T>(rounded_to<T>(x / a.scale) + a.zero);
    return nearest_int(clamped(v, -8.f, 7.f));
}

/// Scale and zero of n values, by their range or by the best of 13 parts of it.
template <DType T, DType CODES>
FM_HD inline Affine int4_affine_of(const Coded& c, const float* x, int64_t n) {
    Range r = {0, peak_of(x, n)};
    if (!c.symmetric) {
        r = range_of(x, n);
        r = {r.low < 0 ? r.low : 0.f, r.high > 0 ? r.high : 0.f};
    }
    const auto affine = [&](float clip) {
        return int4_affine<T>(rounded_to<T>(r.low * clip), rounded_to<T>(r.high * clip), c.symmetric);
    };
    if (!c.search) return affine(1.f);
    return affine(best_integer_clip([&](float clip) {
        const Affine a = affine(clip);
        return squared_error(n, [&](int64_t j) {
            return rounded_to<T>((float(int4_code<CODES>(x[j], a)) - a.zero) * a.scale) - x[j];
        });
    }));
}

template <DType CODES, int N>
FM_HD inline void int4_codes(const float* x, int n, Affine a, uint8_t* code) {
    for (int j = 0; j < trips<N>(n); ++j) code[j] = uint8_t(int4_code<CODES>(x[j], a) + 8);
}

template <DType T, DType CODES>
FM_HD inline Affine encode_int4_group(const Coded& c, const float* x, int64_t n, uint8_t* bytes) {
    const Affine a = int4_affine_of<T, CODES>(c, x, n);
    uint8_t code[PIECE];
    for (; n >= PIECE; n -= PIECE, x += PIECE, bytes += PIECE / 2) {
        int4_codes<CODES, PIECE>(x, PIECE, a, code);
        pack_nibbles<false, PIECE>(code, PIECE, 0, bytes);
    }
    int4_codes<CODES, 0>(x, int(n), a, code);
    pack_nibbles<false, 0>(code, int(n), 0, bytes);
    return a;
}

template <DType T, DType CODES>
FM_HD inline void encode_int4(const Coded& c, int64_t row, int rows, int64_t col, int64_t cols,
                              const float* x, int64_t stride) {
    const int64_t group = group_size(c), groups = groups_of_row(c), row_bytes = (c.cols + 7) / 8 * 4;
    for (int64_t j = 0; j < cols; j += group) {
        const int64_t n = cols - j < group ? cols - j : group, g = (col + j) / group;
        uint32_t zeros = 0;
        for (int r = 0; r < rows; ++r) {
            const int64_t at = stored_row(c, row + r);
            uint8_t* bytes = c.codes + at * row_bytes + (col + j) / 2;
            const Affine a = encode_int4_group<T, CODES>(c, x + r * stride + j, n, bytes);
            store_scale(c.scales, c.scale_type, at * groups + g, a.scale);
            zeros |= uint32_t(int(a.zero) + 8) << 4 * r;
            if (col + j + n == c.cols)
                for (int64_t b = (c.cols + 1) / 2; b < row_bytes; ++b) c.codes[at * row_bytes + b] = 0;
        }
        if (!c.symmetric) memcpy(c.zeros + (stored_row(c, row) / 8 * groups + g) * 4, &zeros, sizeof zeros);
    }
}

FM_HD inline void encode_int4(const Coded& c, int64_t row, int rows, int64_t col, int64_t cols,
                              const float* x, int64_t stride) {
    if (c.type == DType::BF16 && c.other_rule)
        encode_int4<DType::BF16, DType::F32>(c, row, rows, col, cols, x, stride);
    else if (c.type == DType::BF16)
        encode_int4<DType::BF16, DType::BF16>(c, row, rows, col, cols, x, stride);
    else if (c.type == DType::F16)
        encode_int4<DType::F16, DType::F16>(c, row, rows, col, cols, x, stride);
    else
        encode_int4<DType::F32, DType::F32>(c, row, rows, col, cols, x, stride);
}

FM_HD inline float int4_zero(const Coded& c, int64_t row, int64_t g) {
    if (c.symmetric) return 8;
    uint32_t word;
    memcpy(&word, c.zeros + (row / 8 * groups_of_row(c) + g) * 4, sizeof word);
    return float(word >> 4 * (row % 8) & 15);
}

/// Values in the type of the scale, to which the product is rounded.
template <DType T, int N>
FM_HD inline void int4_values(const uint8_t* code, int n, Affine a, float* out) {
    for (int j = 0; j < trips<N>(n); ++j) out[j] = rounded_to<T>((float(code[j]) - a.zero) * a.scale);
}

template <int N>
FM_HD inline void decode_int4_piece(const Coded& c, int64_t row, int64_t col, int n, float* out) {
    const int64_t g = col / group_size(c), row_bytes = (c.cols + 7) / 8 * 4;
    const float scale = load_scale(c.scales, c.scale_type, row * groups_of_row(c) + g);
    const float zero = int4_zero(c, row, g);
    uint8_t code[PIECE];
    unpack_nibbles<false, N>(c.codes + row * row_bytes, col, n, code);
    const ScaleType t = c.scale_type;
    if (t == ScaleType::BF16)
        int4_values<DType::BF16, N>(code, n, {scale, zero}, out);
    else if (t == ScaleType::F16)
        int4_values<DType::F16, N>(code, n, {scale, zero}, out);
    else
        int4_values<DType::F32, N>(code, n, {scale, zero}, out);
}

/// Columns [col, col + m) of a stored row.
FM_HD inline void decode_int4(const Coded& c, int64_t row, int64_t col, int m, float* out) {
    visit_pieces(group_size(c), col, m, out, [&](auto count, int64_t at, int n, float* to) {
        decode_int4_piece<decltype(count)::value>(c, row, at, n, to);
    });
}

}  // namespace FM_ISA
}  // namespace fastmerge
