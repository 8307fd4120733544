// FP4 (E2M1) with a small float as the scale of a short block: NVFP4 and MXFP4, of compressed-tensors and of
// GGUF.
#pragma once
#include "core/four_bit/lookup.hpp"
#include "core/four_bit/search.hpp"

namespace fastmerge {
namespace FM_ISA {

/// Magnitudes 0, 1/2, 1, 3/2, 2, 3, 4, 6; bit 3 is the sign.
struct E2m1 {
    FM_EACH static constexpr float value(int code) {
        constexpr float values[16] = {0.f,  0.5f,  1.f,  1.5f,  2.f,  3.f,  4.f,  6.f,
                                      -0.f, -0.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f};
        return values[code];
    }
};

/// Where the magnitude steps up. Ties go to the even mantissa: three thresholds are the floats just below
/// 3/4, 7/4 and 7/2; or, as GGUF has them, to the lower one.
template <bool LOWER>
struct Steps {
    static constexpr float three_quarters = LOWER ? 0.75f : 0x1.7ffffep-1f;
    static constexpr float seven_quarters = LOWER ? 1.75f : 0x1.bffffep0f;
    static constexpr float seven_halves = LOWER ? 3.5f : 0x1.bffffep1f;
};

/// The code of v; a negative that rounds to zero keeps its sign, but in GGUF.
template <bool GGUF, class V>
FM_EACH auto e2m1_code(V v) {
    using At = Steps<GGUF>;
    const V a = absolute(v);
    decltype(as_int(v)) code{};
    code = plus_if_above(code, a, 0.25f);
    code = plus_if_above(code, a, At::three_quarters);
    code = plus_if_above(code, a, 1.25f);
    code = plus_if_above(code, a, At::seven_quarters);
    code = plus_if_above(code, a, 2.5f);
    code = plus_if_above(code, a, At::seven_halves);
    code = plus_if_above(code, a, 5.f);
    return plus_if_above(code, -v, GGUF ? 0.25f : 0.f, 8);
}

/// The value that v is coded as.
template <bool GGUF, class V>
FM_EACH V e2m1_nearest(V v) {
    using At = Steps<GGUF>;
    const V a = absolute(v);
    V value = if_above(a, 0.25f, 0.5f, V{});
    value = if_above(a, At::three_quarters, 1.f, value);
    value = if_above(a, 1.25f, 1.5f, value);
    value = if_above(a, At::seven_quarters, 2.f, value);
    value = if_above(a, 2.5f, 3.f, value);
    value = if_above(a, At::seven_halves, 4.f, value);
    value = if_above(a, 5.f, 6.f, value);
    return if_above(-v, 0.f, -value, value);
}

// ---- MXFP4 -----------------------------------------------------------------------------------------------

/// E8M0 code of a block's scale. The largest magnitude comes to lie in [4, 8), by the OCP's rule; or, as
/// compressed-tensors has it, in [3.5, 7).
FM_EACH int mx_exponent(float peak, bool ocp) {
    const int e = int((bit_cast<uint32_t>(peak) + (ocp ? 0u : 1u << 21)) >> 23) - 2;
    return e > 0 ? e : 0;
}

/// 2^(127 - e), e <= 254.
FM_EACH float mx_reciprocal(int e) {
    return e == 254 ? 5.877471754111438e-39f : bit_cast<float>(uint32_t(254 - e) << 23);
}

/// That, or the next where its squared error is less.
template <bool GGUF>
FM_TEAM inline int mx_exponent_of(const float* x, int n, bool ocp, bool search) {
    const int e = mx_exponent(peak_of(x, n), ocp || search);  // both rules give this one or the next
    if (!search) return e;
    const auto error = [&](int exponent) {
        const float scale = e8m0_to_float(exponent), reciprocal = mx_reciprocal(exponent);
        return squared_error(
            x, n, [&](auto v) FM_EACH_LAMBDA { return e2m1_nearest<GGUF>(v * reciprocal) * scale - v; });
    };
    return error(e + 1) < error(e) ? e + 1 : e;
}

struct Mxfp4Group {
    FM_EACH static float scale(const Coded&, uint32_t code) { return e8m0_to_float(code); }

    /// The code of the scale of n values.
    FM_TEAM static uint32_t choose(const Coded& c, const float* x, int n) {
        return uint32_t(mx_exponent_of<false>(x, n, c.other_rule, c.search));
    }
    FM_TEAM static void encode(const Coded&, uint32_t chosen, const float* x, int n, uint8_t* bytes) {
        const float reciprocal = mx_reciprocal(int(chosen));
        encode_pairs<false>(
            x, n, [&](auto v) FM_EACH_LAMBDA { return e2m1_code<false>(v * reciprocal); }, 0, bytes);
    }
};

// ---- NVFP4 -----------------------------------------------------------------------------------------------

/// 2688 over the tensor's largest magnitude; every operation is rounded to the coding's type.
FM_HD inline float nvfp4_divisor(DType type, float peak) {
    const float g = rounded_to(type, rounded_to(type, 1.f / peak) * 2688.f);
    return magnitude_bits(g) < 0x7f800000 ? g : 1.f;
}

struct Nvfp4Group {
    FM_EACH static float scale(const Coded& c, uint32_t code) {
        const float s = e4m3_to_float(code);
        return c.other_rule ? s * c.tensor_scale : s / c.tensor_scale;
    }

    /// E4M3 code of the scale that brings `peak` to `target`.
    FM_HD static uint32_t scale_code(const Coded& c, float peak, float target) {
        const uint32_t code = float_to_e4m3(c.tensor_scale * rounded_to(c.type, peak / target));
        return code == 0 ? 0x20u : code;  // 0.125
    }
    FM_TEAM static uint32_t choose(const Coded& c, const float* x, int n) {
        const float peak = peak_of(x, n);
        const uint32_t six = scale_code(c, peak, 6.f);
        if (!c.search) return six;
        const auto error = [&](uint32_t candidate) {
            const float s = scale(c, candidate);
            return squared_error(x, n,
                                 [&](auto v) FM_EACH_LAMBDA { return e2m1_nearest<false>(v / s) * s - v; });
        };
        const uint32_t four = scale_code(c, peak, 4.f);
        return error(four) < error(six) ? four : six;
    }
    FM_TEAM static void encode(const Coded& c, uint32_t chosen, const float* x, int n, uint8_t* bytes) {
        const float s = scale(c, chosen);
        encode_pairs<false>(x, n, [&](auto v) FM_EACH_LAMBDA { return e2m1_code<false>(v / s); }, 0, bytes);
    }
};

// ---- both: codes low nibble first, a byte per scale
// --------------------------------------------------------

/// Scales of all groups first: what one waits for, the next need not.
template <class Group>
FM_TEAM inline void encode_micro(const Coded& c, int64_t row, int rows, int64_t col, int64_t cols,
                                 const float* x, int64_t stride) {
    const int64_t groups = groups_of_row(c);
    for (int r = 0; r < rows; ++r, x += stride) {
        const int64_t at = stored_row(c, row + r);
        uint8_t* bytes = c.codes + (at * c.cols + col) / 2;
        uint8_t* scales = c.scales + at * groups + quotient(col, c.group);
        for (int64_t j = 0, g = 0; j < cols; j += c.group, ++g)
            scales[g] = uint8_t(Group::choose(c, x + j, c.group));
        for (int64_t j = 0, g = 0; j < cols; j += c.group, ++g)
            Group::encode(c, scales[g], x + j, c.group, bytes + j / 2);
    }
}

/// Columns [col, col + m) of a stored row.
template <class Group>
FM_HD inline void decode_micro(const Coded& c, int64_t row, int64_t col, int m, float* out) {
    const uint8_t* bytes = c.codes + row * (c.cols / 2);
    const uint8_t* scales = c.scales + row * groups_of_row(c);
    visit_groups(c.group, col, m, out, [&](int64_t g, int64_t at, int n, float* to) {
        decode_pairs<false>(book_values<E2m1>(Group::scale(c, scales[g])), bytes, at, n, to);
    });
}

}  // namespace FM_ISA
}  // namespace fastmerge
