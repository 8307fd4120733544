// GGUF's small block types: a row is a run of blocks, each with its scales before its codes.
#pragma once
#include "core/four_bit/microscaling.hpp"

namespace fastmerge {
namespace FM_ISA {

FM_HD inline float reciprocal_or_zero(float d) {
    return d != 0 ? 1.f / d : 0.f;
}

/// The element of the largest magnitude, the first of equals, of 32; +0 if all are zero.
FM_TEAM inline float signed_peak(const float* x) {
    const Range r = range_of(x, 32);
    const float peak = larger(-r.low, r.high);
    if (-r.low != r.high) return r.high == peak ? peak : -peak;
    for (int j = 0; j < 32; ++j)
        if (absolute(x[j]) == peak && peak > 0) return x[j];
    return 0.f;
}

struct BlockQ4_0 {
    static constexpr int elements = 32, bytes = 18;

    template <class V>
    FM_EACH static auto code(V scaled) {
        return truncated(clamped(scaled + 8.5f, 0.f, 15.f));
    }
    FM_TEAM static void encode(const Coded& c, const float* x, uint8_t* p) {
        const float peak = signed_peak(x);
        float d = peak / -8.f;
        if (c.search) {
            const auto error = [&](float clip) {
                const float candidate = peak * clip / -8.f, r = reciprocal_or_zero(candidate);
                const float stored = rounded_to<DType::F16>(candidate);
                return squared_error(
                    x, 32, [&](auto v) FM_EACH_LAMBDA { return to_float(code(v * r) - 8) * stored - v; });
            };
            d = peak * best_integer_clip(error) / -8.f;
        }
        const float r = reciprocal_or_zero(d);
        store_half_word(p, float_to_half(d));
        encode_halves(x, [&](auto v) FM_EACH_LAMBDA { return code(v * r); }, p + 2);
    }
    FM_HD static void decode(const Coded&, const uint8_t* p, float* out) {
        const float d = half_to_float(load_half_word(p));
        const Values v = values_of([&](int k) FM_EACH_LAMBDA { return d * float(k - 8); });
        decode_halves<16>(v, v, p + 2, out);
    }
};

struct BlockQ4_1 {
    static constexpr int elements = 32, bytes = 20;

    template <class V>
    FM_EACH static auto code(V scaled) {
        return truncated(clamped(scaled + 0.5f, 0.f, 15.f));
    }
    /// A least value of zero has the sign of the first zero, as a sequential search finds it.
    FM_TEAM static Range range(const float* x) {
        Range r = range_of(x, 32);
        for (int j = 31; j >= 0 && r.low == 0; --j) r.low = x[j] == 0 ? x[j] : r.low;
        return r;
    }
    /// The least value where a range of 15 steps shrinks to a part of it, towards its middle.
    FM_HD static float low_of(float low, float step, float clip) {
        return clip < 1.f ? low + step * (1.f - clip) * 7.5f : low;
    }
    FM_TEAM static void encode(const Coded& c, const float* x, uint8_t* p) {
        const Range all = range(x);
        float low = all.low, d = (all.high - all.low) / 15.f;
        if (c.search) {
            const auto error = [&](float clip) {
                const float m = low_of(low, d, clip), step = d * clip, r = reciprocal_or_zero(step);
                const float stored = rounded_to<DType::F16>(step), base = rounded_to<DType::F16>(m);
                return squared_error(x, 32, [&](auto v) FM_EACH_LAMBDA {
                    return to_float(code((v - m) * r)) * stored + base - v;
                });
            };
            const float clip = best_integer_clip(error);
            low = low_of(low, d, clip), d = d * clip;
        }
        const float r = reciprocal_or_zero(d);
        store_half_word(p, float_to_half(d));
        store_half_word(p + 2, float_to_half(low));
        encode_halves(x, [&](auto v) FM_EACH_LAMBDA { return code((v - low) * r); }, p + 4);
    }
    FM_HD static void decode(const Coded&, const uint8_t* p, float* out) {
        const float d = half_to_float(load_half_word(p)), low = half_to_float(load_half_word(p + 2));
        const Values v = values_of([&](int k) FM_EACH_LAMBDA { return d * float(k) + low; });
        decode_halves<16>(v, v, p + 4, out);
    }
};

struct BlockQ8_0 {
    static constexpr int elements = 32, bytes = 34;

    /// Halves away from zero. x - r is exact.
    FM_EACH static int rounded(float x) {
        const int r = nearest_int(x);
        const float rest = x - float(r);
        return r + ((rest == 0.5f) & (x > 0)) - ((rest == -0.5f) & (x < 0));
    }
    FM_TEAM static void encode(const Coded&, const float* x, uint8_t* p) {
        const float d = peak_of(x, 32) / 127.f, r = reciprocal_or_zero(d);
        store_half_word(p, float_to_half(d));
        for (int j = team_lane(); j < 32; j += TEAM)
            p[2 + j] = uint8_t(rounded(clamped(x[j] * r, -127.f, 127.f)));
    }
    FM_HD static void decode(const Coded&, const uint8_t* p, float* out) {
        const float d = half_to_float(load_half_word(p));
        for (int j = 0; j < 32; ++j) out[j] = d * float(int8_t(p[2 + j]));
    }
};

struct BlockMxfp4 {
    static constexpr int elements = 32, bytes = 17;

    FM_TEAM static void encode(const Coded& c, const float* x, uint8_t* p) {
        const int e = mx_exponent_of<true>(x, 32, true, c.search);
        const float reciprocal = mx_reciprocal(e);
        *p = uint8_t(e);
        encode_halves(x, [&](auto v) FM_EACH_LAMBDA { return e2m1_code<true>(v * reciprocal); }, p + 1);
    }
    FM_HD static void decode(const Coded&, const uint8_t* p, float* out) {
        const Values v = book_values<E2m1>(e8m0_to_float(*p));
        decode_halves<16>(v, v, p + 1, out);
    }
};

/// Four scales without sign, then 16 codes of each in 8 bytes, the second half in the high nibbles.
struct BlockNvfp4 {
    static constexpr int elements = 64, bytes = 36;

    FM_HD static void decode(const Coded& c, const uint8_t* p, float* out) {
        for (int g = 0; g < 4; ++g) {
            const float d = (p[g] & 0x7f) == 0x7f ? 0.f : e4m3_to_float(p[g] & 0x7f);
            Values v = book_values<E2m1>(d);
            v = values_of([&](int k) FM_EACH_LAMBDA { return v.of[k] * c.tensor_scale; });
            decode_halves<8>(v, v, p + 4 + 8 * g, out + 16 * g);
        }
    }
};

/// Code rows of whole blocks.
template <class Block>
FM_TEAM inline void encode_blocks(const Coded& c, int64_t row, int rows, int64_t col, int64_t cols,
                                  const float* x, int64_t stride) {
    const int64_t blocks = c.cols / Block::elements;
    for (int r = 0; r < rows; ++r) {
        uint8_t* p = c.codes + (stored_row(c, row + r) * blocks + col / Block::elements) * Block::bytes;
        for (int64_t j = 0; j < cols; j += Block::elements, p += Block::bytes)
            Block::encode(c, x + r * stride + j, p);
    }
}

/// Columns [col, col + m) of a stored row.
template <class Block>
FM_HD inline void decode_blocks(const Coded& c, int64_t row, int64_t col, int m, float* out) {
    constexpr int size = Block::elements;
    const uint8_t* p = c.codes + (row * (c.cols / size) + col / size) * Block::bytes;
    for (int skip = int(col % size); m > 0; skip = 0, p += Block::bytes) {
        const int n = size - skip < m ? size - skip : m;
        if (n == size) {
            Block::decode(c, p, out);
        } else {
            float whole[size];
            Block::decode(c, p, whole);
            for (int j = 0; j < n; ++j) out[j] = whole[skip + j];
        }
        m -= n, out += n;
    }
}

}  // namespace FM_ISA
}  // namespace fastmerge
