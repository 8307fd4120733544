// Float32 to codes, a tile at a time: values that are already rounded to the coding's type.
#pragma once
#include "core/four_bit/bitsandbytes.hpp"
#include "core/four_bit/integers.hpp"

namespace fastmerge {
namespace FM_ISA {

/// What one call of encode_tile needs: rows from a multiple of `rows`, columns from and to a multiple of
/// `cols` or to the end of the row; cols 0: whole rows.
struct Tile {
    int64_t rows, cols;
};

/// Whether the format can be written.
FM_HD inline bool encodes(const Coded& c) {
    return c.format == Format::Dense || c.format == Format::Int4 || c.format == Format::BnbNf4 ||
           c.format == Format::BnbFp4;
}

FM_HD inline Tile tile_of(const Coded& c) {
    switch (c.format) {
        case Format::Int4:
            return {c.symmetric ? 1 : 8, c.group % 8 == 0 ? c.group : 0};
        case Format::BnbNf4:
        case Format::BnbFp4:
            return {1, c.group};
        default:
            return {1, 1};
    }
}

FM_HD inline void encode_dense(const Coded& c, int64_t row, int rows, int64_t col, int64_t cols,
                               const float* x, int64_t stride) {
    for (int r = 0; r < rows; ++r) {
        const int64_t first = stored_row(c, row + r) * c.cols + col;
        for (int64_t j = 0; j < cols; j += PIECE)
            store_run(x + r * stride + j, c.codes, c.type, first + j,
                      int(cols - j < PIECE ? cols - j : PIECE));
    }
}

/// Code x into rows [row, row + rows), columns [col, col + cols). bitsandbytes: row 0, col a flat index that
/// begins a block. stride: elements between rows of x.
FM_HD inline void encode_tile(const Coded& c, int64_t row, int rows, int64_t col, int64_t cols,
                              const float* x, int64_t stride) {
    switch (c.format) {
        case Format::Dense:
            return encode_dense(c, row, rows, col, cols, x, stride);
        case Format::Int4:
            return encode_int4(c, row, rows, col, cols, x, stride);
        case Format::BnbNf4:
            return c.other_rule ? encode_bnb<Nf4, true>(c, col, cols, x)
                                : encode_bnb<Nf4, false>(c, col, cols, x);
        case Format::BnbFp4:
            return c.other_rule ? encode_bnb<Fp4, true>(c, col, cols, x)
                                : encode_bnb<Fp4, false>(c, col, cols, x);
        default:
            return;
    }
}

/// The scale of a whole tensor whose largest magnitude is `peak`.
FM_HD inline float tensor_scale_of(const Coded& c, float peak) {
    if (c.format == Format::Nvfp4) {
        const float g = rounded_to(c.type, rounded_to(c.type, 1.f / peak) * 2688.f);
        return magnitude_bits(g) < 0x7f800000 ? g : 1.f;
    }
    return peak > 0 ? peak / 448.f : 1.f;
}

}  // namespace FM_ISA
}  // namespace fastmerge
