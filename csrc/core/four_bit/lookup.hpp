// Values of 4-bit codes: what a format computes from a code and its group's scale, it computes for 16 codes.
#pragma once
#include <utility>

#include "core/four_bit/scalars.hpp"

namespace fastmerge {
namespace FM_ISA {

/// What each code of a group stands for.
struct Values {
    float of[16];
};

template <class F>
FM_EACH Values values_of(const F& value) {
    Values v;
    FM_UNROLL for (int k = 0; k < 16; ++k) v.of[k] = value(k);
    return v;
}

template <class Book, int... K>
FM_EACH Values scaled_book(float scale, std::integer_sequence<int, K...>) {
#if defined(FM_LOOK_UP)
    static constexpr float book[16] = {Book::value(K)...};
    Values v;
    scale_table(book, scale, v.of);
    return v;
#else
    return {{Book::value(K) * scale...}};  // each a constant, which a loop would fetch from memory
#endif
}

/// Book::value(code) * scale.
template <class Book>
FM_EACH Values book_values(float scale) {
    return scaled_book<Book>(scale, std::make_integer_sequence<int, 16>());
}

/// Of n nibbles from number `first`.
template <bool HIGH_FIRST>
FM_EACH void decode_pairs(const Values& v, const uint8_t* bytes, int64_t first, int n, float* out) {
    int j = 0;
#if defined(FM_LOOK_UP)
    if (first % 2 == 0 && n >= 16) {
        j = n / 16 * 16;
        look_up_pairs<HIGH_FIRST>(v.of, bytes + first / 2, j, out);
    }
#endif
    for (; j < n; ++j) {
        const int64_t at = first + j;
        out[j] = v.of[bytes[at / 2] >> (((at & 1) != 0) != HIGH_FIRST ? 4 : 0) & 15];
    }
}

/// Of the low nibbles of N bytes, then of the high ones.
template <int N>
FM_EACH void decode_halves(const Values& low, const Values& high, const uint8_t* bytes, float* out) {
#if defined(FM_LOOK_UP)
    look_up_halves<N>(low.of, high.of, bytes, out);
#else
    for (int j = 0; j < N; ++j) out[j] = low.of[bytes[j] & 15], out[N + j] = high.of[bytes[j] >> 4];
#endif
}

}  // namespace FM_ISA
}  // namespace fastmerge
