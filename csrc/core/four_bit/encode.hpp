// Float32 to codes, a tile at a time: values that are already rounded to the coding's type.
#pragma once
#include "core/four_bit/bitsandbytes.hpp"
#include "core/four_bit/fp8.hpp"
#include "core/four_bit/integers.hpp"
#include "core/four_bit/kquants.hpp"
#include "core/four_bit/words.hpp"

namespace fastmerge {
namespace FM_ISA {

/// What one call of encode_tile needs: rows from a multiple of `rows`, columns from and to a multiple of
/// `cols` or to the end of the row; cols 0: whole rows.
struct Tile {
    int64_t rows, cols;
};

/// Whether the format can be written.
FM_HD inline bool encodes(const Coded& c) {
    return c.format != Format::Q6_K && c.format != Format::GgufNvfp4 && c.format != Format::Int8;
}

FM_HD inline Tile tile_of(const Coded& c) {
    const int64_t of_eight = c.group % 8 == 0   ? c.group
                             : c.group % 4 == 0 ? c.group * 2
                                                : int64_t(c.group) * 8;
    switch (c.format) {
        case Format::BnbNf4:
        case Format::BnbFp4:
        case Format::Nvfp4:
        case Format::Mxfp4:
            return {1, c.group};
        case Format::Int4:
            return {c.symmetric ? 1 : 8, of_eight};
        case Format::Gptq:
        case Format::Awq:
            return {8, of_eight};
        case Format::Q4_0:
        case Format::Q4_1:
        case Format::Q8_0:
        case Format::GgufMxfp4:
            return {1, 32};
        case Format::GgufNvfp4:
            return {1, 64};
        case Format::Q4_K:
        case Format::Q6_K:
            return {1, 256};
        case Format::Fp8:
            return c.group_rows ? Tile{c.group_rows, c.group} : Tile{1, 1};
        default:
            return {1, 1};
    }
}

FM_TEAM inline void encode_dense(const Coded& c, int64_t row, int rows, int64_t col, int64_t cols,
                                 const float* x, int64_t stride) {
    for (int r = 0; r < rows; ++r) {
        const int64_t first = stored_row(c, row + r) * c.cols + col;
#if defined(FM_GPU)
        for (int64_t j = team_lane(); j < cols; j += TEAM)
            store_run(x + r * stride + j, c.codes, c.type, first + j, 1);
#else
        store_run(x + r * stride, c.codes, c.type, first, int(cols));
#endif
    }
}

/// Code x into rows [row, row + rows), columns [col, col + cols). bitsandbytes: row 0, col a flat index that
/// begins a block. stride: elements between rows of x. format: c's, a constant where that is known.
FM_EACH_TEAM void encode_tile(Format format, const Coded& c, int64_t row, int rows, int64_t col, int64_t cols,
                              const float* x, int64_t stride) {
    switch (format) {
        case Format::Dense:
            return encode_dense(c, row, rows, col, cols, x, stride);
        case Format::BnbNf4:
            return c.other_rule ? encode_bnb<Nf4, true>(c, col, cols, x)
                                : encode_bnb<Nf4, false>(c, col, cols, x);
        case Format::BnbFp4:
            return c.other_rule ? encode_bnb<Fp4, true>(c, col, cols, x)
                                : encode_bnb<Fp4, false>(c, col, cols, x);
        case Format::Int4:
            return encode_int4(c, row, rows, col, cols, x, stride);
        case Format::Nvfp4:
            return encode_micro<Nvfp4Group>(c, row, rows, col, cols, x, stride);
        case Format::Mxfp4:
            return encode_micro<Mxfp4Group>(c, row, rows, col, cols, x, stride);
        case Format::Gptq:
        case Format::Awq:
            return encode_word_rows(c, row, rows, col, cols, x, stride);
        case Format::Q4_0:
            return encode_blocks<BlockQ4_0>(c, row, rows, col, cols, x, stride);
        case Format::Q4_1:
            return encode_blocks<BlockQ4_1>(c, row, rows, col, cols, x, stride);
        case Format::Q8_0:
            return encode_blocks<BlockQ8_0>(c, row, rows, col, cols, x, stride);
        case Format::Q4_K:
            return encode_blocks<BlockQ4_K>(c, row, rows, col, cols, x, stride);
        case Format::GgufMxfp4:
            return encode_blocks<BlockMxfp4>(c, row, rows, col, cols, x, stride);
#if !defined(FM_GPU)
        case Format::Fp8:
            return encode_fp8(c, row, rows, col, cols, x, stride);
#endif
        default:
            return;
    }
}

#if !defined(FM_GPU)
inline void encode_tile(const Coded& c, int64_t row, int rows, int64_t col, int64_t cols, const float* x,
                        int64_t stride) {
    encode_tile(c.format, c, row, rows, col, cols, x, stride);
}
#endif

/// The scale of a whole tensor whose largest magnitude is `peak`.
FM_HD inline float tensor_scale_of(const Coded& c, float peak) {
    return c.format == Format::Nvfp4 ? nvfp4_divisor(c.type, peak) : fp8_scale_of(peak);
}

}  // namespace FM_ISA
}  // namespace fastmerge
