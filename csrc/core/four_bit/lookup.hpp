// Values of 4-bit codes out of a table of 16.
#pragma once
#include "core/four_bit/scalars.hpp"

namespace fastmerge {
namespace FM_ISA {

/// out[j] = the value that Book gives to code[j].
template <int N, class Book>
FM_HD inline void look_up(const uint8_t* code, int n, float* out) {
    for (int j = 0; j < trips<N>(n); ++j) out[j] = Book::value(code[j]);
}

}  // namespace FM_ISA
}  // namespace fastmerge
