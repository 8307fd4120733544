// GGUF's super-blocks of 256: Q4_K, eight sub-blocks with 6-bit scales and minima; Q6_K, which is only read.
//
// A sub-block's sums are sequential in the definition, but sub-blocks do not depend on each other: on the
// host as many as a register has lanes run side by side, which changes no bit.
#pragma once
#include "core/four_bit/gguf.hpp"

namespace fastmerge {
namespace FM_ISA {

constexpr int SUB = 32;  // elements of a sub-block

/// Sub-blocks, one or a lane each, and the best fit so far: x ~ scale * code + low. Codes are not kept but
/// made where they are needed, from the grid that they are on: inverse * (x - from).
template <class V>
struct SubBlocks {
    V x[SUB], root_mean_square;
    V sum_weight, sum_x;  // of weight, and of weight * x
    V low, high, scale, error;
    V inverse, from;

    FM_EACH V weight(int i) const { return root_mean_square + absolute(x[i]); }
};

/// The code of x, a whole number.
template <class V>
FM_EACH V code_on(V x, V inverse, V from) {
    return nearest_whole(clamped(inverse * (x - from), 0.f, 15.f));
}

/// Sums of weights and the range of each sub-block, which holds 0.
template <class V>
FM_HD inline void measure_subs(SubBlocks<V>& b) {
    b.low = b.high = b.x[0];
    b.sum_weight = b.sum_x = V{};
    FM_UNROLL
    for (int i = 0; i < SUB; ++i) {
        const V x = b.x[i], w = b.weight(i);
        b.sum_weight += w, b.sum_x += w * x;
        b.low = smaller(x, b.low), b.high = larger(x, b.high);
    }
    b.low = smaller(b.low, V{});
}

/// Weighted squared error of scale * code + low.
template <class V>
FM_HD inline V error_of_subs(const SubBlocks<V>& b, V inverse, V from, V scale, V low) {
    V error{};
    FM_UNROLL
    for (int i = 0; i < SUB; ++i) {
        const V d = scale * code_on(b.x[i], inverse, from) + low - b.x[i];
        error += b.weight(i) * (d * d);
    }
    return error;
}

/// Fit scale and low to the codes of a grid that begins at the best `low` so far, by weighted least squares,
/// low not above 0; keep them where the error falls.
template <class V>
FM_HD inline void improve_subs(SubBlocks<V>& b, V inverse) {
    V l{}, ll{}, xl{};
    FM_UNROLL
    for (int i = 0; i < SUB; ++i) {
        const V q = code_on(b.x[i], inverse, b.low), wq = b.weight(i) * q;
        l += wq, ll += wq * q, xl += wq * b.x[i];
    }
    const V determinant = b.sum_weight * ll - l * l;
    const V free_low = (ll * b.sum_x - l * xl) / determinant;
    const V free_scale = (b.sum_weight * xl - b.sum_x * l) / determinant;
    const V low = if_above(free_low, V{}, V{}, free_low);
    const V scale = if_above(free_low, V{}, xl / ll, free_scale);
    const V error = error_of_subs(b, inverse, b.low, scale, low);
    const V best = if_above(determinant, V{}, b.error, V{});  // where codes do not tell, nothing is below 0
    b.inverse = if_above(best, error, inverse, b.inverse);
    b.from = if_above(best, error, b.low, b.from);
    b.scale = if_above(best, error, scale, b.scale);
    b.low = if_above(best, error, low, b.low);
    b.error = if_above(best, error, error, b.error);
}

/// Search from the plain range, then on 21 grids.
template <class V>
FM_HD inline void search_subs(SubBlocks<V>& b) {
    const V span = b.high - b.low;
    b.inverse = 15.f / span, b.from = b.low;
    b.scale = 1.f / b.inverse;
    b.error = error_of_subs(b, b.inverse, b.from, b.scale, b.low);
    b.error = if_above(span, V{}, b.error, V{});
    FM_ROLLED
    for (int step = 0; step <= 20; ++step)
        improve_subs(b, (-1.f + 0.1f * float(step) + 15.f) / (b.high - b.low));
    b.scale = if_above(span, V{}, b.scale, V{});
}

/// Fit sub-blocks whose elements are there.
template <class V>
FM_HD inline void fit_subs(SubBlocks<V>& b) {
    V squares{};
    FM_UNROLL
    for (int i = 0; i < SUB; ++i) squares += b.x[i] * b.x[i];
    b.root_mean_square = root_of(squares / float(SUB));
    measure_subs(b);
    search_subs(b);
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
    /// A sub-block's scale and minimum in six bits, and those of the super-block that they count in.
    struct Stored {
        uint8_t scale, minimum;
    };
    FM_HD static Stored stored(float scale, float low, float most, float deepest) {
        const float by_scale = most > 0 ? 63.f / most : 0.f, by_low = deepest > 0 ? 63.f / deepest : 0.f;
        return {six_bits(by_scale * scale), six_bits(by_low * -low)};
    }
    /// The three bytes of sub-blocks s and s + 4.
    FM_HD static void store_scales(Stored first, Stored second, uint8_t* p, int s) {
        p[4 + s] = uint8_t(first.scale | second.scale >> 4 << 6);
        p[8 + s] = uint8_t(first.minimum | second.minimum >> 4 << 6);
        p[12 + s] = uint8_t((second.scale & 15) | (second.minimum & 15) << 4);
    }
    /// Codes are found anew with the scale as it is stored.
    template <class V>
    FM_EACH static V final_code(V x, float scale, float low) {
        return nearest_whole(clamped((x + low) / scale, 0.f, 15.f));
    }
#if defined(FM_GPU)
    /// By eight lanes, of which each has a sub-block.
    FM_APART static void encode(const Coded&, const float* x, uint8_t* p) {
        const uint32_t mask = team_mask<subs>();
        const int s = int(threadIdx.x % subs);
        SubBlocks<float> b;
        FM_UNROLL
        for (int i = 0; i < SUB; i += 4) {
            const float4 four = *reinterpret_cast<const float4*>(x + s * SUB + i);
            b.x[i] = four.x, b.x[i + 1] = four.y, b.x[i + 2] = four.z, b.x[i + 3] = four.w;
        }
        fit_subs(b);
        float most = larger(b.scale, 0.f), deepest = larger(-b.low, 0.f);
        FM_UNROLL
        for (int distance = subs / 2; distance > 0; distance /= 2) {
            most = larger(__shfl_xor_sync(mask, most, distance, subs), most);
            deepest = larger(__shfl_xor_sync(mask, deepest, distance, subs), deepest);
        }
        const uint16_t d_bits = float_to_half(most / 63.f), dmin_bits = float_to_half(deepest / 63.f);
        const Stored mine = stored(b.scale, b.low, most, deepest);
        const uint32_t both =
            __shfl_down_sync(mask, uint32_t(mine.scale | mine.minimum << 8), subs / 2, subs);
        if (s == 0) store_half_word(p, d_bits), store_half_word(p + 2, dmin_bits);
        if (s < 4) store_scales(mine, {uint8_t(both), uint8_t(both >> 8)}, p, s);
        const float scale = half_to_float(d_bits) * float(mine.scale);
        const float low = half_to_float(dmin_bits) * float(mine.minimum);
        // Of two neighbours one has the low nibbles, the other the high ones: each writes half their bytes.
        const bool high = s % 2 != 0;
        uint32_t word[SUB / 4];
        FM_UNROLL
        for (int w = 0; w < SUB / 4; ++w) {
            word[w] = 0;
            FM_UNROLL
            for (int i = 0; i < 4; ++i) {
                const float v = b.x[4 * w + i];
                const float code = scale == 0 ? code_on(v, b.inverse, b.from) : final_code(v, scale, low);
                word[w] |= uint32_t(code) << 8 * i;
            }
        }
        FM_UNROLL
        for (int w = 0; w < SUB / 8; ++w) {
            const uint32_t other = __shfl_xor_sync(mask, high ? word[w] : word[w + SUB / 8], 1, subs);
            store_word(p + 16 + s / 2 * 32 + (high ? 16 : 0), w,
                       high ? other | word[w + SUB / 8] << 4 : word[w] | other << 4);
        }
    }
#else
    static constexpr int together = LANES < subs ? LANES : subs;

    static float& lane(Floats& v, int s) { return reinterpret_cast<float*>(&v)[s]; }

    static void encode(const Coded&, const float* x, uint8_t* p) {
        float scale[subs], low[subs], code[elements];
        for (int first = 0; first < subs; first += together) {
            SubBlocks<Floats> b = {};
            for (int s = 0; s < together; ++s)
                for (int i = 0; i < SUB; ++i) lane(b.x[i], s) = x[(first + s) * SUB + i];
            fit_subs(b);
            for (int s = 0; s < together; ++s)
                scale[first + s] = lane(b.scale, s), low[first + s] = lane(b.low, s);
            for (int i = 0; i < SUB; ++i) {
                Floats codes = code_on(b.x[i], b.inverse, b.from);
                for (int s = 0; s < together; ++s) code[(first + s) * SUB + i] = lane(codes, s);
            }
        }
        float most = 0, deepest = 0;
        for (int s = 0; s < subs; ++s) most = larger(scale[s], most), deepest = larger(-low[s], deepest);
        store_half_word(p, float_to_half(most / 63.f));
        store_half_word(p + 2, float_to_half(deepest / 63.f));
        Stored bits[subs];
        for (int s = 0; s < subs; ++s) bits[s] = stored(scale[s], low[s], most, deepest);
        for (int s = 0; s < 4; ++s) store_scales(bits[s], bits[s + 4], p, s);
        const float d = half_to_float(load_half_word(p)), dmin = half_to_float(load_half_word(p + 2));
        for (int s = 0; s < subs; ++s) {
            const float final_scale = d * float(bits[s].scale), final_low = dmin * float(bits[s].minimum);
            if (final_scale == 0) continue;
            for (int i = 0; i < SUB; i += LANES) {
                const Floats v = read<Floats>(x + s * SUB + i);
                const Floats found = final_code(v, final_scale, final_low);
                memcpy(code + s * SUB + i, &found, sizeof found);
            }
        }
        for (int h = 0; h < 4; ++h)
            for (int i = 0; i < 32; ++i)
                p[16 + 32 * h + i] = uint8_t(int(code[64 * h + i]) | int(code[64 * h + 32 + i]) << 4);
    }
#endif
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
