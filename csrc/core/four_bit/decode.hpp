// Codes to float32: elements of a coded tensor wherever they begin, over rows and blocks.
#pragma once
#include "core/four_bit/bitsandbytes.hpp"
#include "core/four_bit/fp8.hpp"
#include "core/four_bit/integers.hpp"
#include "core/four_bit/kquants.hpp"
#include "core/four_bit/words.hpp"

namespace fastmerge {
namespace FM_ISA {

/// Columns [col, col + m) of a stored row, counted from the row of `origin`.
FM_HD inline void decode_row(const Coded& c, int64_t row, int64_t col, int m, float* out) {
    switch (c.format) {
        case Format::Int4:
            return decode_int4(c, row, col, m, out);
        case Format::Nvfp4:
            return decode_micro<Nvfp4Group>(c, row, col, m, out);
        case Format::Mxfp4:
            return decode_micro<Mxfp4Group>(c, row, col, m, out);
        case Format::Gptq:
        case Format::Awq:
            return decode_words(c, row, col, m, out);
        case Format::Q4_0:
            return decode_blocks<BlockQ4_0>(c, row, col, m, out);
        case Format::Q4_1:
            return decode_blocks<BlockQ4_1>(c, row, col, m, out);
        case Format::Q8_0:
            return decode_blocks<BlockQ8_0>(c, row, col, m, out);
        case Format::Q4_K:
            return decode_blocks<BlockQ4_K>(c, row, col, m, out);
        case Format::Q6_K:
            return decode_blocks<BlockQ6_K>(c, row, col, m, out);
        case Format::GgufMxfp4:
            return decode_blocks<BlockMxfp4>(c, row, col, m, out);
        case Format::GgufNvfp4:
            return decode_blocks<BlockNvfp4>(c, row, col, m, out);
        case Format::Fp8:
            return decode_fp8(c, row, col, m, out);
        case Format::Int8:
            return decode_int8(c, row, col, m, out);
        default:
            return load_run(c.codes, c.type, row * c.cols + col, m, out);
    }
}

/// Add low_scale * (B A) to flat elements [flat, flat + m).
FM_HD inline void add_low_rank(const Coded& c, int64_t flat, int m, float* out) {
    constexpr int most = 64;
    for (int done = 0; done < m;) {
        const int64_t row = (flat + done) / c.cols, col = (flat + done) % c.cols;
        int n = m - done < most ? m - done : most;
        n = c.cols - col < n ? int(c.cols - col) : n;
        float sum[most] = {}, a[most] = {}, b = 0;
        for (int r = 0; r < c.rank; ++r) {
            load_run(c.low_b, c.low_type, row * c.rank + r, 1, &b);
            load_run(c.low_a, c.low_type, r * c.cols + col, n, a);
            for (int j = 0; j < most; ++j) sum[j] += b * a[j];
        }
        for (int j = 0; j < n; ++j) out[done + j] += c.low_scale * sum[j];
        done += n;
    }
}

/// Elements [i, i + m) of the run: flat indices of the tensor from first + i.
FM_HD inline void decode_run(const Coded& c, int64_t i, int m, float* out) {
    const int64_t flat = c.first + i;
    if (c.format == Format::BnbNf4) {
        decode_bnb<Nf4>(c, flat, m, out);
    } else if (c.format == Format::BnbFp4) {
        decode_bnb<Fp4>(c, flat, m, out);
    } else {
        int64_t row = flat / c.cols, col = flat % c.cols;
        for (int done = 0; done < m; ++row, col = 0) {
            const int n = c.cols - col < m - done ? int(c.cols - col) : m - done;
            decode_row(c, stored_row(c, row), col, n, out + done);
            done += n;
        }
    }
    if (c.rank > 0) add_low_rank(c, flat, m, out);
}

}  // namespace FM_ISA
}  // namespace fastmerge
