// Eight bits: E4M3 with scales of the tensor, of rows or of blocks; bitsandbytes' int8, which is only read.
#pragma once
#include "core/four_bit/scalars.hpp"

namespace fastmerge {
namespace FM_ISA {

/// Index of the scale of a stored row and a column.
FM_HD inline int64_t fp8_scale_at(const Coded& c, int64_t row, int64_t col) {
    return c.group_rows == 0 ? 0
                             : quotient(row, c.group_rows) * groups_of_row(c) + quotient(col, group_size(c));
}

/// Columns [col, col + m) of a stored row.
FM_HD inline void decode_fp8(const Coded& c, int64_t row, int64_t col, int m, float* out) {
    const int64_t group = c.group_rows ? group_size(c) : c.cols, of_row = fp8_scale_at(c, row, 0);
    const uint8_t* codes = c.codes + row * c.cols;
    visit_groups(group, col, m, out, [&](int64_t g, int64_t at, int n, float* to) {
        const float scale = load_scale(c.scales, c.scale_type, of_row + g);
        for (int j = 0; j < n; ++j) to[j] = e4m3_to_float(codes[at + j]) * scale;
    });
}

/// q * scale / 127
FM_HD inline void decode_int8(const Coded& c, int64_t row, int64_t col, int m, float* out) {
    const float scale = load_scale(c.scales, ScaleType::F32, row);
    const uint8_t* codes = c.codes + row * c.cols;
    for (int j = 0; j < m; ++j) out[j] = float(int8_t(codes[col + j])) * scale / 127.f;
}

FM_HD inline float fp8_scale_of(float peak) {
    return peak > 0 ? peak / 448.f : 1.f;
}

#if !defined(FM_GPU)  // csrc/cuda/quant4.cu has its own loops: a scale may be of more than a team can code
/// Code rows x cols that share the scale number `at`; of the whole tensor's it is given.
inline void encode_fp8_block(const Coded& c, int64_t row, int rows, int64_t col, int64_t cols, const float* x,
                             int64_t stride) {
    const int64_t at = fp8_scale_at(c, stored_row(c, row), col);
    float scale;
    if (c.group_rows == 0) {
        scale = load_scale(c.scales, c.scale_type, at);
    } else {
        float peak = 0;
        for (int r = 0; r < rows; ++r) {
            const float of_row = peak_of(x + r * stride, cols);
            peak = of_row > peak ? of_row : peak;
        }
        scale = store_scale(c.scales, c.scale_type, at, fp8_scale_of(peak));
    }
    for (int r = 0; r < rows; ++r) {
        uint8_t* codes = c.codes + stored_row(c, row + r) * c.cols + col;
        for (int64_t j = 0; j < cols; ++j) codes[j] = uint8_t(float_to_e4m3(x[r * stride + j] / scale));
    }
}

inline void encode_fp8(const Coded& c, int64_t row, int rows, int64_t col, int64_t cols, const float* x,
                       int64_t stride) {
    const int64_t group = c.group_rows ? group_size(c) : cols;
    const int together = c.group_rows > 1 ? c.group_rows : 1;
    for (int r = 0; r < rows; r += together)
        for (int64_t j = 0; j < cols; j += group)
            encode_fp8_block(c, row + r, rows - r < together ? rows - r : together, col + j,
                             cols - j < group ? cols - j : group, x + r * stride + j, stride);
}
#endif

}  // namespace FM_ISA
}  // namespace fastmerge
