// GGUF's super-blocks of 256: Q4_K, eight sub-blocks with 6-bit scales and minima; Q6_K, which is only read.
//
// A sub-block's sums are sequential in the definition, but sub-blocks do not depend on each other: on the
// host as many as a register has lanes run side by side, which changes no bit.
#pragma once
#include <cmath>

#include "core/four_bit/gguf.hpp"

namespace fastmerge {
namespace FM_ISA {

constexpr int SUB = 32;  // elements of a sub-block

/// Sub-blocks, one or a lane each, and the best fit so far: x ~ scale * code + low.
template <class V>
struct SubBlocks {
    using Int = decltype(as_int(V{}));
    V x[SUB], weight[SUB];
    V sum_weight, sum_x;  // of weight, and of weight * x
    V low, high, scale, error;
    Int code[SUB];
};

/// Weights of elements, their sums and the range of each sub-block, which holds 0.
template <class V>
FM_HD inline void measure_subs(SubBlocks<V>& b, V root_mean_square) {
    b.low = b.high = b.x[0];
    b.sum_weight = b.sum_x = V{};
    FM_ROLLED
    for (int i = 0; i < SUB; ++i) {
        const V x = b.x[i], w = root_mean_square + absolute(x);
        b.weight[i] = w;
        b.sum_weight += w, b.sum_x += w * x;
        b.low = smaller(x, b.low), b.high = larger(x, b.high);
    }
    b.low = smaller(b.low, V{});
}

/// Codes of all elements on a grid that begins at `low`.
template <class V, class Int>
FM_HD inline void code_subs(const SubBlocks<V>& b, V inverse, Int* code) {
    FM_ROLLED
    for (int i = 0; i < SUB; ++i) code[i] = nearest_int(clamped(inverse * (b.x[i] - b.low), 0.f, 15.f));
}

/// Weighted squared error of scale * code + low.
template <class V, class Int>
FM_HD inline V error_of_subs(const SubBlocks<V>& b, const Int* code, V scale, V low) {
    V error{};
    FM_ROLLED
    for (int i = 0; i < SUB; ++i) {
        const V d = scale * to_float(code[i]) + low - b.x[i];
        error += b.weight[i] * (d * d);
    }
    return error;
}

/// Fit scale and low to codes by weighted least squares, low not above 0; keep them where the error falls.
template <class V, class Int>
FM_HD inline void improve_subs(SubBlocks<V>& b, const Int* code) {
    V l{}, ll{}, xl{};
    FM_ROLLED
    for (int i = 0; i < SUB; ++i) {
        const V q = to_float(code[i]), wq = b.weight[i] * q;
        l += wq, ll += wq * q, xl += wq * b.x[i];
    }
    const V determinant = b.sum_weight * ll - l * l;
    const V free_low = (ll * b.sum_x - l * xl) / determinant;
    const V free_scale = (b.sum_weight * xl - b.sum_x * l) / determinant;
    const V low = if_above(free_low, V{}, V{}, free_low);
    const V scale = if_above(free_low, V{}, xl / ll, free_scale);
    const V error = error_of_subs(b, code, scale, low);
    const V best = if_above(determinant, V{}, b.error, V{});  // where codes do not tell, nothing is below 0
    b.scale = if_above(best, error, scale, b.scale);
    b.low = if_above(best, error, low, b.low);
    FM_ROLLED
    for (int i = 0; i < SUB; ++i) b.code[i] = if_above(best, error, code[i], b.code[i]);
    b.error = if_above(best, error, error, b.error);
}

/// Search from the plain range, then on 21 grids; each begins at the best `low` so far.
template <class V>
FM_HD inline void search_subs(SubBlocks<V>& b) {
    const V span = b.high - b.low, inverse = 15.f / span;
    b.scale = 1.f / inverse;
    code_subs(b, inverse, b.code);
    b.error = error_of_subs(b, b.code, b.scale, b.low);
    b.error = if_above(span, V{}, b.error, V{});
    FM_ROLLED
    for (int step = 0; step <= 20; ++step) {
        typename SubBlocks<V>::Int code[SUB];
        code_subs(b, (-1.f + 0.1f * float(step) + 15.f) / (b.high - b.low), code);
        improve_subs(b, code);
    }
    b.scale = if_above(span, V{}, b.scale, V{});
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
    /// 63 is the largest; what is below 0 wraps to it, as in the definition, which leaves open what follows
    /// from subnormals: here 0.
    FM_HD static uint8_t six_bits(float v) {
        const uint8_t bits = uint8_t(absolute(v) < 4096.f ? nearest_int(v) : 0);
        return bits < 63 ? bits : 63;
    }
    /// What the search finds of a super-block.
    struct Fit {
        float scale[subs], low[subs];
        uint8_t code[elements];
    };
#if defined(FM_LANES)
    static constexpr int together = LANES < subs ? LANES : subs;
    using Lane = Floats;
    static float& lane(Floats& v, int s) { return reinterpret_cast<float*>(&v)[s]; }
#else
    static constexpr int together = 1;
    using Lane = float;
    FM_HD static float& lane(float& v, int) { return v; }
#endif
    FM_HD static void fit(const float* x, Fit& f) {
        FM_ROLLED
        for (int first = 0; first < subs; first += together) {
            SubBlocks<Lane> b = {};
            Lane mean{};
            for (int s = 0; s < together; ++s) FM_ROLLED
            for (int i = 0; i < SUB; ++i) lane(b.x[i], s) = x[(first + s) * SUB + i];
            FM_ROLLED
            for (int i = 0; i < SUB; ++i) mean += b.x[i] * b.x[i];
            for (int s = 0; s < together; ++s) lane(mean, s) = sqrtf(lane(mean, s) / float(SUB));
            measure_subs(b, mean);
            search_subs(b);
            for (int s = 0; s < together; ++s) {
                f.scale[first + s] = lane(b.scale, s), f.low[first + s] = lane(b.low, s);
                FM_ROLLED
                for (int i = 0; i < SUB; ++i) {
                    Lane code = to_float(b.code[i]);
                    f.code[(first + s) * SUB + i] = uint8_t(lane(code, s));
                }
            }
        }
    }
    FM_HD static void store_scales(const Fit& f, uint8_t* p) {
        float most = 0, deepest = 0;
        for (int s = 0; s < subs; ++s) most = larger(f.scale[s], most), deepest = larger(-f.low[s], deepest);
        const float by_scale = most > 0 ? 63.f / most : 0.f, by_low = deepest > 0 ? 63.f / deepest : 0.f;
        store_half_word(p, float_to_half(most / 63.f));
        store_half_word(p + 2, float_to_half(deepest / 63.f));
        uint8_t scale[subs], low[subs];
        for (int s = 0; s < subs; ++s)
            scale[s] = six_bits(by_scale * f.scale[s]), low[s] = six_bits(by_low * -f.low[s]);
        for (int s = 0; s < 4; ++s) {
            p[4 + s] = uint8_t(scale[s] | scale[s + 4] >> 4 << 6);
            p[8 + s] = uint8_t(low[s] | low[s + 4] >> 4 << 6);
            p[12 + s] = uint8_t((scale[s + 4] & 15) | (low[s + 4] & 15) << 4);
        }
    }
    /// Codes are found anew with the scales as they are stored, but where that is zero.
    FM_HD static void encode(const Coded&, const float* x, uint8_t* p) {
        Fit f;
        fit(x, f);
        store_scales(f, p);
        const float d = half_to_float(load_half_word(p)), dmin = half_to_float(load_half_word(p + 2));
        for (int s = 0; s < subs; ++s) {
            const float scale = d * float(scale_bits(p + 4, s)), low = dmin * float(minimum_bits(p + 4, s));
            if (scale == 0) continue;
            const auto code = [&](auto v) FM_EACH_LAMBDA {
                return nearest_int(clamped((v + low) / scale, 0.f, 15.f));
            };
            encode_bytes(x + s * SUB, SUB, code, f.code + s * SUB);
        }
        for (int h = 0; h < 4; ++h) FM_ROLLED
        for (int i = 0; i < 32; ++i)
            p[16 + 32 * h + i] = uint8_t(f.code[64 * h + i] | f.code[64 * h + 32 + i] << 4);
    }
    FM_HD static void decode(const Coded&, const uint8_t* p, float* out) {
        const float d = half_to_float(load_half_word(p)), dmin = half_to_float(load_half_word(p + 2));
        const auto values = [&](int s) {
            const float scale = d * float(scale_bits(p + 4, s)), low = dmin * float(minimum_bits(p + 4, s));
            return values_of([&](int k) FM_EACH_LAMBDA { return scale * float(k) - low; });
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
        for (int run = 0; run < 16; ++run) {  // of 16 elements that share a scale, eight to a half
            const int half = run / 8, part = run % 8 / 2, from = run % 2 * 16;
            const uint8_t *low = p + 64 * half + 32 * (part % 2) + from, *high = p + 128 + 32 * half + from;
            const float scale = d * float(int8_t(p[192 + run]));
            const int low_shift = part / 2 * 4, high_shift = 2 * part;
            for (int i = 0; i < 16; ++i) {
                const int q = (low[i] >> low_shift & 15) | (high[i] >> high_shift & 3) << 4;
                out[16 * run + i] = scale * float(q - 32);
            }
        }
    }
};

}  // namespace FM_ISA
}  // namespace fastmerge
