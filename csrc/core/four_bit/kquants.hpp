// GGUF's super-blocks of 256: Q4_K, eight sub-blocks with 6-bit scales and minima; Q6_K, which is only read.
//
// A sub-block's sums are sequential in the definition, but sub-blocks do not depend on each other: S of them
// run side by side, a lane each, which changes no bit.
#pragma once
#include <cmath>

#include "core/four_bit/gguf.hpp"

namespace fastmerge {
namespace FM_ISA {

constexpr int SUB = 32;  // elements of a sub-block

/// S sub-blocks as columns, and the best fit of each so far: x ~ scale * code + low.
template <int S>
struct SubBlocks {
    float x[SUB][S], weight[SUB][S];
    float sum_weight[S], sum_x[S];  // of weight, and of weight * x
    float low[S], high[S], scale[S], error[S];
    int32_t code[SUB][S];
};

/// Weights of elements, their sums and the range of each sub-block, which holds 0.
template <int S>
FM_HD inline void measure_subs(const float* x, SubBlocks<S>& b) {
    float mean[S] = {};
    for (int i = 0; i < SUB; ++i)
        for (int s = 0; s < S; ++s) {
            b.x[i][s] = x[s * SUB + i];
            mean[s] += b.x[i][s] * b.x[i][s];
        }
    for (int s = 0; s < S; ++s) {
        mean[s] = sqrtf(mean[s] / float(SUB));
        b.low[s] = b.high[s] = b.x[0][s];
        b.sum_weight[s] = b.sum_x[s] = 0;
    }
    for (int i = 0; i < SUB; ++i)
        for (int s = 0; s < S; ++s) {
            const float v = b.x[i][s], w = mean[s] + absolute(v);
            b.weight[i][s] = w;
            b.sum_weight[s] += w, b.sum_x[s] += w * v;
            b.low[s] = v < b.low[s] ? v : b.low[s];
            b.high[s] = v > b.high[s] ? v : b.high[s];
        }
    for (int s = 0; s < S; ++s) b.low[s] = b.low[s] > 0 ? 0.f : b.low[s];
}

/// Codes of all elements on a grid that begins at `low`.
template <int S>
FM_HD inline void code_subs(const SubBlocks<S>& b, const float* inverse, int32_t code[SUB][S]) {
    for (int i = 0; i < SUB; ++i)
        for (int s = 0; s < S; ++s)
            code[i][s] = nearest_int(clamped(inverse[s] * (b.x[i][s] - b.low[s]), 0.f, 15.f));
}

/// Weighted squared error of scale * code + low.
template <int S>
FM_HD inline void error_of_subs(const SubBlocks<S>& b, const int32_t code[SUB][S], const float* scale,
                                const float* low, float* error) {
    for (int s = 0; s < S; ++s) error[s] = 0;
    for (int i = 0; i < SUB; ++i)
        for (int s = 0; s < S; ++s) {
            const float d = scale[s] * float(code[i][s]) + low[s] - b.x[i][s];
            error[s] += b.weight[i][s] * (d * d);
        }
}

/// Scale and least value by weighted least squares; false where the codes do not tell. The least value is
/// kept from being above 0.
template <int S>
FM_HD inline void fit_subs(const SubBlocks<S>& b, const int32_t code[SUB][S], float* scale, float* low,
                           int32_t* fits) {
    float l[S] = {}, ll[S] = {}, xl[S] = {};
    for (int i = 0; i < SUB; ++i)
        for (int s = 0; s < S; ++s) {
            const float q = float(code[i][s]), wq = b.weight[i][s] * q;
            l[s] += wq, ll[s] += wq * q, xl[s] += wq * b.x[i][s];
        }
    for (int s = 0; s < S; ++s) {
        const float determinant = b.sum_weight[s] * ll[s] - l[s] * l[s];
        const float free_low = (ll[s] * b.sum_x[s] - l[s] * xl[s]) / determinant;
        const float free_scale = (b.sum_weight[s] * xl[s] - b.sum_x[s] * l[s]) / determinant;
        low[s] = free_low > 0 ? 0.f : free_low;
        scale[s] = free_low > 0 ? xl[s] / ll[s] : free_scale;
        fits[s] = determinant > 0;
    }
}

/// Search from the plain range, then on 21 grids; each begins at the best least value so far.
template <int S>
FM_HD inline void search_subs(SubBlocks<S>& b) {
    float inverse[S], scale[S], low[S], error[S];
    int32_t fits[S], code[SUB][S], varies[S];
    for (int s = 0; s < S; ++s) {
        varies[s] = b.high[s] != b.low[s];
        inverse[s] = 15.f / (b.high[s] - b.low[s]);
        b.scale[s] = 1.f / inverse[s];
    }
    code_subs(b, inverse, b.code);
    error_of_subs(b, b.code, b.scale, b.low, b.error);
    for (int step = 0; step <= 20; ++step) {
        for (int s = 0; s < S; ++s) inverse[s] = (-1.f + 0.1f * float(step) + 15.f) / (b.high[s] - b.low[s]);
        code_subs(b, inverse, code);
        fit_subs(b, code, scale, low, fits);
        error_of_subs(b, code, scale, low, error);
        int32_t any = 0;
        for (int s = 0; s < S; ++s) {
            fits[s] &= varies[s] & (error[s] < b.error[s]);
            b.error[s] = fits[s] ? error[s] : b.error[s];
            b.scale[s] = fits[s] ? scale[s] : b.scale[s];
            b.low[s] = fits[s] ? low[s] : b.low[s];
            any |= fits[s];
        }
        for (int i = 0; i < SUB && any; ++i)
            for (int s = 0; s < S; ++s) b.code[i][s] = fits[s] ? code[i][s] : b.code[i][s];
    }
    for (int s = 0; s < S; ++s) b.scale[s] = varies[s] ? b.scale[s] : 0.f;
}

struct BlockQ4_K {
    static constexpr int elements = 256, bytes = 144, subs = 8;

    /// 6-bit scale and minimum of a sub-block, out of 12 bytes.
    FM_HD static int scale_bits(const uint8_t* p, int s) {
        return s < 4 ? p[s] & 63 : (p[s + 4] & 15) | p[s - 4] >> 6 << 4;
    }
    FM_HD static int minimum_bits(const uint8_t* p, int s) {
        return s < 4 ? p[s + 4] & 63 : p[s + 4] >> 4 | p[s] >> 6 << 4;
    }
    /// 63 is the largest; what is below 0 wraps to it, as in the definition.
    FM_HD static uint8_t six_bits(float v) {
        const uint8_t bits = uint8_t(nearest_int(v));
        return bits < 63 ? bits : 63;
    }
    FM_HD static void store_scales(const SubBlocks<subs>& b, float most, float deepest, uint8_t* p) {
        const float by_scale = most > 0 ? 63.f / most : 0.f, by_low = deepest > 0 ? 63.f / deepest : 0.f;
        uint8_t scale[subs], low[subs];
        for (int s = 0; s < subs; ++s)
            scale[s] = six_bits(by_scale * b.scale[s]), low[s] = six_bits(by_low * -b.low[s]);
        for (int s = 0; s < 4; ++s) {
            p[s] = uint8_t(scale[s] | scale[s + 4] >> 4 << 6);
            p[s + 4] = uint8_t(low[s] | low[s + 4] >> 4 << 6);
            p[s + 8] = uint8_t((scale[s + 4] & 15) | (low[s + 4] & 15) << 4);
        }
    }
    FM_HD static void encode(const Coded&, const float* x, uint8_t* p) {
        SubBlocks<subs> b;
        measure_subs(x, b);
        search_subs(b);
        float most = 0, deepest = 0;
        for (int s = 0; s < subs; ++s) {
            most = b.scale[s] > most ? b.scale[s] : most;
            deepest = -b.low[s] > deepest ? -b.low[s] : deepest;
        }
        store_scales(b, most, deepest, p + 4);
        store_half_word(p, float_to_half(most / 63.f));
        store_half_word(p + 2, float_to_half(deepest / 63.f));
        store_codes(b, x, p);
    }
    /// Codes by the scales as they are stored; where that is zero, the search's.
    FM_HD static void store_codes(const SubBlocks<subs>& b, const float* x, uint8_t* p) {
        const float d = half_to_float(load_half_word(p)), dmin = half_to_float(load_half_word(p + 2));
        uint8_t code[elements];
        for (int s = 0; s < subs; ++s) {
            const float scale = d * float(scale_bits(p + 4, s)), low = dmin * float(minimum_bits(p + 4, s));
            for (int i = 0; i < SUB; ++i) {
                const int stored = nearest_int(clamped((x[s * SUB + i] + low) / scale, 0.f, 15.f));
                code[s * SUB + i] = uint8_t(scale != 0 ? stored : b.code[i][s]);
            }
        }
        for (int h = 0; h < 4; ++h)
            for (int i = 0; i < 32; ++i)
                p[16 + 32 * h + i] = uint8_t(code[64 * h + i] | code[64 * h + 32 + i] << 4);
    }
    FM_HD static void decode(const Coded&, const uint8_t* p, float* out) {
        const float d = half_to_float(load_half_word(p)), dmin = half_to_float(load_half_word(p + 2));
        const auto values = [&](int s) {
            const float scale = d * float(scale_bits(p + 4, s)), low = dmin * float(minimum_bits(p + 4, s));
            return values_of([&](int k) { return scale * float(k) - low; });
        };
        for (int s = 0; s < subs; s += 2)
            decode_halves<SUB>(values(s), values(s + 1), p + 16 + 16 * s, out + SUB * s);
    }
};

/// 128 bytes of low nibbles, 64 of high pairs of bits, 16 scales of 8 bits, the scale of all.
struct BlockQ6_K {
    static constexpr int elements = 256, bytes = 210;

    FM_HD static void decode(const Coded&, const uint8_t* p, float* out) {
        const float d = half_to_float(load_half_word(p + 208));
        for (int run = 0; run < 8; ++run) {  // of 32 elements, four to a half
            const int half = run / 4, part = run % 4;
            const uint8_t *low = p + 64 * half + 32 * (part % 2), *high = p + 128 + 32 * half;
            const uint8_t* scales = p + 192 + 2 * run;
            for (int i = 0; i < 32; ++i) {
                const int q = (low[i] >> part / 2 * 4 & 15) | (high[i] >> 2 * part & 3) << 4;
                out[32 * run + i] = d * float(int8_t(scales[i / 16])) * float(q - 32);
            }
        }
    }
};

}  // namespace FM_ISA
}  // namespace fastmerge
