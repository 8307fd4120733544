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

/// Where the magnitude steps up. Ties go to the even mantissa; or, as GGUF has them, to the lower one.
template <bool LOWER>
struct Steps {
    FM_EACH static int count(float a) {
        if constexpr (LOWER)
            return (a > 0.25f) + (a > 0.75f) + (a > 1.25f) + (a > 1.75f) + (a > 2.5f) + (a > 3.5f) +
                   (a > 5.f);
        return (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) + (a >= 3.5f) + (a > 5.f);
    }
    FM_EACH static float value(float a) {
        const int halves = count(a) + (a > 2.5f) + (LOWER ? a > 3.5f : a >= 3.5f) + 3 * (a > 5.f);
        return float(halves) * 0.5f;
    }
};

/// The code of v; a negative that rounds to zero keeps its sign, but in GGUF.
template <bool GGUF>
FM_EACH int e2m1_code(float v) {
    const int magnitude = Steps<GGUF>::count(absolute(v));
    return magnitude | ((v < 0) & (!GGUF | (magnitude > 0)) ? 8 : 0);
}

/// The value that v is coded as.
template <bool GGUF>
FM_EACH float e2m1_nearest(float v) {
    const float magnitude = Steps<GGUF>::value(absolute(v));
    return v < 0 ? -magnitude : magnitude;
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

template <bool GGUF>
FM_HD inline int mx_exponent_of(const float* x, int n, bool ocp, bool search) {
    const int e = mx_exponent(peak_of(x, n), ocp);
    if (!search) return e;
    const auto error = [&](int exponent) {
        const float scale = e8m0_to_float(exponent), reciprocal = mx_reciprocal(exponent);
        return squared_error(n,
                             [&](int64_t j) FM_EACH_LAMBDA { return e2m1_nearest<GGUF>(x[j] * reciprocal) * scale - x[j]; });
    };
    return error(e + 1) < error(e) ? e + 1 : e;
}

struct Mxfp4Group {
    /// Codes of n values; returns their scale's.
    template <int N>
    FM_HD static int encode(const Coded& c, const float* x, int n, uint8_t* code) {
        const int e = mx_exponent_of<false>(x, trips<N>(n), c.other_rule, c.search);
        const float reciprocal = mx_reciprocal(e);
        for (int j = 0; j < trips<N>(n); ++j) code[j] = uint8_t(e2m1_code<false>(x[j] * reciprocal));
        return e;
    }
    FM_EACH static float scale(const Coded&, uint32_t code) { return e8m0_to_float(code); }
};

// ---- NVFP4 -----------------------------------------------------------------------------------------------

/// 2688 over the tensor's largest magnitude; every operation is rounded to the coding's type.
FM_HD inline float nvfp4_divisor(DType type, float peak) {
    const float g = rounded_to(type, rounded_to(type, 1.f / peak) * 2688.f);
    return magnitude_bits(g) < 0x7f800000 ? g : 1.f;
}

struct Nvfp4Group {
    FM_EACH static float scale(const Coded& c, uint32_t code) { return e4m3_to_float(code) / c.tensor_scale; }

    /// E4M3 code of the scale that brings `peak` to `target`.
    FM_HD static uint32_t scale_code(const Coded& c, float peak, float target) {
        const uint32_t code = float_to_e4m3(c.tensor_scale * rounded_to(c.type, peak / target));
        return code == 0 ? 0x20u : code;  // 0.125
    }
    template <int N>
    FM_HD static int encode(const Coded& c, const float* x, int n, uint8_t* code) {
        const float peak = peak_of(x, trips<N>(n));
        uint32_t best = scale_code(c, peak, 6.f);
        if (c.search) {
            const auto error = [&](uint32_t candidate) {
                const float s = scale(c, candidate);
                return squared_error(n, [&](int64_t j) FM_EACH_LAMBDA { return e2m1_nearest<false>(x[j] / s) * s - x[j]; });
            };
            const uint32_t four = scale_code(c, peak, 4.f);
            best = error(four) < error(best) ? four : best;
        }
        const float s = scale(c, best);
        for (int j = 0; j < trips<N>(n); ++j) code[j] = uint8_t(e2m1_code<false>(x[j] / s));
        return int(best);
    }
};

// ---- both: codes low nibble first, a byte per scale
// --------------------------------------------------------

template <class Group, int N>
FM_HD inline void encode_micro_row(const Coded& c, int64_t row, int64_t col, int64_t cols, const float* x) {
    const int group = trips<N>(c.group);
    uint8_t* bytes = c.codes + (row * c.cols + col) / 2;
    uint8_t* scales = c.scales + row * groups_of_row(c) + col / group;
    for (int64_t j = 0; j < cols; j += group, ++scales) {
        uint8_t code[PIECE];
        *scales = uint8_t(Group::template encode<N>(c, x + j, group, code));
        pack_nibbles<false, N>(code, group, 0, bytes + j / 2);
    }
}

template <class Group, int N>
FM_HD inline void encode_micro(const Coded& c, int64_t row, int rows, int64_t col, int64_t cols,
                               const float* x, int64_t stride) {
    for (int r = 0; r < rows; ++r)
        encode_micro_row<Group, N>(c, stored_row(c, row + r), col, cols, x + r * stride);
}

/// Columns [col, col + m) of a stored row.
template <class Group>
FM_HD inline void decode_micro(const Coded& c, int64_t row, int64_t col, int m, float* out) {
    const uint8_t* bytes = c.codes + row * (c.cols / 2);
    const uint8_t* scales = c.scales + row * groups_of_row(c);
    visit_pieces(c.group, col, m, out, [&](auto count, int64_t g, int64_t at, int n, float* to) {
        constexpr int N = decltype(count)::value;
        decode_pairs<false, N>(book_values<E2m1>(Group::scale(c, scales[g])), bytes, at, n, to);
    });
}

}  // namespace FM_ISA
}  // namespace fastmerge
