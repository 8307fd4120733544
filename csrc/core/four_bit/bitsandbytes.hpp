// bitsandbytes NF4 and FP4: blocks over the flattened tensor, whose scale is their largest magnitude.
#pragma once
#include "core/four_bit/dynamic_map.hpp"
#include "core/four_bit/lookup.hpp"
#include "core/four_bit/search.hpp"

namespace fastmerge {
namespace FM_ISA {

/// values[i], without a table in each thread's memory where it would be one.
template <int N>
FM_EACH constexpr float chosen(const float* values, int i) {
#if defined(__CUDA_ARCH__)
    if constexpr (N > 1) {
        const float low = chosen<N / 2>(values, i), high = chosen<N / 2>(values + N / 2, i);
        return i & (N / 2) ? high : low;
    } else {
        return values[0];
    }
#else
    return values[i];
#endif
}

struct Nf4 {
    static constexpr bool is_fp4 = false;
    /// By rank: ascending.
    FM_EACH static constexpr float ranked(int rank) {
        constexpr float values[16] = {
            -1.f,
            -0.6961928009986877f,
            -0.5250730514526367f,
            -0.39491748809814453f,
            -0.28444138169288635f,
            -0.18477343022823334f,
            -0.09105003625154495f,
            0.f,
            0.07958029955625534f,
            0.16093020141124725f,
            0.24611230194568634f,
            0.33791524171829224f,
            0.44070982933044434f,
            0.5626170039176941f,
            0.7229568362236023f,
            1.f,
        };
        return chosen<16>(values, rank);
    }
    FM_EACH static constexpr float value(int code) { return ranked(code); }
};

/// Not E2M1: magnitudes 0, 1/16, 8, 12, 4, 6, 2, 3 of 12.
struct Fp4 {
    static constexpr bool is_fp4 = true;
    FM_EACH static constexpr float value(int code) {
        constexpr float values[8] = {0.f,      0.0625f / 12, 8.f / 12, 12.f / 12,
                                     4.f / 12, 6.f / 12,     2.f / 12, 3.f / 12};
        const float size = chosen<8>(values, code & 7);
        return code & 8 ? -size : size;
    }
    /// Ranks 7 and 8 are the two zeros, of which 0 sorts before -0 (code 8).
    FM_EACH static constexpr int code_of_rank(int rank) {
        const int magnitude = rank < 8 ? 7 - rank : rank - 8;
        return ((rank < 7) | (rank == 8) ? 8 : 0) | (magnitude ^ (magnitude & 2) << 1);
    }
    FM_EACH static constexpr float ranked(int rank) { return value(code_of_rank(rank)); }
};

/// Between the values of ranks K and K + 1.
template <class Book, int K>
struct Midpoint {
    static constexpr float value = (Book::ranked(K) + Book::ranked(K + 1)) / 2;
};

#if defined(FM_RANKS)
/// As Fp4::code_of_rank.
FM_EACH Ints fp4_codes_of_ranks(Ints rank) {
    const Ints from_zero = rank - 8, negative = from_zero >> 31;
    const Ints magnitude = from_zero ^ negative, is_zero = (magnitude - 1) >> 31;
    return ((negative ^ is_zero) & 8) | (magnitude ^ ((magnitude & 2) << 1));
}

template <class Book, int... K>
FM_EACH Ints code_by_midpoints(Floats s, std::integer_sequence<int, K...>) {
    constexpr float midpoints[] = {Midpoint<Book, K>::value...};
    const Ints rank = Bounds(midpoints).rank(s);
    return Book::is_fp4 ? fp4_codes_of_ranks(rank) : rank;
}
#endif

/// Of the nearest value, by the midpoints strictly below s: a tie takes the lower rank.
template <class Book, class V, int... K>
FM_EACH auto code_by_midpoints(V s, std::integer_sequence<int, K...>) {
    decltype(as_int(s)) code{};
    if constexpr (Book::is_fp4) {
        code += Book::code_of_rank(0);
        ((code = if_above(s, Midpoint<Book, K>::value, Book::code_of_rank(K + 1), code)), ...);
    } else {
        ((code = plus_if_above(code, s, Midpoint<Book, K>::value)), ...);
    }
    return code;
}

template <class Book, class V, int... K>
FM_EACH V value_by_midpoints(V s, std::integer_sequence<int, K...>) {
    V value = V{} + Book::ranked(0);
    ((value = if_above(s, Midpoint<Book, K>::value, Book::ranked(K + 1), value)), ...);
    return value;
}

/// As the CUDA kernel has FP4: thresholds on the magnitude, ties towards zero, a negative zero keeps its
/// sign.
template <int K>
struct CudaThreshold {
    static constexpr float of[7] = {0.00260417f, 0.0859375f, 0.20833333f, 0.29166667f,
                                    0.4166667f,  0.583333f,  0.8333333f};
    static constexpr float value = of[K];
};

template <class V, int... K>
FM_EACH auto fp4_code_by_magnitude(V s, std::integer_sequence<int, K...>) {
    decltype(as_int(s)) code{};
    ((code = if_above(absolute(s), CudaThreshold<K>::value, Fp4::code_of_rank(K + 9) & 7, code)), ...);
    return plus_if_above(code, -s, 0.f, 8);
}

template <class V, int... K>
FM_EACH V fp4_value_by_magnitude(V s, std::integer_sequence<int, K...>) {
    V value{};
    ((value = if_above(absolute(s), CudaThreshold<K>::value, Fp4::ranked(K + 9), value)), ...);
    return if_above(-s, 0.f, -value, value);
}

/// The code of a scaled value.
template <class Book, bool CUDA_RULE, class V>
FM_EACH auto bnb_code(V s) {
    if constexpr (CUDA_RULE && Book::is_fp4)
        return fp4_code_by_magnitude(s, std::make_integer_sequence<int, 7>());
    else
        return code_by_midpoints<Book>(s, std::make_integer_sequence<int, 15>());
}

/// The value of that code.
template <class Book, bool CUDA_RULE, class V>
FM_EACH V bnb_nearest(V s) {
    if constexpr (CUDA_RULE && Book::is_fp4)
        return fp4_value_by_magnitude(s, std::make_integer_sequence<int, 7>());
    else
        return value_by_midpoints<Book>(s, std::make_integer_sequence<int, 15>());
}

/// How a block is scaled before it is coded: times the reciprocal, but by division in a short last block of
/// the CPU's rule, which also keeps the scale from being zero.
struct BnbScale {
    float divisor, reciprocal;
    bool divide;
};

FM_HD inline BnbScale bnb_scale(float peak, bool is_short, bool cuda_rule) {
    const float divisor = !cuda_rule && peak < 1e-38f ? 1e-38f : peak;
    return {divisor, 1.f / divisor, is_short && !cuda_rule};
}

/// What is stored as a block's largest magnitude: that, or the best of 26 factors of it, 0.60 to 1.10.
template <class Book, bool CUDA_RULE>
FM_TEAM inline float bnb_peak(const Coded& c, const float* x, int n) {
    const float peak = peak_of(x, n);
    if (!c.search) return peak;
    return peak * best_clip(30, 55, 50, [&](float clip) {
               const float stored = peak * clip;
               const BnbScale s = bnb_scale(stored, n < c.group, CUDA_RULE);
               return squared_error(x, n, [&](auto v) FM_EACH_LAMBDA {
                   return bnb_nearest<Book, CUDA_RULE>(s.divide ? v / s.divisor : v * s.reciprocal) * stored -
                          v;
               });
           });
}

template <class Book, bool CUDA_RULE>
FM_TEAM inline void encode_bnb_block(const Coded& c, int64_t block, const float* x, int n) {
    const float peak = bnb_peak<Book, CUDA_RULE>(c, x, n);
    const BnbScale s = bnb_scale(peak, n < c.group, CUDA_RULE);
    store_scale(c.scales, ScaleType::F32, block, s.divide ? s.divisor : peak);
    uint8_t* bytes = c.codes + block * c.group / 2;
    const int rest = n % 2 ? bnb_code<Book, CUDA_RULE>(0.f * s.reciprocal) : 0;
    if (s.divide)
        encode_pairs<true>(
            x, n, [&](auto v) FM_EACH_LAMBDA { return bnb_code<Book, CUDA_RULE>(v / s.divisor); }, rest,
            bytes);
    else
        encode_pairs<true>(
            x, n, [&](auto v) FM_EACH_LAMBDA { return bnb_code<Book, CUDA_RULE>(v * s.reciprocal); }, rest,
            bytes);
}

/// Code flat elements [first, first + n); `first` begins a block.
template <class Book, bool CUDA_RULE>
FM_TEAM inline void encode_bnb(const Coded& c, int64_t first, int64_t n, const float* x) {
    int64_t block = quotient(first - c.origin, c.group);
    for (int64_t i = 0; i < n; i += c.group, ++block)
        encode_bnb_block<Book, CUDA_RULE>(c, block, x + i, int(n - i < c.group ? n - i : c.group));
}

/// Scale of a block of the tensor; `first` is the first that `scales` holds.
FM_HD inline float bnb_absmax(const Coded& c, int64_t block, int64_t first) {
    if (!c.nested) return load_scale(c.scales, ScaleType::F32, block - first);
    return dynamic_value(c.scales[block - first]) * c.nested[block / 256] + c.nested_offset;
}

/// Flat elements [flat, flat + m).
template <class Book>
FM_HD inline void decode_bnb(const Coded& c, int64_t flat, int m, float* out) {
    const int64_t first = c.origin / c.group;
    visit_groups(c.group, flat, m, out, [&](int64_t block, int64_t at, int n, float* to) {
        const Values v = book_values<Book>(bnb_absmax(c, block, first));
        decode_pairs<true>(v, c.codes, at - c.origin, n, to);
    });
}

}  // namespace FM_ISA
}  // namespace fastmerge
