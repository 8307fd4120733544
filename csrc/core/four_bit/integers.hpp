// Integer codes with a scale per group and, asymmetric, a zero point: compressed-tensors pack-quantized.
#pragma once
#include "core/four_bit/lookup.hpp"
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
FM_HD inline Affine int4_affine(Range r, bool symmetric) {
    float scale, zero = 0;
    if (symmetric) {
        scale = rounded_to<T>(larger(-r.low, r.high) / 7.5f);
    } else {
        scale = rounded_to<T>(rounded_to<T>(r.high - r.low) / 15.f);
        zero = rounded_to<T>(-8.f - rounded_to<T>(r.low / scale));
        zero = zero == zero ? float(nearest_int(clamped(zero, -8.f, 7.f))) : 0.f;  // 0 / 0: all is zero
    }
    return {scale == 0 ? epsilon_of<T>() : scale, zero};
}

/// Code -8..7 of a value. A zero of 0 changes nothing that was rounded before.
template <DType T, class V>
FM_EACH auto int4_code(V x, Affine a) {
    const V v = rounded_to<T>(rounded_to<T>(x / a.scale) + a.zero);
    return nearest_int(clamped(v, -8.f, 7.f));
}

/// Scale and zero of n values, by their range or by the best of 13 parts of it.
template <DType T, DType CODES>
FM_TEAM inline Affine int4_affine_of(const Coded& c, const float* x, int64_t n) {
    const Range r = c.symmetric ? Range{0, peak_of(x, n)} : range_with_zero(x, n);
    const auto affine = [&](float clip) {
        return int4_affine<T>({rounded_to<T>(r.low * clip), rounded_to<T>(r.high * clip)}, c.symmetric);
    };
    if (!c.search) return affine(1.f);
    return affine(best_integer_clip([&](float clip) {
        const Affine a = affine(clip);
        return squared_error(x, n, [&](auto v) FM_EACH_LAMBDA {
            return rounded_to<T>((to_float(int4_code<CODES>(v, a)) - a.zero) * a.scale) - v;
        });
    }));
}

template <DType T, DType CODES>
FM_APART inline void encode_int4(const Coded& c, int64_t row, int rows, int64_t col, int64_t cols,
                                 const float* x, int64_t stride) {
    const int64_t group = group_size(c), groups = groups_of_row(c), row_bytes = (c.cols + 7) / 8 * 4;
    for (int64_t j = 0; j < cols; j += group) {
        const int64_t n = cols - j < group ? cols - j : group, g = quotient(col + j, group);
        uint32_t zeros = 0;
        for (int r = 0; r < rows; ++r) {
            const int64_t at = stored_row(c, row + r);
            uint8_t* bytes = c.codes + at * row_bytes + (col + j) / 2;
            const float* from = x + r * stride + j;
            const Affine a = int4_affine_of<T, CODES>(c, from, n);
            encode_pairs<false>(
                from, n, [&](auto v) FM_EACH_LAMBDA { return int4_code<CODES>(v, a) + 8; }, 0, bytes);
            store_scale(c.scales, c.scale_type, at * groups + g, a.scale);
            zeros |= uint32_t(int(a.zero) + 8) << 4 * r;
            if (col + j + n == c.cols)
                for (int64_t b = (c.cols + 1) / 2; b < row_bytes; ++b) c.codes[at * row_bytes + b] = 0;
        }
        if (!c.symmetric) store_word(c.zeros, stored_row(c, row) / 8 * groups + g, zeros);
    }
}

FM_TEAM inline void encode_int4(const Coded& c, int64_t row, int rows, int64_t col, int64_t cols,
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

/// Columns [col, col + m) of a stored row. Scales are of type T, to which values are rounded.
template <DType T, ScaleType S>
FM_HD inline void decode_int4(const Coded& c, int64_t row, int64_t col, int m, float* out) {
    const int64_t groups = groups_of_row(c);
    const uint8_t* bytes = c.codes + row * ((c.cols + 7) / 8 * 4);
    visit_groups(group_size(c), col, m, out, [&](int64_t g, int64_t at, int n, float* to) {
        Affine a = {load_scale(c.scales, S, row * groups + g), 8};
        if (!c.symmetric) a.zero = float(load_word(c.zeros, row / 8 * groups + g) >> 4 * (row % 8) & 15);
        const Values v =
            values_of([&](int k) FM_EACH_LAMBDA { return rounded_to<T>((float(k) - a.zero) * a.scale); });
        decode_pairs<false>(v, bytes, at, n, to);
    });
}

FM_HD inline void decode_int4(const Coded& c, int64_t row, int64_t col, int m, float* out) {
    if (c.scale_type == ScaleType::BF16)
        decode_int4<DType::BF16, ScaleType::BF16>(c, row, col, m, out);
    else if (c.scale_type == ScaleType::F16)
        decode_int4<DType::F16, ScaleType::F16>(c, row, col, m, out);
    else
        decode_int4<DType::F32, ScaleType::F32>(c, row, col, m, out);
}

}  // namespace FM_ISA
}  // namespace fastmerge
