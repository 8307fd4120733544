// Codes to float32, a few neighbours at a time: for a GPU's threads, which have few registers, and many of
// which read the same block. The values are decode.hpp's, which is for long runs.
#pragma once
#include "core/four_bit/bitsandbytes.hpp"
#include "core/four_bit/kquants.hpp"
#include "core/four_bit/words.hpp"

namespace fastmerge {
namespace FM_ISA {

constexpr int FEW = 8;

/// out[j] = value(begin(group number), at + j) for m elements from `at` on, of groups of `group`.
template <class Begin, class Value>
FM_HD inline void few_of_groups(int64_t group, int64_t at, int m, float* out, Begin begin, Value value) {
    int64_t number = at / group, left = group - at % group;
    auto of_group = begin(number);
    FM_ROLLED
    for (int j = 0; j < m; ++j, --left) {
        if (left == 0) of_group = begin(++number), left = group;
        out[j] = value(of_group, at + j);
    }
}

template <bool HIGH_FIRST>
FM_HD inline int nibble(const uint8_t* bytes, int64_t at) {
    return bytes[at >> 1] >> (((at & 1) != 0) != HIGH_FIRST ? 4 : 0) & 15;
}

/// Element j of 2 * HALF: the low nibbles come first.
template <int HALF>
FM_HD inline int half_nibble(const uint8_t* bytes, int j) {
    return bytes[j % HALF] >> (j / HALF * 4) & 15;
}

/// Magnitudes 0, 1/2, 1, 3/2, 2, 3, 4, 6: two bits of exponent and one of mantissa; bit 3 is the sign.
FM_HD inline float e2m1_value(int code) {
    const float magnitude = bit_cast<float>(uint32_t(code & 7) << 22) * 8.507059173023462e37f;  // 2^126
    return code & 8 ? -magnitude : magnitude;
}

template <class Book>
FM_HD inline void few_of_bnb(const Coded& c, int64_t flat, int m, float* out) {
    const int64_t first = c.origin / c.group;
    few_of_groups(
        c.group, flat, m, out,
        [&](int64_t block) {
            if (!c.nested) return load_scale(c.scales, ScaleType::F32, block - first);
            return dynamic_value(c.scales[block - first]) * c.nested[block / 256] + c.nested_offset;
        },
        [&](float scale, int64_t at) { return Book::value(nibble<true>(c.codes, at - c.origin)) * scale; });
}

FM_HD inline void few_of_int4(const Coded& c, int64_t row, int64_t col, int m, float* out) {
    const uint8_t* bytes = c.codes + row * ((c.cols + 7) / 8 * 4);
    const int64_t groups = groups_of_row(c);
    const ScaleType t = c.scale_type;
    const DType rounding = t == ScaleType::BF16 ? DType::BF16 : t == ScaleType::F16 ? DType::F16 : DType::F32;
    few_of_groups(
        group_size(c), col, m, out,
        [&](int64_t g) {
            Affine a = {load_scale(c.scales, t, row * groups + g), 8};
            if (!c.symmetric) a.zero = float(load_word(c.zeros, row / 8 * groups + g) >> 4 * (row % 8) & 15);
            return a;
        },
        [&](Affine a, int64_t at) {
            return rounded_to(rounding, (float(nibble<false>(bytes, at)) - a.zero) * a.scale);
        });
}

template <class Group>
FM_HD inline void few_of_micro(const Coded& c, int64_t row, int64_t col, int m, float* out) {
    const uint8_t* bytes = c.codes + row * (c.cols / 2);
    const uint8_t* scales = c.scales + row * groups_of_row(c);
    few_of_groups(
        c.group, col, m, out, [&](int64_t g) { return Group::scale(c, scales[g]); },
        [&](float scale, int64_t at) { return e2m1_value(nibble<false>(bytes, at)) * scale; });
}

FM_HD inline void few_of_words(const Coded& c, int64_t row, int64_t col, int m, float* out) {
    const bool awq = c.format == Format::Awq;
    const int64_t words = c.rows / 8, group = group_size(c);
    const int shift = 4 * (awq ? awq_nibble(row) : int(row % 8));
    FM_ROLLED
    for (int j = 0; j < m; ++j) {
        const int64_t k = col + j, g = c.group_of ? c.group_of[k] : k / group;
        const uint32_t stored = load_word(c.zeros, g * words + row / 8) >> shift;
        const float zero = float((stored + shift_of_zeros(c)) & 15);
        const float scale = half_to_float(load_half_word(c.scales + (g * c.rows + row) * 2));
        const uint32_t word = awq ? load_word(c.codes, k * words + row / 8) >> shift
                                  : load_word(c.codes, (k >> 3) * c.rows + row) >> 4 * (k & 7);
        out[j] = (float(word & 15) - zero) * scale;
    }
}

/// Element j of GGUF's blocks.
FM_HD inline float q4_0_value(const uint8_t* p, int j) {
    return half_to_float(load_half_word(p)) * float(half_nibble<16>(p + 2, j) - 8);
}
FM_HD inline float q4_1_value(const uint8_t* p, int j) {
    const float scaled = half_to_float(load_half_word(p)) * float(half_nibble<16>(p + 4, j));
    return scaled + half_to_float(load_half_word(p + 2));
}
FM_HD inline float q8_0_value(const uint8_t* p, int j) {
    return half_to_float(load_half_word(p)) * float(int8_t(p[2 + j]));
}
FM_HD inline float gguf_mxfp4_value(const uint8_t* p, int j) {
    return e2m1_value(half_nibble<16>(p + 1, j)) * e8m0_to_float(*p);
}
FM_HD inline float gguf_nvfp4_value(const uint8_t* p, int j) {
    const int g = j / 16, stored = p[g] & 0x7f;
    const float scale = stored == 0x7f ? 0.f : e4m3_to_float(stored);
    return e2m1_value(half_nibble<8>(p + 4 + 8 * g, j % 16)) * scale;
}
FM_HD inline float q4_k_value(const uint8_t* p, int j) {
    const int s = j / 32, code = half_nibble<32>(p + 16 + s / 2 * 32, j % 64);
    const float scale = half_to_float(load_half_word(p)) * float(BlockQ4_K::scale_bits(p + 4, s));
    const float low = half_to_float(load_half_word(p + 2)) * float(BlockQ4_K::minimum_bits(p + 4, s));
    return scale * float(code) - low;
}
FM_HD inline float q6_k_value(const uint8_t* p, int j) {
    const int run = j / 32, part = run % 4, i = j % 32, half = run / 4;
    const int low = p[64 * half + 32 * (part % 2) + i] >> part / 2 * 4 & 15;
    const int high = p[128 + 32 * half + i] >> 2 * part & 3;
    const float scale = half_to_float(load_half_word(p + 208)) * float(int8_t(p[192 + 2 * run + i / 16]));
    return scale * float((low | high << 4) - 32);
}

/// value(block, place in it) for columns [col, col + m) of a row of blocks.
template <int ELEMENTS, int BYTES, class Value>
FM_HD inline void few_of_blocks(const Coded& c, int64_t row, int64_t col, int m, float* out, Value value) {
    const uint8_t* p = c.codes + row * (c.cols / ELEMENTS) * BYTES;
    FM_ROLLED
    for (int j = 0; j < m; ++j) out[j] = value(p + (col + j) / ELEMENTS * BYTES, int((col + j) % ELEMENTS));
}

FM_HD inline void few_of_eight_bits(const Coded& c, int64_t row, int64_t col, int m, float* out) {
    const uint8_t* codes = c.codes + row * c.cols;
    const bool fp8 = c.format == Format::Fp8;
    const ScaleType type = fp8 ? c.scale_type : ScaleType::F32;
    const int64_t of_row = !fp8 ? row : c.group_rows == 0 ? 0 : row / c.group_rows * groups_of_row(c);
    few_of_groups(
        fp8 ? group_size(c) : c.cols, col, m, out,
        [&](int64_t g) { return load_scale(c.scales, type, c.group_rows == 0 ? 0 : of_row + g); },
        [&](float scale, int64_t at) {
            return fp8 ? e4m3_to_float(codes[at]) * scale : float(int8_t(codes[at])) * scale / 127.f;
        });
}

/// Columns [col, col + m) of a stored row, counted from the row of `origin`.
FM_HD inline void few_of_row(const Coded& c, int64_t row, int64_t col, int m, float* out) {
    switch (c.format) {
        case Format::Int4:
            return few_of_int4(c, row, col, m, out);
        case Format::Nvfp4:
            return few_of_micro<Nvfp4Group>(c, row, col, m, out);
        case Format::Mxfp4:
            return few_of_micro<Mxfp4Group>(c, row, col, m, out);
        case Format::Gptq:
        case Format::Awq:
            return few_of_words(c, row, col, m, out);
        case Format::Q4_0:
            return few_of_blocks<32, 18>(c, row, col, m, out, q4_0_value);
        case Format::Q4_1:
            return few_of_blocks<32, 20>(c, row, col, m, out, q4_1_value);
        case Format::Q8_0:
            return few_of_blocks<32, 34>(c, row, col, m, out, q8_0_value);
        case Format::Q4_K:
            return few_of_blocks<256, 144>(c, row, col, m, out, q4_k_value);
        case Format::Q6_K:
            return few_of_blocks<256, 210>(c, row, col, m, out, q6_k_value);
        case Format::GgufMxfp4:
            return few_of_blocks<32, 17>(c, row, col, m, out, gguf_mxfp4_value);
        case Format::GgufNvfp4:
            return few_of_blocks<64, 36>(c, row, col, m, out, [&](const uint8_t* p, int j) {
                return gguf_nvfp4_value(p, j) * c.tensor_scale;
            });
        case Format::Fp8:
        case Format::Int8:
            return few_of_eight_bits(c, row, col, m, out);
        default:
            return load_run(c.codes, c.type, row * c.cols + col, m, out);
    }
}

template <DType T>
FM_HD inline float element(const void* p, int64_t i) {
    float x = 0;
    load_run(p, T, i, 1, &x);
    return x;
}

/// Add low_scale * (B A) to columns [col, col + m) of a row.
template <DType T>
FM_HD inline void add_few_of_low_rank(const Coded& c, int64_t row, int64_t col, int m, float* out) {
    float sum[FEW] = {};
    for (int r = 0; r < c.rank; ++r) {
        const float b = element<T>(c.low_b, row * c.rank + r);
        FM_UNROLL
        for (int j = 0; j < FEW; ++j)
            if (j < m) sum[j] += b * element<T>(c.low_a, r * c.cols + col + j);
    }
    FM_UNROLL
    for (int j = 0; j < FEW; ++j)
        if (j < m) out[j] += c.low_scale * sum[j];
}

FM_HD inline void add_few_of_low_rank(const Coded& c, int64_t row, int64_t col, int m, float* out) {
    if (c.low_type == DType::BF16)
        add_few_of_low_rank<DType::BF16>(c, row, col, m, out);
    else if (c.low_type == DType::F16)
        add_few_of_low_rank<DType::F16>(c, row, col, m, out);
    else if (c.low_type == DType::F32)
        add_few_of_low_rank<DType::F32>(c, row, col, m, out);
    else
        add_few_of_low_rank<DType::F64>(c, row, col, m, out);
}

/// As decode_run, of m elements, m <= FEW.
FM_HD inline void decode_few(const Coded& c, int64_t i, int m, float* out) {
    const bool nf4 = c.format == Format::BnbNf4, flat = nf4 || c.format == Format::BnbFp4;
    if (nf4)
        few_of_bnb<Nf4>(c, c.first + i, m, out);
    else if (flat)
        few_of_bnb<Fp4>(c, c.first + i, m, out);
    if (flat && c.rank == 0) return;
    int64_t row = (c.first + i) / c.cols, col = (c.first + i) % c.cols;
    for (int done = 0; done < m; ++row, col = 0) {
        const int n = c.cols - col < m - done ? int(c.cols - col) : m - done;
        if (!flat) few_of_row(c, stored_row(c, row), col, n, out + done);
        if (c.rank > 0) add_few_of_low_rank(c, row, col, n, out + done);
        done += n;
    }
}

}  // namespace FM_ISA
}  // namespace fastmerge
